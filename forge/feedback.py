"""Rounding a matrix column by column, each making up for what those before it did wrong (GPTQ, arXiv 2210.17323).

What counts is the error of the product: tr(E G E'), E the error of the matrix and G the second moments of what it is
multiplied with. Written with the upper Cholesky factor U of G's inverse this is the sum of (e_k / U_kk)^2 over columns,
e_k the error of column k after those before it have been made up for as well as the later columns can.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from forge.quantise import Float

Double = NDArray[np.float64]
DAMPING = 0.01
"""Share of the mean second moment that is added to each: text of a few thousand tokens leaves directions unseen."""
PANEL = 64
"""Columns after which the errors go to all later ones at once, as a matrix product."""


@dataclass(frozen=True, slots=True)
class Feedback:
    """U, float32 [columns, columns], of the second moments of one matrix's inputs."""

    factor: Float
    gain: float
    """Error of the product against that of rounding each weight for itself, when levels are fine; 1 is no gain."""

    def round(self, weights: Float, scales: Float, levels: tuple[int, int]) -> Float:
        """Levels about zero, float32 [rows, columns], of `weights` on `scales` [rows, blocks]; `levels` are the
        lowest and the highest."""
        rest = np.ascontiguousarray(weights.T, np.float32)  # a column is contiguous
        steps = np.ascontiguousarray(scales.T, np.float32)
        rounded, block = np.empty_like(rest), len(rest) // len(steps)
        for start in range(0, len(rest), PANEL):
            end = min(start + PANEL, len(rest))
            errors = np.empty((end - start, rest.shape[1]), np.float32)
            for k in range(start, end):
                step = steps[k // block]
                rounded[k] = np.clip(np.rint(rest[k] / step), *levels)
                errors[k - start] = error = (rest[k] - rounded[k] * step) / self.factor[k, k]
                rest[k + 1 : end] -= self.factor[k, k + 1 : end, None] * error
            rest[end:] -= self.factor[start:end, end:].T @ errors
        return np.ascontiguousarray(rounded.T)


def feedback_of(moments: Float) -> Feedback:
    """The feedback for inputs of the second moments `moments`, [columns, columns]."""
    damped = moments.astype(np.float64)
    diagonal = np.einsum("ii->i", damped)
    mean = float(diagonal.mean())
    diagonal += DAMPING * mean if mean > 0 else 1.0
    factor = np.linalg.cholesky(np.linalg.inv(damped)).T
    gain = float(np.mean(np.diag(factor) ** -2.0) / diagonal.mean())
    return Feedback(factor.astype(np.float32), gain)
