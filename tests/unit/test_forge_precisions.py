"""Decoders in every precision: what is stored is what the kernels read, and two bits cost what they should."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from codec.encoder import encode_pack
from codec.versions import read_version
from forge.build import build_version, read_scales
from forge.calibrated import round_checkpoint
from forge.evaluate import evaluate_version
from forge.placer import Rounded
from forge.progress import silent
from forge.quantise import BLOCK, Precision, quantise_blocks
from forge.reference import shipped_judge, twin_judge
from forge.release import variant_name
from forge.rounding import Grid, Rounding
from forge.static import static_matrix
from forge.windows import read_windows
from wire.errors import ConfigError

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


def calibrated(precision: Precision) -> Rounded | None:
    """What int8-static is built of: calibrated on a little text."""
    if precision is not Precision.INT8_STATIC:
        return None
    windows = [window[:128] for window in read_windows(WINDOWS)[8:12]]
    return round_checkpoint(SAMPLE, Grid(precision), Rounding.NEAREST, windows, silent)


@pytest.mark.parametrize("precision", Precision)
def test_every_precision_computes_what_its_twin_says(precision: Precision, tmp_path: Path) -> None:
    rounded = calibrated(precision)
    version = build_version(SAMPLE, tmp_path / "out", ("m", "1"), precision=precision, rounded=rounded)
    prompt = list(range(5, 45))
    expected = twin_judge(tmp_path / "out", version).logits(prompt)
    error = shipped_judge(tmp_path / "out", version).logits(prompt) - expected
    most = 0.06 if precision is Precision.INT8_STATIC else 0.03  # these tokens are no text: fixed scales clip some
    assert np.sqrt(np.mean(error**2)) < most * expected.std()
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


def test_fixed_scales_cost_little_and_leave_no_search_in_the_graph(tmp_path: Path) -> None:
    precision = Precision.INT8_STATIC
    version = build_version(SAMPLE, tmp_path / "out", ("m", "1"), precision=precision, rounded=calibrated(precision))
    judged = evaluate_version(tmp_path / "out", WINDOWS, 2, checkpoint=SAMPLE)
    assert 0.0005 < judged["kl_nats_of_checkpoint"] < 0.006  # int8 with scales of each row is at 0.0002
    graph = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).graph
    kinds = Counter(node.op_type for node in graph.node)
    assert (kinds["MatMulIntegerToFloat"], kinds["QuantizeLinear"], kinds["ReduceMax"]) == (24, 24, 0)
    assert variant_name(version) == "int8"


@pytest.mark.parametrize(("precision", "rounding"), [("int8-static", "gptq"), ("float32", "k-quant")])
def test_precision_without_the_rounding_that_is_asked_for_is_refused(precision: str, rounding: str) -> None:
    with pytest.raises(ConfigError, match="leave --rounding"):
        round_checkpoint(SAMPLE, Grid(Precision(precision)), Rounding(rounding), [[1, 2]], silent)


def test_fixed_scales_without_calibration_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="calibrate"):
        build_version(SAMPLE, tmp_path / "out", ("m", "1"), precision=Precision.INT8_STATIC)


def test_fixed_scale_has_room_for_more_than_was_seen() -> None:
    largest = np.linspace(1, 40, 96, dtype=np.float32)
    static = static_matrix(weights(1), largest)
    reach = static.source_scale * 127 / static.smoothing
    assert np.all(reach > 1.2 * largest)
    assert np.min(reach / largest) < 1.3


def test_table_that_head_and_embedding_share_keeps_four_bits(tmp_path: Path) -> None:
    columns = build_version(SAMPLE, tmp_path / "out", ("m", "1"), precision=Precision.BINARY).tensors
    dtypes = dict(zip(columns.name, columns.dtype, strict=True))
    assert dtypes["model.embed_tokens.packed"] == "u4"
    assert dtypes["layers.0.qkv.packed"] == "u2"
