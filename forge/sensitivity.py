"""How much an error in each matrix costs the model, measured: one matrix is rounded at a time while it reads text."""

from collections.abc import Sequence

import numpy as np

from forge.evaluate import divergences, log_probabilities
from forge.open_model import OpenModel
from forge.progress import Progress
from forge.quantise import Float

PROBE_STEP = 0.5
"""Step of the rounding that is tried, in standard deviations of the matrix: enough to be seen in float32, and still so
little that divergence grows with its square."""
ROW_STRIDE = 4
"""Of each window every fourth token's distribution is compared: a head of 49,152 words costs more than the rest."""


def measure_sensitivity(model: OpenModel, windows: Sequence[Sequence[int]], progress: Progress) -> dict[str, float]:
    """By matrix: mean KL divergence from the trained model in nats, per mean squared error of the matrix's weights."""
    rows = [range(ROW_STRIDE - 1, len(window), ROW_STRIDE) or range(len(window)) for window in windows]
    trained: list[Float] = [
        log_probabilities(model.logits(window, {}, kept)).astype(np.float32)
        for window, kept in zip(windows, rows, strict=True)
    ]
    found = {}
    for number, name in enumerate(model.names):
        progress("measure sensitivity", number, len(model.names))
        weights = model.matrix(name)
        rounded = _rounded(weights)
        found_divergences = [
            divergences(reference, log_probabilities(model.logits(window, {name: rounded}, kept)))
            for window, kept, reference in zip(windows, rows, trained, strict=True)
        ]
        error = float(np.mean(np.square(rounded - weights)))
        found[name] = max(float(np.mean(np.concatenate(found_divergences))), 0.0) / error if error else 0.0
    return found


def _rounded(weights: Float) -> Float:
    step = np.float32(PROBE_STEP * float(weights.std()) or 1.0)
    return np.asarray(np.rint(weights / step) * step, np.float32)
