"""Versions that cache keys and values as int8: what the forge makes, what it costs, and how the engine serves them."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from engine_requests import Reckless, ask, check_greedy, load
from runtime_fixtures import PROJECT, Version, base_version, int8_cache_version

from cli.main import main
from codec.versions import stream_bytes
from forge.build import build_version
from forge.cache_scales import MARGIN, Int8Cache, measure_scales
from forge.evaluate import evaluate_version
from forge.progress import silent
from forge.quantise import to_bf16_grid
from runtime.engine import Engine
from runtime.generation import Reason
from runtime.golden import judge_model, read_golden
from runtime.model import PREFILL_TOKENS, Model
from runtime.prefix import BLOCK_TOKENS
from runtime.slab import Shape, token_bytes
from runtime.stats import Stats
from wire.errors import Code, ConfigError, DeployError
from wire.manifest import Dtype, streams_of
from wire.serving import ExecutionOptions

WINDOWS = PROJECT / "samples" / "eval" / "tales-5m-base.json"
SAMPLE = PROJECT / "samples" / "tales-5m-base"


@pytest.fixture(scope="module")
def version() -> Version:
    return int8_cache_version()


@pytest.fixture(scope="module")
def window() -> list[int]:
    tokens: list[int] = json.loads(WINDOWS.read_text())["tokens"][3]
    return tokens


def scales(version: Version) -> dict[str, Any]:
    found = {}
    columns = version.document.tensors
    shapes = dict(zip(columns.name, columns.shape, strict=True))
    for stream in streams_of(version.document):
        if stream.name.endswith(("key_scales", "value_scales")):
            values = stream_bytes(version.directory, stream).view(np.float32)
            found[stream.name] = values.reshape(shapes[stream.name])
    return found


def test_document_says_so_and_a_token_takes_a_quarter(version: Version) -> None:
    assert version.document.config.kv_cache is Dtype.I8
    assert 4 * token_bytes(version.document.config) == token_bytes(base_version().document.config)


def test_scales_are_on_the_grid_and_hold_what_the_text_makes_with_a_margin(version: Version, window: list[int]) -> None:
    config = base_version().document.config
    found = scales(version)
    assert len(found) == 2 * config.layers
    model = load(1, len(window))
    for start in range(0, len(window), PREFILL_TOKENS):
        model.prefill(0, window[start : start + PREFILL_TOKENS], start)
    measured = measure_scales(base_version().directory, config, Int8Cache([window]), silent)
    half, clipped = config.head_size // 2, 0
    for layer in range(config.layers):
        keys, values = (part[0] for part in model.slab.parts(0, 1)[2 * layer : 2 * layer + 2])
        for part, name in enumerate(("key_scales", "value_scales")):
            stored = found[f"layers.{layer}.{name}"]
            assert stored.shape == (1, config.kv_heads, 1, config.head_size)
            assert (to_bf16_grid(stored) == stored).all()
            largest = np.abs((keys, values)[part]).max(axis=1)
            assert (measured[layer, part] * 127 >= largest * (MARGIN * 0.99)).all()
            clipped += int(np.sum(stored[0, :, 0] * 127 < largest))
        assert (measured[layer, 0, :, :half] == measured[layer, 0, :, half:]).all(), "positions turn these around"
    channels = 2 * config.layers * config.kv_heads * config.head_size
    assert clipped < channels / 100, "text that was not the calibration's is clipped"


def test_golden_vectors_keep_their_tolerance(version: Version) -> None:
    golden = read_golden(version.directory, version.document.config.vocab_size)
    assert golden.tolerance == read_golden(base_version().directory, 4096).tolerance
    judged = judge_model(load(1, 256, version=version), golden)
    assert judged.fault == ""
    assert judged.worst_error is not None
    assert judged.worst_error < golden.tolerance / 2


def test_quality_is_that_of_a_float_cache_within_a_two_hundredth(version: Version, tmp_path: Path) -> None:
    figures = evaluate_version(version.directory, WINDOWS, 3)
    assert figures["perplexity"] < figures["perplexity_float_cache"] * 1.005
    assert figures["kl_nats_of_cache"] < 0.001
    assert figures["top1_agreement_of_cache"] > 0.97
    # onnx refuses weights with several hard links, which stores of other tests have made to the base
    copied = Path(shutil.copytree(base_version().directory, tmp_path / "base"))
    assert "kl_nats_of_cache" not in evaluate_version(copied, WINDOWS, 1)


def test_engine_batches_chunks_and_reuses_prefixes_as_with_a_float_cache(version: Version, window: list[int]) -> None:
    engine = Engine("int8", load(3, 512, 64, version), Stats(), max_queue=8)
    reference = load(1, 512, version=version)
    prompts = [window[:300], window[5:25], window[100 : 100 + PREFILL_TOKENS], window[:1]]
    asked = [ask(engine, prompt, 30) for prompt in prompts]
    for prompt, one in zip(prompts, asked, strict=True):
        assert one.wait().reason is Reason.LENGTH
        check_greedy(reference, prompt, one.tokens)
    again = ask(engine, prompts[0], 30)
    assert again.wait().reason is Reason.LENGTH
    assert again.generation.cached == 299 // BLOCK_TOKENS * BLOCK_TOKENS
    check_greedy(reference, prompts[0], again.tokens)
    engine.close()


def test_drafts_change_no_answer(version: Version, window: list[int]) -> None:
    engine = Engine("int8", load(2, 512, version=version), Stats(), max_queue=8, speculation=Reckless())
    reference = load(1, 512, version=version)
    asked = [ask(engine, prompt, 100) for prompt in (window[:40], window[50:60])]
    for prompt, one in zip((window[:40], window[50:60]), asked, strict=True):
        assert one.wait().reason is Reason.LENGTH
        check_greedy(reference, prompt, one.tokens)
    figures = engine.stats.snapshot()
    assert figures.drafted_tokens > figures.accepted_tokens > 20
    engine.close()


def test_building_it_twice_gives_the_same_digest(version: Version, tmp_path: Path) -> None:
    again = build_version(SAMPLE, tmp_path / "again", ("tales", "1.0"), cache=Int8Cache())
    assert again.decoded_digest() == version.decoded


def test_document_that_lies_about_its_cache_does_not_load(version: Version) -> None:
    lying = version.document.config.model_copy(update={"kv_cache": Dtype.F32})
    model = Model(version.directory, lying, Shape(1, 64), ExecutionOptions(threads=1))
    with pytest.raises(DeployError) as refusal:
        model.warm_up()
    assert refusal.value.code is Code.LOAD_FAILED


def test_calibration_with_another_models_tokens_is_refused_and_leaves_no_version(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not of this model's"):
        build_version(SAMPLE, tmp_path / "out", ("tales", "1"), cache=Int8Cache([[1, 4096]]))
    assert not (tmp_path / "out").exists()


def test_command_builds_by_given_windows_and_refuses_them_for_a_float_cache(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = tmp_path / "windows.json"
    few.write_text(json.dumps({"tokens": json.loads(WINDOWS.read_text())["tokens"][:2]}))
    command = ["forge", "build", str(SAMPLE), "--name", "t", "--version", "1", "--calibration", str(few), "--json"]
    with pytest.raises(SystemExit) as refused:
        main([*command, "--out", str(tmp_path / "float")])
    assert refused.value.code == 78
    assert "--kv-cache int8" in capsys.readouterr().err
    with pytest.raises(SystemExit) as built:
        main([*command, "--out", str(tmp_path / "int8"), "--kv-cache", "int8"])
    assert built.value.code == 0
    assert json.loads((tmp_path / "int8" / "version.json").read_text())["config"]["kv_cache"] == "i8"
