"""Matrices on their way into weights.bin: quantised, or in float as trained."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from forge.graph_builder import Matrix
from forge.integers import IntegerMatrix, smoothing_of
from forge.quantise import BLOCK, BlockMatrix, ChannelMatrix, Float, Precision, quantise_blocks, quantise_channels
from forge.static import StaticMatrix
from forge.weights import Placed, WeightsWriter
from wire.manifest import Dtype, Layout

Rounded = Mapping[str, BlockMatrix | StaticMatrix]
"""Matrices that are quantised already, by the names that they are placed under."""


@dataclass(slots=True)
class Placer:
    """Places matrices in `precision`, on the scales of `base_scales` where they fit (see quantise_blocks); those of
    `rounded` as they are there."""

    writer: WeightsWriter
    base_scales: Mapping[str, Float]
    precision: Precision
    rounded: Rounded = field(default_factory=dict)
    longest: int = BLOCK
    """Weights that share a scale, where a matrix has a whole number of such blocks."""

    def product(self, name: str, weights: Float) -> Matrix | IntegerMatrix:
        """A matrix [rows, columns] that is multiplied, and may so be int8-static."""
        rounded = self.rounded.get(name)
        return self._static(name, rounded) if isinstance(rounded, StaticMatrix) else self.matrix(name, weights)

    def matrix(self, name: str, weights: Float) -> Matrix:
        """A matrix [rows, columns] that is multiplied."""
        rounded = self.rounded.get(name)
        if isinstance(rounded, BlockMatrix):
            return place_quantised(self.writer, name, rounded)
        rows, columns = weights.shape
        if self.precision is Precision.FLOAT32:
            dense = self.writer.add(f"{name}.weight", np.ascontiguousarray(weights.T), Layout.F32)
            return Matrix(rows, columns, dense=dense)
        scales = self.base_scales.get(f"{name}.scales")
        matrix = quantise_blocks(name, weights, scales, precision=self.precision, longest=self.longest)
        return place_quantised(self.writer, name, matrix)

    def integers(self, name: str, weights: Float, largest: Float | None, zero_point: int) -> IntegerMatrix:
        """A matrix [rows, columns] that is multiplied as int8; `largest` [columns] are the largest sizes of what it is
        multiplied with, None when that is not smoothed."""
        smoothing = None
        if largest is not None:
            factors = self.base_scales.get(f"{name}.smoothing", smoothing_of(weights, largest))
            weights = weights / factors[None, :]
            smoothing = self.writer.add(f"{name}.smoothing", factors, Layout.F32_BF16_GRID)
        matrix = quantise_channels(weights, self.base_scales.get(f"{name}.scales"))
        return IntegerMatrix(*self._channels(name, matrix), smoothing, zero_point)

    def _static(self, name: str, static: StaticMatrix) -> IntegerMatrix:
        smoothing = self.writer.add(f"{name}.smoothing", static.smoothing, Layout.F32_BF16_GRID)
        return IntegerMatrix(*self._channels(name, static.matrix), smoothing, source_scale=static.source_scale)

    def _channels(self, name: str, matrix: ChannelMatrix) -> tuple[Placed, Placed]:
        levels = self.writer.add(f"{name}.levels", matrix.levels.T, Layout.BYTES, dtype=Dtype.I8)
        return levels, self.writer.add(f"{name}.scales", matrix.scales, Layout.F32_BF16_GRID)

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
    return Matrix(*matrix.shape, bits=matrix.bits, block=matrix.block, packed=packed, scales=scales)
