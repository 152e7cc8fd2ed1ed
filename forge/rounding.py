"""One matrix to its levels: which scales, and how weights are rounded on them.

Scales are fitted block by block, or there is one even step for all: with an entropy coder behind it nothing scalar is
better (Gish and Pierce, 1968: 0.25 bit from the bound, when levels are fine). Only a block that would leave the range
of levels has a wider step. Fitted scales cost a quarter of a bit per weight, even steps nothing.
"""

from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from forge.feedback import feedback_of
from forge.quantise import (
    BLOCK,
    BlockMatrix,
    Float,
    Precision,
    block_scales,
    in_blocks,
    level_range,
    pack_levels,
    round_on,
    to_bf16_grid,
)
from wire.errors import ConfigError

WIDENING = 4
"""Widths of steps per doubling."""
GRID_ERROR = 2.0**-8
"""How much less a scale may become on the bfloat16 grid."""


class Rounding(StrEnum):
    """How weights find their levels."""

    NEAREST = "nearest"
    K_QUANT = "k-quant"
    """Nearest, on scales chosen by errors weighed with the squares of what each column is multiplied with."""
    GPTQ = "gptq"
    """Column by column, later columns making up for earlier ones (forge/feedback.py)."""


@dataclass(frozen=True, slots=True)
class Grid:
    """What a matrix is rounded to: the levels of a precision, on fitted scales or on even steps of one size."""

    precision: Precision
    step: float | None = None
    longest: int = BLOCK
    """Weights that share a scale, where the precision may have and the matrix has a whole number of such blocks."""

    def scales(self, name: str, weights: Float, importance: Float | None = None) -> Float:
        """float32 [rows, blocks] on the bfloat16 grid; `importance` [columns] weighs errors of fitted ones."""
        blocks = in_blocks(name, weights, min(self.longest, self.precision.longest_block))
        if self.step is None:
            return block_scales(blocks, self.precision, importance)
        step = to_bf16_grid(np.array([self.step], np.float32))
        reach = (level_range(self.precision)[1] + 0.5) * (1 - GRID_ERROR)
        widths = np.log2(np.maximum(np.abs(blocks).max(axis=2) / (step * reach), 1)) * WIDENING
        return to_bf16_grid((step * 2.0 ** (np.ceil(widths) / WIDENING)).astype(np.float32))


def round_matrix(name: str, weights: Float, grid: Grid, rounding: Rounding, moments: Float | None) -> BlockMatrix:
    """Round `weights` [rows, columns]; `moments` [columns, columns] are the second moments of what they are multiplied
    with, None of a table that is only looked up, which is rounded to the nearest level."""
    if rounding is Rounding.GPTQ and grid.precision is Precision.BINARY:
        raise ConfigError("binary weights have no level near zero to round to; choose another rounding, or ternary")
    if moments is None or rounding is Rounding.NEAREST:
        return round_on(weights, grid.scales(name, weights), grid.precision)
    scales = grid.scales(name, weights, np.diag(moments))
    if rounding is Rounding.K_QUANT:
        return round_on(weights, scales, grid.precision)
    levels = feedback_of(moments).round(weights, scales, level_range(grid.precision))
    return pack_levels(levels, scales, grid.precision.bits)
