"""int4 and int8 weights in blocks, rounded to int8 with one scale for each output or for each longer block. Pure.

A weight is (level - 2^(bits - 1)) times the scale of its block, levels packed from the low bits of a byte on
(onnxruntime's docs/ContribOperators.md, MatMulNBits). Invariant: a slab of rows at a time is spread to float32, so that
a matrix of any size takes little more memory than its result.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

LARGEST, MIDDLE = 127, 128
TINY = 1e-20
"""Largest weight of a row of zeros."""
SLAB_WEIGHTS = 1 << 20
"""How many weights are float32 at a time."""
LONGEST_BLOCK, SHORTEST_BLOCK = 256, 16
"""Of MatMulNBits's kernels with 8 bits: 1.7 times as fast with blocks of 256 as with 32, and no faster with 512."""

Bytes = NDArray[np.uint8]
Float = NDArray[np.float32]


def by_output(levels: Bytes, scales: Float, bits: int) -> tuple[NDArray[np.int8], Float]:
    """Matrix int8 [K, N] and scales float32 [N] of `levels` uint8 [N, blocks, bytes] and `scales` [N, blocks]."""
    outputs, columns = len(levels), levels[0].size * 8 // bits
    matrix, of_outputs = np.empty((columns, outputs), np.int8), np.empty(outputs, np.float32)
    for rows, weights in _slabs(levels, scales, bits):
        steps = _steps(weights)
        matrix[:, rows] = np.rint(weights / steps[:, None]).T
        of_outputs[rows] = steps
    return matrix, of_outputs


def by_longer_blocks(levels: Bytes, scales: Float, bits: int) -> tuple[Bytes, Float]:
    """The same for a MatMulNBits with 8 bits: levels uint8 [N, blocks, block] and scales float32 [N, blocks]."""
    outputs, columns = len(levels), levels[0].size * 8 // bits
    block = longest_block(columns)
    found = np.empty((outputs, columns // block, block), np.uint8)
    of_blocks = np.empty(found.shape[:2], np.float32)
    for rows, weights in _slabs(levels, scales, bits):
        blocks = weights.reshape(len(weights), -1, block)
        of_blocks[rows] = _steps(blocks)
        found[rows] = np.rint(blocks / of_blocks[rows, :, None]) + MIDDLE
    return found, of_blocks


def longest_block(columns: int) -> int:
    """The longest block that rows of so many columns have a whole number of."""
    block = LONGEST_BLOCK
    while columns % block and block > SHORTEST_BLOCK:
        block //= 2
    return block


def _steps(weights: Float) -> Float:
    """A step for each last axis, by which its largest weight is LARGEST."""
    steps: Float = (np.maximum(np.abs(weights).max(axis=-1), TINY) / LARGEST).astype(np.float32)
    return steps


def _slabs(levels: Bytes, scales: Float, bits: int) -> Iterator[tuple[slice, Float]]:
    """Rows, and their weights float32 [rows, K]."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    outputs, blocks, _ = levels.shape
    count = max(1, SLAB_WEIGHTS * outputs // (levels.size * len(shifts)))
    for start in range(0, outputs, count):
        rows = slice(start, min(start + count, outputs))
        fields = levels[rows, :, :, None] >> shifts & np.uint8((1 << bits) - 1)
        weights = fields.reshape(-1, blocks, levels.shape[2] * len(shifts)).astype(np.float32)
        weights -= np.float32(1 << bits - 1)
        weights *= scales[rows, :, None]
        yield rows, weights.reshape(len(weights), -1)
