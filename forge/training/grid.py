"""What a build makes of a matrix, as values: the grid of a precision, on which quantisation-aware training trains.

It is the forge's own quantiser on what the checkpoint will hold, so that what was trained is what is built.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from forge.checkpoint_folder import to_float16
from forge.quantise import Precision, quantise_blocks

TRAINED = tuple(precision for precision in Precision if precision not in (Precision.FLOAT32, Precision.INT8_STATIC))
"""Precisions that round by weights alone."""
TABLES = ("model.embed_tokens.weight", "lm_head.weight")


def on_grid(precision: Precision, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`parameters` as they ship: matrices rounded from what float16 holds of them, vectors as they are. Gradients pass
    through the rounding as if it were not there (straight-through, arXiv 1308.3432)."""
    return {name: _straight_through(precision, name, value) for name, value in parameters.items()}


def _straight_through(precision: Precision, name: str, value: Tensor) -> Tensor:
    if value.dim() != 2:
        return value
    weights = to_float16(value.detach().numpy())
    stored = precision.of_tables if name in TABLES else precision
    shipped = torch.from_numpy(quantise_blocks(name, weights, precision=stored).dequantise())
    return value + (shipped - value).detach()
