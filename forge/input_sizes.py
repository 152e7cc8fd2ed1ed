"""How large the inputs of a decoder's output matrices are while it reads text."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from forge.open_model import open_model
from forge.progress import Progress
from forge.quantise import Float


@dataclass(frozen=True, slots=True)
class InputSizes:
    """Root mean squares over all tokens: `attention` float32 [layers, heads * head_size], what leaves the heads, and
    `mlp` float32 [layers, mlp_size], what the down projection takes."""

    attention: Float
    mlp: Float


def measure_inputs(source: Path, windows: list[list[int]], progress: Progress) -> InputSizes:
    """Read `windows` of tokens with the checkpoint `source`. Raises ConfigError when one is not of its tokens."""
    with open_model(source) as model:
        fitting, a = model.fit(windows), model.architecture
        names = [f"layers.{i}.{part}" for part in ("output", "down") for i in range(a.layers)]
        squares = [np.zeros(model.matrix(name).shape[1]) for name in names]
        tokens = 0
        for number, window in enumerate(fitting):
            progress("calibrate", number, len(fitting))
            tokens += len(window)
            for sum_, rows in zip(squares, model.inputs(window, names), strict=True):
                sum_ += np.square(rows, dtype=np.float64).sum(axis=0)
    sizes = [np.sqrt(total / tokens).astype(np.float32) for total in squares]
    return InputSizes(np.stack(sizes[: a.layers]), np.stack(sizes[a.layers :]))
