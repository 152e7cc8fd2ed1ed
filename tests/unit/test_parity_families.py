"""Families of decoders against transformers' logits, in float32 and as a node decodes them."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from checkpoint_fixtures import write_small_tokenizer

from forge.build import build_version
from forge.checkpoint import Checkpoint
from forge.reference import Judge, checkpoint_judge, twin_judge
from runtime.model import Model
from runtime.slab import Shape
from tests.unit.test_parity import FIXTURES, INT8_TOLERANCE
from wire.manifest import DecoderConfig, VersionDocument
from wire.serving import ExecutionOptions

FAMILIES = ("tiny-llama3", "tiny-mistral", "tiny-qwen2", "tiny-qwen3")
TOLERANCE = 1e-4
"""Largest difference, as a share of the logits' standard deviation: float32 sums in another order."""


def cases() -> list[tuple[str, np.ndarray, np.ndarray]]:
    with np.load(FIXTURES / "families.npz") as stored:
        keys = [key.removesuffix("/ids") for key in stored.files if key.endswith("/ids")]
        return [(key.split("/")[0], stored[f"{key}/ids"], stored[f"{key}/logits"]) for key in keys]


def worst(judge: Judge, ids: np.ndarray, expected: np.ndarray) -> float:
    logits = judge.logits([int(i) for i in ids])[-len(expected) :]
    return float(np.abs(logits - expected).max() / expected.std())


@pytest.mark.parametrize(("name", "ids", "expected"), cases())
def test_float_graph_gives_transformers_logits(
    name: str, ids: np.ndarray, expected: np.ndarray, tmp_path: Path
) -> None:
    assert worst(checkpoint_judge(Checkpoint(FIXTURES / name), tmp_path), ids, expected) < TOLERANCE


@pytest.fixture(params=FAMILIES)
def built(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, VersionDocument]:
    """Each family as an int4 version."""
    checkpoint = Path(shutil.copytree(FIXTURES / request.param, tmp_path / "checkpoint"))
    write_small_tokenizer(checkpoint)
    return tmp_path / "out", build_version(checkpoint, tmp_path / "out", (request.param, "1"))


def test_int4_read_in_chunks_and_decoded_together_is_what_its_twin_says(built: tuple[Path, VersionDocument]) -> None:
    directory, document = built
    config = document.config
    assert isinstance(config, DecoderConfig)
    model = Model(directory, config, Shape(2, 64), ExecutionOptions(threads=1))
    judge = twin_judge(directory, document)
    prompts = np.random.default_rng(4).integers(1, config.vocab_size, (2, 40)).tolist()

    def check(found: np.ndarray, prompt: list[int], rows: list[int]) -> None:
        expected = judge.logits(prompt, rows)
        assert np.sqrt(np.mean(np.square(found - expected))) < INT8_TOLERANCE * expected.std()

    model.prefill(0, prompts[0][:24], 0)
    check(model.prefill(0, prompts[0][24:36], 24)[None], prompts[0], [35])
    check(model.prefill_together(0, [prompts[0][:36], prompts[1][:30]])[1:], prompts[1], [29])
    for step in range(4):
        logits = model.decode([prompts[0][36 + step], prompts[1][30 + step]], [36 + step, 30 + step])
        check(logits[:1], prompts[0], [36 + step])
        check(logits[1:], prompts[1], [30 + step])
    check(model.verify(1, prompts[1][34:39], 34), prompts[1], list(range(34, 39)))
