"""Few bits on scales of the bfloat16 grid: by blocks for what is decoded or looked up, by channels for encoders.

A row of K weights is cut into blocks of 32 or more; a block stores q = round(w / s) in [-8, 7] as q + 8, of int8 in
[-128, 127] as q + 128, of what has two bits in [-2, 1] as q + 2, and one scale s. The scale is rounded to bfloat16
*before* quantising: the error does not change and a scale costs half the bytes (measured: 0.324 against 0.824 bits per
weight).
Of int4, among a few shrunken scales the one with the least squared error is kept, which clips a block's largest weight
a little to place the others better. With two bits levels are so few that every scale tried is fitted once more, by
least squares, to the levels that it gave. With `importance` squared errors count by what their column is multiplied
with, as in llama.cpp's k-quants (quantize_row_q4_K with an importance matrix).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from wire.errors import ArtifactError, Code

Float = NDArray[np.float32]
Bytes = NDArray[np.uint8]

BLOCK = 32
BLOCKS = (BLOCK, 64, 128, 256)
"""How many weights may share a scale."""
SHRINKS = (1.0, 0.97, 0.94, 0.91, 0.88, 0.85, 0.82)
"""Shares of absmax / 7 that are tried as scale; int8 clips nothing, its error is small enough."""
STARTS = (1.0, 0.85, 0.7, 0.6, 0.5, 0.4, 0.3)
"""Shares of absmax from which the scale of two bits is fitted."""
SMALLEST = np.float32(2.0**-20)
"""Scale of a block of zeros."""


class Precision(StrEnum):
    """How matrices are stored."""

    FLOAT32 = "float32"
    INT8 = "int8"
    INT8_STATIC = "int8-static"
    """Of decoders: a scale per row, and activations in int8 on scales that calibration fixed (forge/static.py)."""
    INT4 = "int4"
    INT2 = "int2"
    TERNARY = "ternary"
    """-1, 0 or 1 times the scale, in two bits."""
    BINARY = "binary"
    """-1 or 1 times the scale, in two bits, which cost one on the wire."""

    @property
    def bits(self) -> int:
        """Bits of a stored weight, without its share of a scale."""
        match self:
            case Precision.FLOAT32:
                return 32
            case Precision.INT8 | Precision.INT8_STATIC:
                return 8
            case Precision.INT4:
                return 4
        return 2

    @property
    def longest_block(self) -> int:
        """Most weights that share a scale: of two bits onnxruntime has no fast kernel for 256 (11 times as slow)."""
        return 128 if self.bits == 2 else BLOCKS[-1]

    @property
    def of_tables(self) -> "Precision":
        """What the embedding and the head are stored in: two bits would cost them more than they save, and rows that
        are looked up are multiplied with nothing."""
        if self is Precision.INT8_STATIC:
            return Precision.INT8
        return Precision.INT4 if self.bits == 2 else self


@dataclass(frozen=True, slots=True)
class BlockMatrix:
    """A quantised matrix [rows, columns]; `packed` uint8 [rows, columns * bits / 8], low bits first; `scales`
    float32 [rows, blocks] on the bfloat16 grid."""

    packed: Bytes
    scales: Float
    bits: int = 4

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of the matrix."""
        return self.packed.shape[0], self.packed.shape[1] * 8 // self.bits

    @property
    def block(self) -> int:
        """Weights that share a scale."""
        return int(self.shape[1] // self.scales.shape[1])

    def levels(self) -> Bytes:
        """uint8 [rows, columns], what stands for 0 included."""
        levels = np.empty(self.shape, np.uint8)
        for i in range(per := 8 // self.bits):
            levels[:, i::per] = self.packed >> self.bits * i & (1 << self.bits) - 1
        return levels

    def dequantise(self) -> Float:
        """float32 [rows, columns]: what the kernels compute with."""
        levels = self.levels().astype(np.float32) - _zero_point(self.bits)
        blocks = levels.reshape(*self.scales.shape, self.block)
        return np.asarray((blocks * self.scales[:, :, None]).reshape(self.shape), np.float32)


def quantise_blocks(
    name: str, weights: Float, base_scales: Float | None = None, *, precision: Precision = Precision.INT4,
    longest: int = BLOCK,
) -> BlockMatrix:  # fmt: skip
    """Quantise `weights` [rows, columns] in blocks of `longest`, or of as many as the precision may have and divide the
    columns; with `base_scales` a
    block of int8 or int4 keeps the base's scale unless that would clip it, so that the difference to the base stays
    sparse.

    Raises ArtifactError(unsupported) when columns are no multiple of 32.
    """
    blocks = in_blocks(name, weights, min(longest, precision.longest_block))
    bits = precision.bits
    scales = block_scales(blocks, precision)
    if base_scales is not None and base_scales.shape == scales.shape and bits > 2:
        fits = np.abs(blocks).max(axis=2) <= base_scales * (_zero_point(bits) + 0.5)
        scales = np.where(fits & (base_scales > 0), base_scales, scales)
    return round_on(weights, scales, precision)


def round_on(weights: Float, scales: Float, precision: Precision) -> BlockMatrix:
    """`weights` [rows, columns] on the nearest levels of given `scales` [rows, blocks]."""
    levels = _rounded(weights.reshape(*scales.shape, -1), scales, precision)
    return pack_levels(levels.reshape(weights.shape), scales, precision.bits)


def in_blocks(name: str, weights: Float, longest: int = BLOCK) -> Float:
    """`weights` [rows, columns] as [rows, blocks, block], of `longest` weights or half as many until they divide.
    Raises ArtifactError(unsupported) naming the tensor when not even BLOCK divides them."""
    rows, columns = weights.shape
    if columns % BLOCK:
        raise ArtifactError(
            Code.UNSUPPORTED,
            f"tensor {name} has {columns} columns, no multiple of {BLOCK}; keep it in float or pad the model",
        )
    block = min(longest, columns & -columns)  # which is the largest power of two in it
    return weights.reshape(rows, columns // block, block)


def pack_levels(levels: Float, scales: Float, bits: int) -> BlockMatrix:
    """Levels about zero [rows, columns] in `bits` each, and their scales [rows, blocks]."""
    stored = (levels + _zero_point(bits)).astype(np.uint8)
    per = 8 // bits
    packed: Bytes = np.zeros((levels.shape[0], levels.shape[1] // per), np.uint8)
    for i in range(per):
        packed |= stored[:, i::per] << np.uint8(bits * i)
    return BlockMatrix(packed, scales, bits)


def level_range(precision: Precision) -> tuple[int, int]:
    """The lowest and the highest level about zero."""
    zero = _zero_point(precision.bits)
    return -1 if precision in (Precision.TERNARY, Precision.BINARY) else -zero, zero - 1


@dataclass(frozen=True, slots=True)
class ChannelMatrix:
    """A quantised matrix [rows, columns]: `levels` int8, -127 to 127; `scales` float32 [rows] on the bfloat16 grid."""

    levels: NDArray[np.int8]
    scales: Float

    def dequantise(self) -> Float:
        """float32 [rows, columns]: what the kernels compute with."""
        return self.levels * self.scales[:, None]


def quantise_channels(weights: Float, base_scales: Float | None = None) -> ChannelMatrix:
    """Quantise `weights` [rows, columns] to int8 with one scale per row; `base_scales` as in quantise_blocks."""
    largest = np.abs(weights).max(axis=1)
    scales = to_bf16_grid(np.where(largest > 0, largest / 127, np.float32(2.0**-20)).astype(np.float32))
    if base_scales is not None and base_scales.shape == scales.shape:
        scales = np.where((base_scales > 0) & (largest <= base_scales * 127.5), base_scales, scales)
    levels = np.clip(np.rint(weights / scales[:, None]), -127, 127).astype(np.int8)
    return ChannelMatrix(levels, scales)


def to_bf16_grid(values: Float) -> Float:
    """`values` rounded to the nearest bfloat16 (ties to even), as float32."""
    bits = values.astype(np.float32).view(np.uint32)
    rounded = bits + 0x7FFF + ((bits >> 16) & 1)
    return (rounded & np.uint32(0xFFFF0000)).view(np.float32)


def _zero_point(bits: int) -> int:
    """What stands for 0, in onnxruntime's operations too when they are given none."""
    return 1 << (bits - 1)


def block_scales(blocks: Float, precision: Precision, importance: Float | None = None) -> Float:
    """The scale of least squared error for each block of `blocks` [rows, blocks, block], float32 [rows, blocks] on the
    bfloat16 grid; `importance` float32 [blocks * block] weighs the errors."""
    weighed = np.ones(blocks.shape[1:], np.float32) if importance is None else importance.reshape(blocks.shape[1:])
    return (_fitted_scales if precision.bits == 2 else _best_scales)(blocks, precision, weighed)


def _best_scales(blocks: Float, precision: Precision, importance: Float) -> Float:
    """Of int4 or int8."""
    largest = np.abs(blocks).max(axis=2)
    highest = _zero_point(precision.bits) - 1
    full = np.where(largest > 0, largest / highest, SMALLEST).astype(np.float32)
    shrinks = SHRINKS if precision is Precision.INT4 else SHRINKS[:1]
    return _least_error(blocks, (to_bf16_grid(full * np.float32(shrink)) for shrink in shrinks), precision, importance)


def _fitted_scales(blocks: Float, precision: Precision, importance: Float) -> Float:
    """Of two bits. A scale of int2 may be negative: its levels are not symmetric."""

    def tried() -> Iterator[Float]:
        largest = np.abs(blocks).max(axis=2)
        for start in STARTS:
            for sign in (1, -1) if precision is Precision.INT2 else (1,):
                scales = np.where(largest > 0, to_bf16_grid(largest * np.float32(sign * start)), SMALLEST)
                yield scales
                rounded = _rounded(blocks, scales, precision)
                square = (np.square(rounded) * importance).sum(axis=2)
                fitted = to_bf16_grid((blocks * rounded * importance).sum(axis=2) / np.where(square > 0, square, 1))
                yield np.where(np.abs(fitted) > SMALLEST, fitted, SMALLEST)

    return _least_error(blocks, tried(), precision, importance)


def _least_error(blocks: Float, candidates: Iterable[Float], precision: Precision, importance: Float) -> Float:
    """Of the candidates, float32 [rows, blocks] each, the one of least error per block, weighed by `importance`
    [blocks, block]; the first of equals."""
    best = np.zeros(blocks.shape[:2], np.float32)
    least = np.full(best.shape, np.inf, np.float32)
    for scales in candidates:
        difference = _rounded(blocks, scales, precision) * scales[:, :, None] - blocks
        error = (np.square(difference) * importance).sum(axis=2)
        better = error < least
        best, least = np.where(better, scales, best), np.where(better, error, least)
    return np.asarray(best, np.float32)


def _rounded(blocks: Float, scales: Float, precision: Precision) -> Float:
    """Levels of `blocks` [rows, blocks, block] about zero, as float32."""
    quotient = blocks / scales[:, :, None]
    if precision is Precision.BINARY:
        return np.where(quotient < 0, np.float32(-1), np.float32(1))
    zero = _zero_point(precision.bits)
    lowest = -1 if precision is Precision.TERNARY else -zero
    return np.asarray(np.clip(np.rint(quotient), lowest, zero - 1), np.float32)


@dataclass(frozen=True, slots=True)
class ChangeFidelity:
    """How much of a fine-tune's change dW survives quantisation; MSE alone cannot see a deleted fine-tune."""

    cosine: float
    sign_agreement: float
    """Share of the weights whose quantised change is not zero and has the sign of the true change."""
    changed: float


def change_fidelity(true_change: Float, shipped_change: Float) -> ChangeFidelity:
    """Compare the change of the float weights with the change of the dequantised ones."""
    a, b = true_change.ravel().astype(np.float64), shipped_change.ravel().astype(np.float64)
    norm = float(np.linalg.norm(a) * np.linalg.norm(b))
    moved = b != 0
    agree = float(np.mean(np.sign(a[moved]) == np.sign(b[moved]))) if moved.any() else 1.0
    return ChangeFidelity(float(a @ b) / norm if norm else 1.0, agree, float(np.mean(moved)))
