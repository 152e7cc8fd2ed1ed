"""Matrices on their way into weights.bin: quantised, or in float as trained."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from forge.graph import Matrix
from forge.integers import IntegerMatrix, smoothing_of
from forge.quantise import BlockMatrix, Float, Precision, quantise_blocks, quantise_channels
from forge.weights import Placed, WeightsWriter
from wire.manifest import Dtype, Layout


@dataclass(slots=True)
class Placer:
    """Places matrices in `precision`, on the scales of `base_scales` where they fit (see quantise_blocks); those of
    `rounded` as they are there."""

    writer: WeightsWriter
    base_scales: Mapping[str, Float]
    precision: Precision
    rounded: Mapping[str, BlockMatrix] = field(default_factory=dict)

    def matrix(self, name: str, weights: Float) -> Matrix:
        """A matrix [rows, columns] that is multiplied."""
        if name in self.rounded:
            return place_quantised(self.writer, name, self.rounded[name])
        rows, columns = weights.shape
        if self.precision is Precision.FLOAT32:
            dense = self.writer.add(f"{name}.weight", np.ascontiguousarray(weights.T), Layout.F32)
            return Matrix(rows, columns, dense=dense)
        scales = self.base_scales.get(f"{name}.scales")
        return place_quantised(self.writer, name, quantise_blocks(name, weights, scales, precision=self.precision))

    def integers(self, name: str, weights: Float, largest: Float | None, zero_point: int) -> IntegerMatrix:
        """A matrix [rows, columns] that is multiplied as int8; `largest` [columns] are the largest sizes of what it is
        multiplied with, None when that is not smoothed."""
        smoothing = None
        if largest is not None:
            factors = self.base_scales.get(f"{name}.smoothing", smoothing_of(weights, largest))
            weights = weights / factors[None, :]
            smoothing = self.writer.add(f"{name}.smoothing", factors, Layout.F32_BF16_GRID)
        matrix = quantise_channels(weights, self.base_scales.get(f"{name}.scales"))
        levels = self.writer.add(f"{name}.levels", matrix.levels.T, Layout.BYTES, dtype=Dtype.I8)
        scales = self.writer.add(f"{name}.scales", matrix.scales, Layout.F32_BF16_GRID)
        return IntegerMatrix(levels, scales, smoothing, zero_point)

    def table(self, name: str, weights: Float) -> Matrix:
        """A matrix [rows, columns] whose rows are looked up."""
        if self.precision is not Precision.FLOAT32:
            return self.head(name, weights)
        rows, columns = weights.shape
        return Matrix(rows, columns, dense=self.vector(f"{name}.weight", weights))

    def head(self, name: str, weights: Float) -> Matrix:
        """A matrix [words, columns] of logits, in the precision of tables."""
        return replace(self, precision=self.precision.of_tables).matrix(name, weights)

    def vector(self, name: str, values: Float) -> Placed:
        """Values of any shape that stay in float."""
        return self.writer.add(name, values, Layout.F32)


def place_quantised(writer: WeightsWriter, name: str, matrix: BlockMatrix) -> Matrix:
    """Place a quantised matrix as two tensors, `name`.packed and `name`.scales."""
    dtype = {2: Dtype.U2, 4: Dtype.U4, 8: Dtype.U8}[matrix.bits]
    packed = writer.add(f"{name}.packed", matrix.packed, Layout.BYTES, dtype=dtype, shape=matrix.shape)
    scales = writer.add(f"{name}.scales", matrix.scales, Layout.F32_BF16_GRID)
    return Matrix(*matrix.shape, bits=matrix.bits, packed=packed, scales=scales)
