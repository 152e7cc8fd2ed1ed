"""Families of decoders against transformers' logits, in float32 and as a node decodes them."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from checkpoint_fixtures import write_small_tokenizer

from forge.build import build_version
from forge.checkpoint import Checkpoint
from forge.reference import Judge, checkpoint_judge, open_judge, twin_judge
from tests.unit.test_parity import FIXTURES, INT8_TOLERANCE, run_steps
from wire.manifest import DecoderConfig

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


@pytest.mark.parametrize("name", FAMILIES)
def test_decoding_int4_token_by_token_gives_the_logits_of_one_pass(name: str, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(FIXTURES / name, tmp_path / name))
    write_small_tokenizer(checkpoint)
    document = build_version(checkpoint, tmp_path / "out", (name, "1"))
    config = document.config
    assert isinstance(config, DecoderConfig)
    session = open_judge(tmp_path / "out" / "model.onnx")
    ids = [int(i) for i in np.random.default_rng(4).integers(1, config.vocab_size, 40)]
    whole = twin_judge(tmp_path / "out", document).logits(ids, [39])[0]
    shape = (1, config.kv_heads, 64, config.head_size)
    for steps in ([40], [16, 16, 8], [1] * 40):
        found = run_steps(session, ids, steps, shape, layers=config.layers)
        assert np.sqrt(np.mean(np.square(found - whole))) < INT8_TOLERANCE * whole.std()
