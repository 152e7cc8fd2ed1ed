"""What a build makes of a matrix, as values: the grids that quantisation-aware training trains on.

int4 is the forge's own quantiser, so that what was trained is what is built, bit for bit. Ternary is -1, 0 or 1 times a
scale per block of 32 on the bfloat16 grid: of a few multiples of the block's mean size the one of least squared error
(TWN, arXiv 1605.04711).
"""

from collections.abc import Mapping
from enum import StrEnum

import numpy as np
import torch
from torch import Tensor

from forge.checkpoint_folder import to_float16
from forge.quantise import BLOCK, Float, quantise_blocks, to_bf16_grid

MULTIPLES = (0.8, 1.0, 1.2, 1.4, 1.6)
"""Of the mean size of a block, tried as its scale; 1.2 to 1.4 is best where weights are normal."""
SMALLEST = np.float32(2.0**-20)
"""Scale of a block of zeros."""
TABLES = ("model.embed_tokens.weight", "lm_head.weight")


class Method(StrEnum):
    """What the matrices of the layers are rounded to; the embedding and the head are int4 in each."""

    INT4 = "int4"
    TERNARY = "ternary"


def rounded_int4(name: str, weights: Float) -> Float:
    """`weights` [rows, columns] as `forge build` ships them in int4."""
    return quantise_blocks(name, weights).dequantise()


def rounded_ternary(weights: Float) -> Float:
    """`weights` [rows, columns], columns a multiple of 32, as one of three values per block."""
    blocks = weights.reshape(-1, BLOCK)
    mean = np.abs(blocks).mean(axis=1, keepdims=True)
    best, least = np.zeros_like(blocks), np.full(mean.shape, np.inf, np.float32)
    for multiple in MULTIPLES:
        scales = np.maximum(to_bf16_grid(mean * np.float32(multiple)), SMALLEST)
        values = np.clip(np.rint(blocks / scales), -1, 1) * scales
        error = np.square(values - blocks).sum(axis=1, keepdims=True)
        best, least = np.where(error < least, values, best), np.minimum(error, least)
    return np.asarray(best.reshape(weights.shape), np.float32)


def on_grid(method: Method, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`parameters` as they ship: matrices rounded from what float16 holds of them, vectors as they are. Gradients pass
    through the rounding as if it were not there (straight-through, arXiv 1308.3432)."""
    return {name: _straight_through(method, name, value) for name, value in parameters.items()}


def _straight_through(method: Method, name: str, value: Tensor) -> Tensor:
    if value.dim() != 2:
        return value
    weights = to_float16(value.detach().numpy())
    tables = name in TABLES or method is Method.INT4
    shipped = torch.from_numpy(rounded_int4(name, weights) if tables else rounded_ternary(weights))
    return value + (shipped - value).detach()
