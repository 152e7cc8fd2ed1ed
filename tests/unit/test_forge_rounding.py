"""Scales, even steps and feedback: what each promises of the matrix that comes out."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from codec.entropy import byte_histogram, entropy_bytes
from forge.feedback import feedback_of
from forge.quantise import BLOCK, Float, Precision, quantise_blocks
from forge.rounding import Grid, Rounding, round_matrix
from wire.errors import ConfigError

ROWS, COLUMNS = 48, 128


def weights(seed: int = 0) -> Float:
    return np.random.default_rng(seed).standard_normal((ROWS, COLUMNS)).astype(np.float32)


def moments(seed: int = 1) -> Float:
    """Of inputs of which a quarter of the directions carry most."""
    random = np.random.default_rng(seed)
    inputs = random.standard_normal((512, COLUMNS // 4)) @ random.standard_normal((COLUMNS // 4, COLUMNS))
    inputs += 0.3 * random.standard_normal(inputs.shape)
    return (inputs.T @ inputs / len(inputs)).astype(np.float32)


def product_error(matrix: Float, original: Float, second: Float) -> float:
    error = (matrix - original).astype(np.float64)
    return float(np.einsum("ij,jk,ik->", error, second, error))


@pytest.mark.parametrize("precision", [Precision.INT8, Precision.INT4, Precision.INT2, Precision.TERNARY])
def test_feedback_lowers_the_error_of_the_product(precision: Precision) -> None:
    original, second = weights(), moments()
    nearest = round_matrix("w", original, Grid(precision), Rounding.NEAREST, second).dequantise()
    fed_back = round_matrix("w", original, Grid(precision), Rounding.GPTQ, second).dequantise()
    assert product_error(fed_back, original, second) < 0.75 * product_error(nearest, original, second)
    assert np.mean((fed_back - original) ** 2) > np.mean((nearest - original) ** 2)


def test_inputs_that_know_nothing_of_each_other_leave_nothing_to_make_up_for() -> None:
    original, second = weights(), np.eye(COLUMNS, dtype=np.float32)
    nearest, fed_back = (
        round_matrix("w", original, Grid(Precision.INT4), rounding, second)
        for rounding in (Rounding.NEAREST, Rounding.GPTQ)
    )
    assert np.array_equal(nearest.packed, fed_back.packed)
    assert feedback_of(second).gain == pytest.approx(1)


def test_gain_of_fine_levels_is_about_what_was_expected() -> None:
    """Not quite: the damping counts errors, too, that none of these inputs shows."""
    original, second = weights(), moments()
    grid = Grid(Precision.INT8, 0.05)
    nearest, fed_back = (
        product_error(round_matrix("w", original, grid, rounding, second).dequantise(), original, second)
        for rounding in (Rounding.NEAREST, Rounding.GPTQ)
    )
    assert fed_back / nearest == pytest.approx(feedback_of(second).gain, rel=0.25)


def test_k_quant_places_best_what_is_multiplied_with_most() -> None:
    original = weights()
    second = np.diag(np.where(np.arange(COLUMNS) % 4 == 0, 100, 1)).astype(np.float32)
    grid = Grid(Precision.INT2)
    plain, weighed = (
        product_error(round_matrix("w", original, grid, rounding, second).dequantise(), original, second)
        for rounding in (Rounding.NEAREST, Rounding.K_QUANT)
    )
    assert weighed < 0.7 * plain


def test_equal_importance_changes_nothing() -> None:
    original = weights()
    for precision in (Precision.INT8, Precision.INT4, Precision.INT2, Precision.TERNARY, Precision.BINARY):
        second = np.diag(np.full(COLUMNS, 2, np.float32))
        weighed = round_matrix("w", original, Grid(precision), Rounding.K_QUANT, second)
        assert np.array_equal(weighed.packed, quantise_blocks("w", original, precision=precision).packed)


@given(st.sampled_from([Precision.INT8, Precision.INT4, Precision.INT2]), st.floats(0.02, 3), st.integers(0, 1 << 20))
def test_even_steps_are_one_step_and_wider_only_where_a_block_needs_it(
    precision: Precision, step: float, seed: int
) -> None:
    original = weights(seed)
    matrix = round_matrix("w", original, Grid(precision, step), Rounding.NEAREST, None)
    blocks = original.reshape(ROWS, -1, BLOCK)
    reach = 2 ** (precision.bits - 1) - 0.5
    narrow = np.abs(blocks).max(axis=2) <= step * reach * 0.99
    assert np.unique(matrix.scales[narrow]).size <= 1
    assert np.all(matrix.scales >= np.float32(step) * (1 - 2**-8))
    assert not (matrix.scales.view(np.uint32) & 0xFFFF).any()
    error = np.abs(matrix.dequantise() - original).reshape(blocks.shape).max(axis=2)
    assert np.all(error <= matrix.scales * 0.51)


def test_even_steps_take_fewer_bits_than_fitted_scales_for_the_same_error() -> None:
    original = np.random.default_rng(3).standard_normal((512, 512)).astype(np.float32)
    fitted = round_matrix("w", original, Grid(Precision.INT2), Rounding.NEAREST, None)
    even = round_matrix("w", original, Grid(Precision.INT4, 1.05), Rounding.NEAREST, None)
    bits = [8 * entropy_bytes(byte_histogram(m.levels().ravel())) / original.size for m in (fitted, even)]
    errors = [float(np.mean((m.dequantise() - original) ** 2)) for m in (fitted, even)]
    assert errors[1] < errors[0]
    assert bits[1] < bits[0] + 0.2  # what a scale per block takes on the wire


def test_binary_weights_have_no_feedback() -> None:
    with pytest.raises(ConfigError, match="binary"):
        round_matrix("w", weights(), Grid(Precision.BINARY), Rounding.GPTQ, moments())


def test_moments_of_silence_are_rounded_to_the_nearest() -> None:
    original, silence = weights(), np.zeros((COLUMNS, COLUMNS), np.float32)
    assert np.isfinite(round_matrix("w", original, Grid(Precision.INT4), Rounding.GPTQ, silence).dequantise()).all()
