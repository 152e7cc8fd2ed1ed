"""int8 matrices that are multiplied with int8 activations, on scales found as the graph runs or fixed beforehand.

Found as it runs, each row of activations has a scale of its own. A text's numbers depend on its own rows alone,
whatever shares its batch; one scale for the whole of the activations (onnxruntime's DynamicQuantizeMatMul) would be
faster by a tenth and make every answer depend on its neighbours. Fixed scales, one per matrix that calibration chose
(forge/static.py), spare the search and clip what the calibration did not have.

What a few columns of the activations have too much, and would take from all others of their row, is moved into the
matrix: the source is multiplied by `smoothing` and the columns of the matrix divided by it (SmoothQuant, arXiv
2211.10438). Activations after a GELU are hardly negative: their zero point is low, so that the steps are fine.
"""

from dataclasses import dataclass

import numpy as np
from onnx import TensorProto

from forge.graph_builder import CONTRIB, GraphBuilder, Matrix
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
    float32 [columns] when the source is smoothed; `source_scale` is the fixed scale of the source, if it has one."""

    levels: Placed
    scales: Placed
    smoothing: Placed | None = None
    zero_point: int = SYMMETRIC
    source_scale: float | None = None


def multiply(b: GraphBuilder, name: str, source: str, matrix: Matrix | IntegerMatrix) -> str:
    """source [..., columns] times the transposed matrix: [..., rows]."""
    if isinstance(matrix, Matrix):
        return b.matmul(name, source, matrix)
    if matrix.smoothing is not None:
        source = b.node("Mul", [source, b.vector(f"{name}.smoothing", matrix.smoothing)], [f"{name}.smoothed"])
    return _with_fixed_scale(b, name, source, matrix) if matrix.source_scale else _with_scales(b, name, source, matrix)


def _with_fixed_scale(b: GraphBuilder, name: str, source: str, matrix: IntegerMatrix) -> str:
    b.constant(f"{name}.zero_point", matrix.zero_point, np.uint8)
    b.constant(f"{name}.scale", matrix.source_scale, np.float32)
    b.node("QuantizeLinear", [source, f"{name}.scale", f"{name}.zero_point"], [f"{name}.integers"])
    return _product(b, name, f"{name}.scale", name, matrix)


def _with_scales(b: GraphBuilder, name: str, source: str, matrix: IntegerMatrix) -> str:
    zero, symmetric = matrix.zero_point, matrix.zero_point == SYMMETRIC
    b.constant(f"{name}.zero_point", zero, np.uint8)
    b.constant(f"{name}.step", 1 / (255 - zero), np.float32)
    b.constant(f"{name}.least_scale", TINY if symmetric else -GELU_LEAST / zero, np.float32)
    b.constant(f"{name}.one", 1, np.float32)
    sizes = b.node("Abs", [source], [f"{name}.sizes"]) if symmetric else source
    b.node("ReduceMax", [sizes, b.constant(f"{name}.axis", [-1], np.int64)], [f"{name}.largest"], keepdims=1)
    b.node("Mul", [f"{name}.largest", f"{name}.step"], [f"{name}.stepped"])
    b.node("Max", [f"{name}.stepped", f"{name}.least_scale"], [f"{name}.scale"])
    b.node("Div", [source, f"{name}.scale"], [f"{name}.quotient"])
    b.node("QuantizeLinear", [f"{name}.quotient", f"{name}.one", f"{name}.zero_point"], [f"{name}.integers"])
    product = _product(b, name, f"{name}.one", f"{name}.product", matrix)
    return b.node("Mul", [product, f"{name}.scale"], [name])


def _product(b: GraphBuilder, name: str, source_scale: str, output: str, matrix: IntegerMatrix) -> str:
    levels = matrix.levels.initializer(f"{name}.levels", TensorProto.INT8, matrix.levels.shape)
    b.initializers.append(levels)
    inputs = [f"{name}.integers", levels.name, source_scale, b.vector(f"{name}.scales", matrix.scales)]
    return b.node("MatMulIntegerToFloat", [*inputs, f"{name}.zero_point"], [output], CONTRIB)


def smoothing_of(weights: Float, largest: Float) -> Float:
    """What a source is multiplied by, float32 [columns] on the bfloat16 grid: `largest` are the largest sizes of its
    columns, `weights` [rows, columns] the matrix."""
    sizes = np.maximum(np.abs(weights).max(axis=0), np.float32(1e-9))
    factors = np.maximum(largest, np.float32(1e-6)) ** SMOOTHING / sizes ** (1 - SMOOTHING)
    factors /= np.exp(np.mean(np.log(factors)))
    return to_bf16_grid((1 / factors).astype(np.float32))
