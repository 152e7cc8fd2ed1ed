"""The forge's graphs against references that share no code with it: transformers' logits and a numpy forward."""

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from codec.versions import read_version
from forge.build import build_version
from forge.checkpoint import Checkpoint
from forge.reference import checkpoint_judge, shipped_judge, twin_judge
from tests.reference.llama import ReferenceLlama

PROJECT = Path(__file__).resolve().parents[2]
FIXTURES = PROJECT / "tests" / "fixtures" / "parity"
CHECKPOINTS = {
    "tiny-llama": FIXTURES / "tiny-llama",
    "tales-5m-base": PROJECT / "samples" / "tales-5m-base",
    "tales-5m-finetuned-50": PROJECT / "samples" / "tales-5m-finetuned-50",
}
FLOAT_TOLERANCE = 2e-3
"""Largest difference of logits whose standard deviation is about 3: float32 sums in another order."""
INT8_TOLERANCE = 0.05
"""RMS difference, as a share of the deviation, that int8 activations may cost; 0.006 was seen on x86."""


def fixture_cases() -> list[tuple[str, np.ndarray, np.ndarray]]:
    with np.load(FIXTURES / "logits.npz") as stored:
        keys = [key.removesuffix("/ids") for key in stored.files if key.endswith("/ids")]
        return [(key.split("/")[0], stored[f"{key}/ids"], stored[f"{key}/logits"]) for key in keys]


@pytest.fixture(scope="module")
def base_version(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("version") / "base"
    build_version(CHECKPOINTS["tales-5m-base"], out, ("tales", "1.0"))
    return out


@pytest.mark.parametrize(("name", "ids", "expected"), fixture_cases())
def test_numpy_reference_gives_transformers_logits(name: str, ids: np.ndarray, expected: np.ndarray) -> None:
    logits = ReferenceLlama.load(CHECKPOINTS[name]).logits([int(i) for i in ids])
    assert np.abs(logits[-len(expected) :] - expected).max() < FLOAT_TOLERANCE


@pytest.mark.parametrize(("name", "ids", "expected"), fixture_cases())
def test_float_graph_gives_transformers_logits(
    name: str, ids: np.ndarray, expected: np.ndarray, tmp_path: Path
) -> None:
    judge = checkpoint_judge(Checkpoint(CHECKPOINTS[name]), tmp_path)
    logits = judge.logits([int(i) for i in ids])
    assert np.abs(logits[-len(expected) :] - expected).max() < FLOAT_TOLERANCE


def dequantised_reference(directory: Path) -> ReferenceLlama:
    """The numpy reference on the int4 weights that a node gets, read from weights.bin with nothing of the forge."""
    version = read_version(directory)
    columns = version.tensors
    blob = (directory / "weights.bin").read_bytes()
    raw = {
        name: blob[columns.offset[row] : columns.offset[row] + columns.size_bytes(row)]
        for row, name in enumerate(columns.name)
    }
    shapes = dict(zip(columns.name, columns.shape, strict=True))

    def matrix(name: str) -> np.ndarray:
        rows, width = shapes[f"{name}.packed"]
        packed = np.frombuffer(raw[f"{name}.packed"], np.uint8)
        levels = np.stack([packed % 16, packed // 16], axis=1).reshape(rows, width // 32, 32).astype(np.float32)
        scales = np.frombuffer(raw[f"{name}.scales"], np.float32).reshape(rows, width // 32, 1)
        return ((levels - 8) * scales).reshape(rows, width)

    def vector(name: str) -> np.ndarray:
        return np.frombuffer(raw[name], np.float32)

    source = ReferenceLlama.load(CHECKPOINTS["tales-5m-base"])
    c = source.config
    q, kv = c["num_attention_heads"] * c["head_dim"], c["num_key_value_heads"] * c["head_dim"]
    weights = {"model.embed_tokens.weight": matrix("model.embed_tokens"), "model.norm.weight": vector("model.norm")}
    for i in range(c["num_hidden_layers"]):
        stem, name = f"model.layers.{i}", f"layers.{i}"
        qkv, gate_up = matrix(f"{name}.qkv"), matrix(f"{name}.gate_up")
        weights |= {
            f"{stem}.input_layernorm.weight": vector(f"{name}.input_norm"),
            f"{stem}.post_attention_layernorm.weight": vector(f"{name}.post_norm"),
            f"{stem}.self_attn.q_proj.weight": qkv[:q],
            f"{stem}.self_attn.k_proj.weight": qkv[q : q + kv],
            f"{stem}.self_attn.v_proj.weight": qkv[q + kv :],
            f"{stem}.self_attn.o_proj.weight": matrix(f"{name}.output"),
            f"{stem}.mlp.gate_proj.weight": gate_up[: c["intermediate_size"]],
            f"{stem}.mlp.up_proj.weight": gate_up[c["intermediate_size"] :],
            f"{stem}.mlp.down_proj.weight": matrix(f"{name}.down"),
        }
    return ReferenceLlama(c, weights)


def test_float_twin_is_the_dequantised_model(base_version: Path) -> None:
    ids = [int(i) for i in np.random.default_rng(3).integers(1, 4096, 80)]
    expected = dequantised_reference(base_version).logits(ids)
    logits = twin_judge(base_version, read_version(base_version)).logits(ids)
    assert np.abs(logits - expected).max() < FLOAT_TOLERANCE


def test_int4_graph_stays_within_int8_noise_of_the_dequantised_model(base_version: Path) -> None:
    ids = [int(i) for i in np.random.default_rng(3).integers(1, 4096, 80)]
    expected = dequantised_reference(base_version).logits(ids)
    logits = shipped_judge(base_version, read_version(base_version)).logits(ids)
    error = np.sqrt(np.mean(np.square(logits - expected), axis=1)) / expected.std(axis=1)
    assert error.max() < INT8_TOLERANCE
    assert error.max() > 0  # the int8 kernels were really used


def run_steps(session: ort.InferenceSession, ids: list[int], steps: list[int], shape: tuple[int, ...]) -> np.ndarray:
    """Last logits of `ids` fed in portions of `steps` through past and present on one buffer."""
    past = {f"past_key_values.{i}.{part}": np.zeros(shape, np.float32) for i in range(6) for part in ("key", "value")}
    done, logits = 0, np.zeros(0, np.float32)
    for size in steps:
        feeds = {
            "input_ids": np.asarray([ids[done : done + size]], np.int64),
            "seqlens_k": np.asarray([done + size - 1], np.int32),
            "total_sequence_length": np.asarray(done + size, np.int32),
            "logit_rows": np.asarray([size - 1], np.int64),
            **past,
        }
        logits, *present = session.run(None, feeds)
        past = dict(zip(past, present, strict=True))
        done += size
    return np.asarray(logits[0])


def test_prefill_in_chunks_or_token_by_token_gives_the_logits_of_one_pass(base_version: Path) -> None:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(str(base_version / "model.onnx"), options, providers=["CPUExecutionProvider"])
    ids = [int(i) for i in np.random.default_rng(4).integers(1, 4096, 40)]
    shape = (1, 2, 64, 64)
    whole = run_steps(session, ids, [40], shape)
    for steps in ([16, 16, 8], [39, 1], [1] * 40):
        assert np.abs(run_steps(session, ids, steps, shape) - whole).max() < 0.02 * whole.std()
