"""What may be done with each matrix, and what that costs: bits by entropy, loss by its error and its sensitivity."""

from collections.abc import Iterator

import numpy as np

from codec.entropy import byte_histogram, entropy_bytes
from forge.budget import Option
from forge.quantise import Float, Precision, round_on
from forge.rounding import Grid

STEPS_PER_DOUBLING = 8
FINEST, COARSEST = 2.0**-5, 3.0
"""Even steps that are tried, in standard deviations of the matrix."""
SEEN_WEIGHTS = 1 << 17
"""Of a larger matrix some rows stand for all."""
FITTED = (Precision.INT8, Precision.INT4, Precision.INT2, Precision.TERNARY)
STEPPED = (Precision.INT8, Precision.INT4, Precision.INT2)
"""In the longest blocks, which kernels run fastest: nearly all have the same scale (docs/adr/0018)."""


def options_of(name: str, weights: Float, sensitivity: float, gain: float) -> list[Option]:
    """Every grid for `weights` [rows, columns]; `sensitivity` is the loss per mean squared error, of which the share
    `gain` remains after feedback where levels are even. On fitted scales most blocks end in a clipped level, which no
    other column makes up for."""
    stride = -(-weights.size // SEEN_WEIGHTS)
    seen = np.ascontiguousarray(weights[::stride])
    return [
        _priced(name, seen, grid, weights.size, sensitivity if grid.step is None else sensitivity * gain)
        for grid in _grids(float(weights.std()))
    ]


def _grids(deviation: float) -> Iterator[Grid]:
    yield from (Grid(precision) for precision in FITTED)
    count = int(np.log2(COARSEST / FINEST) * STEPS_PER_DOUBLING)
    for k in range(count + 1):
        step = max(deviation, 1e-9) * FINEST * 2.0 ** (k / STEPS_PER_DOUBLING)
        yield from (Grid(precision, step, precision.longest_block) for precision in STEPPED)


def _priced(name: str, seen: Float, grid: Grid, size: int, sensitivity: float) -> Option:
    scales = grid.scales(name, seen)
    matrix = round_on(seen, scales, grid.precision)
    error = float(np.mean(np.square(matrix.dequantise() - seen)))
    high = (scales.view(np.uint32) >> 16).astype(np.uint16)
    symbols = (matrix.levels().ravel(), (high >> 7).astype(np.uint8).ravel(), (high & 0x7F).astype(np.uint8).ravel())
    coded = [8 * entropy_bytes(byte_histogram(plane)) for plane in symbols]
    return Option(grid, sum(coded) / seen.size * size, grid.precision.bits * size, sensitivity * error)
