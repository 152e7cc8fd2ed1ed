"""Decoders in every precision: what is stored is what the kernels read, and two bits cost what they should."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from codec.encoder import encode_pack
from codec.versions import read_version
from forge.build import build_version, read_scales
from forge.evaluate import evaluate_version
from forge.quantise import BLOCK, Precision, quantise_blocks
from forge.reference import shipped_judge, twin_judge

PROJECT = Path(__file__).resolve().parents[2]
SAMPLE = PROJECT / "samples" / "tales-5m-base"
WINDOWS = PROJECT / "samples" / "eval" / "tales-5m-base.json"
LEVELS = {Precision.TERNARY: {-1, 0, 1}, Precision.BINARY: {-1, 1}, Precision.INT2: {-2, -1, 0, 1}}


def weights(seed: int, rows: int = 8, columns: int = 96) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


@given(st.sampled_from(sorted(LEVELS)), st.integers(0, 1 << 32))
def test_two_bits_hold_only_their_levels_and_what_was_stored_is_stored_again(precision: Precision, seed: int) -> None:
    matrix = quantise_blocks("w", weights(seed), precision=precision)
    values = matrix.dequantise()
    levels = (values.reshape(8, -1, BLOCK) / matrix.scales[:, :, None]).astype(int)
    assert set(np.unique(levels)) <= LEVELS[precision]
    assert not (matrix.scales.view(np.uint32) & 0xFFFF).any()
    assert np.array_equal(quantise_blocks("w", values, precision=precision).dequantise(), values)


@pytest.mark.parametrize(
    ("precision", "least", "most"),
    [(Precision.INT2, 0.3, 0.4), (Precision.TERNARY, 0.4, 0.46), (Precision.BINARY, 0.5, 0.62)],
)
def test_relative_error_of_two_bits_is_that_of_fitted_scales(precision: Precision, least: float, most: float) -> None:
    original = weights(1, 64, 512)
    error = quantise_blocks("w", original, precision=precision).dequantise() - original
    assert least < np.linalg.norm(error) / np.linalg.norm(original) < most


@pytest.mark.parametrize("precision", Precision)
def test_every_precision_computes_what_its_twin_says(precision: Precision, tmp_path: Path) -> None:
    version = build_version(SAMPLE, tmp_path / "out", ("m", "1"), precision=precision)
    prompt = list(range(5, 45))
    expected = twin_judge(tmp_path / "out", version).logits(prompt)
    error = shipped_judge(tmp_path / "out", version).logits(prompt) - expected
    assert np.sqrt(np.mean(error**2)) < 0.03 * expected.std()
    assert all(np.all(scales != 0) for scales in read_scales(tmp_path / "out").values())


@pytest.mark.parametrize(("precision", "most"), [(Precision.TERNARY, 1.61), (Precision.BINARY, 1.01)])
def test_levels_of_two_bits_cost_their_entropy_on_the_wire(precision: Precision, most: float, tmp_path: Path) -> None:
    build_version(SAMPLE, tmp_path / "out", ("m", "1"), precision=precision)
    version = read_version(tmp_path / "out")
    packed = encode_pack(version, tmp_path / "out", tmp_path / "pack")
    planes = [plane for plane in packed.planes if plane.stream.startswith("layers.") and "packed" in plane.stream]
    assert len(planes) == 24
    assert 8 * sum(plane.coded_bytes for plane in planes) / (4 * sum(plane.raw_bytes for plane in planes)) < most


def test_cost_against_the_checkpoint_is_nothing_in_float32_and_much_in_ternary(tmp_path: Path) -> None:
    found = {}
    for precision in (Precision.FLOAT32, Precision.TERNARY):
        build_version(SAMPLE, tmp_path / precision, ("m", "1"), precision=precision)
        found[precision] = evaluate_version(tmp_path / precision, WINDOWS, 1, checkpoint=SAMPLE)
    assert found[Precision.FLOAT32]["kl_nats_of_checkpoint"] < 1e-5
    assert 0.1 < found[Precision.TERNARY]["kl_nats_of_checkpoint"] < 1


def test_table_that_head_and_embedding_share_keeps_four_bits(tmp_path: Path) -> None:
    columns = build_version(SAMPLE, tmp_path / "out", ("m", "1"), precision=Precision.BINARY).tensors
    dtypes = dict(zip(columns.name, columns.dtype, strict=True))
    assert dtypes["model.embed_tokens.packed"] == "u4"
    assert dtypes["layers.0.qkv.packed"] == "u2"
