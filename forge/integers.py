"""int8 matrices that are multiplied with int8 activations, each row of which is quantised for itself as the graph runs.

A text's numbers depend on its own rows alone, whatever shares its batch; one scale for the whole of the activations
(onnxruntime's DynamicQuantizeMatMul) would be faster by a tenth and make every answer depend on its neighbours.

What a few columns of the activations have too much, and would take from all others of their row, is moved into the
matrix: the source is multiplied by `smoothing` and the columns of the matrix divided by it (SmoothQuant, arXiv
2211.10438). Activations after a GELU are hardly negative: their zero point is low, so that the steps are fine.
"""

from dataclasses import dataclass

import numpy as np
from onnx import TensorProto

from forge.graph import CONTRIB, GraphBuilder
from forge.quantise import Float, to_bf16_grid
from forge.weights import Placed

SMOOTHING = 0.65
"""How much of the activations' unevenness goes into the matrix, 0 to 1: the best of 0.5, 0.65 and 0.8 for
all-MiniLM-L6-v2."""
SYMMETRIC = 128
"""Zero point of activations of either sign. uint8, because x86 has no fast kernel for int8 times int8."""
AFTER_GELU = 24
"""Zero point of activations after a GELU; 16 to 32 are alike."""
GELU_LEAST = -0.1702
"""Least value of a GELU, exact or approximated."""
TINY = 1e-20
"""Scale of a row of zeros."""


@dataclass(frozen=True, slots=True)
class IntegerMatrix:
    """A matrix [rows, columns] in weights.bin: `levels` int8 [columns, rows], `scales` float32 [rows], and `smoothing`
    float32 [columns] when the source is smoothed."""

    levels: Placed
    scales: Placed
    smoothing: Placed | None = None
    zero_point: int = SYMMETRIC


def multiply_integers(b: GraphBuilder, name: str, source: str, matrix: IntegerMatrix) -> str:
    """source [T, columns] times the transposed matrix: [T, rows]."""
    zero, symmetric = matrix.zero_point, matrix.zero_point == SYMMETRIC
    b.constant(f"{name}.zero_point", zero, np.uint8)
    b.constant(f"{name}.step", 1 / (255 - zero), np.float32)
    b.constant(f"{name}.least_scale", TINY if symmetric else -GELU_LEAST / zero, np.float32)
    b.constant(f"{name}.one", 1, np.float32)
    if matrix.smoothing is not None:
        source = b.node("Mul", [source, b.vector(f"{name}.smoothing", matrix.smoothing)], [f"{name}.smoothed"])
    sizes = b.node("Abs", [source], [f"{name}.sizes"]) if symmetric else source
    b.node("ReduceMax", [sizes, b.constant(f"{name}.axis", [-1], np.int64)], [f"{name}.largest"], keepdims=1)
    b.node("Mul", [f"{name}.largest", f"{name}.step"], [f"{name}.stepped"])
    b.node("Max", [f"{name}.stepped", f"{name}.least_scale"], [f"{name}.scale"])
    b.node("Div", [source, f"{name}.scale"], [f"{name}.quotient"])
    b.node("QuantizeLinear", [f"{name}.quotient", f"{name}.one", f"{name}.zero_point"], [f"{name}.integers"])
    levels = matrix.levels.initializer(f"{name}.levels", TensorProto.INT8, matrix.levels.shape)
    b.initializers.append(levels)
    inputs = [f"{name}.integers", levels.name, f"{name}.one", b.vector(f"{name}.scales", matrix.scales)]
    b.node("MatMulIntegerToFloat", [*inputs, f"{name}.zero_point"], [f"{name}.product"], CONTRIB)
    return b.node("Mul", [f"{name}.product", f"{name}.scale"], [name])


def smoothing_of(weights: Float, largest: Float) -> Float:
    """What a source is multiplied by, float32 [columns] on the bfloat16 grid: `largest` are the largest sizes of its
    columns, `weights` [rows, columns] the matrix."""
    sizes = np.maximum(np.abs(weights).max(axis=0), np.float32(1e-9))
    factors = np.maximum(largest, np.float32(1e-6)) ** SMOOTHING / sizes ** (1 - SMOOTHING)
    factors /= np.exp(np.mean(np.log(factors)))
    return to_bf16_grid((1 / factors).astype(np.float32))
