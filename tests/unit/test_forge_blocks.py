"""Blocks of more weights than 32: the kernels read them as they are stored, and a base's are kept."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from codec.versions import read_version
from forge.build import build_version, longest_block, read_scales
from forge.moments import measure_moments
from forge.open_model import open_model
from forge.progress import silent
from forge.quantise import BLOCKS, Precision, in_blocks, quantise_blocks
from forge.reference import shipped_judge, twin_judge
from forge.release import variant_name
from forge.rounding import Grid, Rounding, round_matrix
from runtime.integer_graph import integer_graph
from tests.forge_command import forge
from wire.errors import ConfigError
from wire.serving import IntegerReading

PROJECT = Path(__file__).resolve().parents[2]
SAMPLE = PROJECT / "samples" / "tales-5m-base"
TUNED = PROJECT / "samples" / "tales-5m-finetuned-50"
PROMPT = list(range(5, 45))
HIDDEN, MLP = 256, 704


def weights(seed: int, columns: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((6, columns)).astype(np.float32)


def stored_blocks(directory: Path) -> Mapping[int, set[int]]:
    """By columns of a matrix, the block sizes that the graph says it has."""
    found: dict[int, set[int]] = {}
    for node in onnx.load(str(directory / "model.onnx"), load_external_data=False).graph.node:
        says = {attribute.name: attribute.i for attribute in node.attribute}
        if node.op_type == "MatMulNBits":
            found.setdefault(says["K"], set()).add(says["block_size"])
        elif node.op_type == "GatherBlockQuantized":
            found.setdefault(HIDDEN, set()).add(says["block_size"])
    return found


@given(st.integers(1, 40), st.sampled_from(BLOCKS))
def test_blocks_are_the_longest_that_divide_the_columns(count: int, longest: int) -> None:
    columns = 32 * count
    block = in_blocks("w", weights(0, columns), longest).shape[2]
    assert columns % block == 0
    assert block == longest or columns % (2 * block)


@given(st.integers(1, 12), st.sampled_from(BLOCKS), st.integers(0, 1 << 20))
def test_no_weight_is_further_from_its_level_than_half_a_step_of_its_block(count: int, longest: int, seed: int) -> None:
    original = weights(seed, 32 * count)
    matrix = quantise_blocks("w", original, precision=Precision.INT8, longest=longest)
    error = np.abs(matrix.dequantise() - original).reshape(*matrix.scales.shape, matrix.block)
    assert np.all(error <= 0.51 * matrix.scales[:, :, None])


@pytest.mark.parametrize(
    ("precision", "blocks"),
    [(Precision.INT8, {256}), (Precision.INT4, {256}), (Precision.TERNARY, {128, 256})],  # tables of ternary are int4
)
def test_kernels_compute_what_the_twin_of_long_blocks_says(
    precision: Precision, blocks: set[int], tmp_path: Path
) -> None:
    version = build_version(SAMPLE, tmp_path / "out", ("m", "1"), precision=precision, longest=BLOCKS[-1])
    assert stored_blocks(tmp_path / "out") == {HIDDEN: blocks, MLP: {64}}
    expected = twin_judge(tmp_path / "out", version).logits(PROMPT)
    found = shipped_judge(tmp_path / "out", version).logits(PROMPT)
    assert np.abs(found - expected).max() < 0.15 * expected.std()


def test_prompts_are_read_by_integers_from_long_blocks_too(tmp_path: Path) -> None:
    build_version(SAMPLE, tmp_path / "out", ("m", "1"), longest=BLOCKS[-1])
    stored = np.fromfile(tmp_path / "out" / "weights.bin", np.uint8)
    derived = integer_graph((tmp_path / "out" / "model.onnx").read_bytes(), stored, IntegerReading.ALL)
    scales = read_scales(tmp_path / "out")["layers.0.qkv.scales"]
    name = "model.layers.0.attention.qkv"
    matrix, of_outputs = (derived.tensors[f"{name}.{part}"] for part in ("integers", "integer_scales"))
    with open_model(SAMPLE) as model:
        shipped = quantise_blocks("qkv", model.matrix("layers.0.qkv"), longest=BLOCKS[-1])
    assert np.array_equal(shipped.scales, scales)
    assert np.abs((matrix * of_outputs).T - shipped.dequantise()).max() <= 0.51 * of_outputs.max()


@pytest.mark.parametrize("precision", [Precision.INT4, Precision.INT2])
def test_feedback_makes_up_for_columns_of_a_long_block(precision: Precision) -> None:
    with open_model(SAMPLE) as model:
        moments = measure_moments(model, [PROMPT * 6], silent)["layers.0.qkv"]
        original = model.matrix("layers.0.qkv")

    def error(rounding: Rounding) -> float:
        rounded = round_matrix("w", original, Grid(precision, longest=BLOCKS[-1]), rounding, moments)
        assert rounded.block == precision.longest_block
        difference = rounded.dequantise() - original
        return float(np.einsum("ij,jk,ik->", difference, moments, difference))

    assert error(Rounding.GPTQ) < 0.8 * error(Rounding.NEAREST)


def test_command_builds_rounded_versions_in_long_blocks(tmp_path: Path) -> None:
    windows = PROJECT / "samples" / "eval" / "tales-5m-base.json"
    named = ("--name", "m", "--version", "1", "--out", tmp_path / "out")
    forge("build", SAMPLE, *named, "--block", 128, "--rounding", "k-quant", "--calibration", windows)
    assert stored_blocks(tmp_path / "out") == {HIDDEN: {128}, MLP: {64}}


def test_a_successor_has_the_blocks_of_the_version_whose_scales_it_keeps(tmp_path: Path) -> None:
    build_version(SAMPLE, tmp_path / "base", ("m", "1"), longest=128)
    build_version(TUNED, tmp_path / "tuned", ("m", "2"), scales_of=tmp_path / "base")
    assert longest_block(read_version(tmp_path / "tuned")) == 128
    assert variant_name(read_version(tmp_path / "tuned")) == "int4-block128"
    build_version(TUNED, tmp_path / "fresh", ("m", "2"), longest=128)
    base, tuned, fresh = (
        read_scales(tmp_path / name)["layers.0.gate_up.scales"] for name in ("base", "tuned", "fresh")
    )
    assert np.mean(base == tuned) > 0.7 > 0.5 > np.mean(base == fresh)


@pytest.mark.parametrize(
    ("precision", "longest", "why"),
    [("int4", 48, "no block has 48 weights"), ("float32", 64, "nothing is stored in blocks as float32")],
)
def test_blocks_that_are_none_are_refused(precision: str, longest: int, why: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=why):
        build_version(SAMPLE, tmp_path / "out", ("m", "1"), precision=Precision(precision), longest=longest)
    assert not (tmp_path / "out").exists()
