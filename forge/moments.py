"""What a decoder's matrices are multiplied with while it reads text: second moments, or the largest sizes."""

from collections.abc import Sequence

import numpy as np

from forge.open_model import OpenModel
from forge.progress import Progress
from forge.quantise import Float


def measure_moments(model: OpenModel, windows: Sequence[Sequence[int]], progress: Progress) -> dict[str, Float]:
    """The mean of x x' over all tokens x, float32 [columns, columns], by the name of each matrix that is multiplied."""
    names = model.multiplied
    sums: dict[str, Float] = {}
    tokens = 0
    for number, window in enumerate(windows):
        progress("calibrate", number, len(windows))
        tokens += len(window)
        for name, rows in zip(names, model.inputs(window, names), strict=True):
            product = rows.T @ rows
            sums[name] = product if name not in sums else sums[name] + product
    return {name: np.asarray(total / np.float32(tokens), np.float32) for name, total in sums.items()}


def measure_largest(model: OpenModel, windows: Sequence[Sequence[int]], progress: Progress) -> dict[str, Float]:
    """The largest size of each column of what each matrix is multiplied with, float32 [columns], over all tokens."""
    names = model.multiplied
    found: dict[str, Float] = {}
    for number, window in enumerate(windows):
        progress("calibrate", number, len(windows))
        for name, rows in zip(names, model.inputs(window, names), strict=True):
            sizes = np.abs(rows).max(axis=0)
            found[name] = sizes if name not in found else np.maximum(found[name], sizes)
    return found
