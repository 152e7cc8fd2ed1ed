"""int8 with fixed scales of activations: how a matrix and what it is multiplied with are placed on them.

Smoothing first takes from the activations what a few columns have too much (forge/integers.py). Then their scale leaves
room for more than the calibration had: on the sample, scales that clip a few large numbers to place all others better
diverge 1.1 times as much with 4,000 tokens of calibration and 1.6 times with 500.
"""

from dataclasses import dataclass

from forge.integers import smoothing_of
from forge.quantise import ChannelMatrix, Float, quantise_channels

MARGIN = 1.25
"""Of the largest size, for text that is not the calibration's."""
LEVELS = 127


@dataclass(frozen=True, slots=True)
class StaticMatrix:
    """A matrix [rows, columns], its columns divided by `smoothing` float32 [columns] and quantised; activations times
    `smoothing` are levels of `source_scale`."""

    matrix: ChannelMatrix
    smoothing: Float
    source_scale: float


def static_matrix(weights: Float, largest: Float) -> StaticMatrix:
    """`weights` [rows, columns] for activations whose columns are as large as `largest` [columns]."""
    smoothing = smoothing_of(weights, largest)
    scale = float((largest * smoothing).max()) * MARGIN / LEVELS or 1.0
    return StaticMatrix(quantise_channels(weights / smoothing[None, :]), smoothing, scale)
