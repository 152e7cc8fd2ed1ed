"""Splitting stored elements into planes of bytes that compress alike, and joining them again.

A bfloat16 value has an 8-bit exponent that straddles its two bytes: low entropy (2.6 bits on trained weights) mixed
with almost random mantissa bits. Split by field, the exponent plane compresses and the rest is stored as it is
(the observation of ZipNN, arXiv 2411.05239).
"""

import numpy as np
from numpy.typing import NDArray

from wire.errors import ArtifactError, Code
from wire.manifest import Layout

Bytes = NDArray[np.uint8]

PLANE_NAMES: dict[Layout, tuple[str, ...]] = {
    Layout.BYTES: ("bytes",),
    Layout.F16: ("high byte", "low byte"),
    Layout.BF16: ("exponent", "sign+mantissa"),
    Layout.F32_BF16_GRID: ("exponent", "sign+mantissa"),
    Layout.F32: ("exponent", "sign+mantissa", "mantissa middle", "mantissa low"),
}

ITEM_BYTES: dict[Layout, int] = {
    Layout.BYTES: 1,
    Layout.F16: 2,
    Layout.BF16: 2,
    Layout.F32_BF16_GRID: 4,
    Layout.F32: 4,
}


def item_count(layout: Layout, size_bytes: int) -> int:
    """Items in a stream of `size_bytes`, which is the size of each of its planes; ArtifactError when one is cut."""
    if size_bytes % ITEM_BYTES[layout]:
        raise ArtifactError(
            Code.UNSUPPORTED, f"{size_bytes} bytes are no whole items of layout {layout}; build the version again"
        )
    return size_bytes // ITEM_BYTES[layout]


def split_planes(layout: Layout, stored: Bytes) -> list[Bytes]:
    """Planes of `stored` (uint8 [n * item bytes], little-endian), each uint8 [n].

    Raises ArtifactError(unsupported) when the bytes do not fit the layout: a length that is no multiple of the item,
    or float32 values off the bfloat16 grid where the layout promises it.
    """
    item_count(layout, stored.size)
    if layout is Layout.BYTES:
        return [stored]
    items = stored.reshape(-1, ITEM_BYTES[layout])
    if layout is Layout.F16:
        return [np.ascontiguousarray(items[:, 1]), np.ascontiguousarray(items[:, 0])]
    if layout is Layout.BF16:
        return _split_top(items[:, 0], items[:, 1])
    if layout is Layout.F32_BF16_GRID:
        if items[:, :2].any():
            raise ArtifactError(Code.UNSUPPORTED, "float32 values are off the bfloat16 grid; use layout f32")
        return _split_top(items[:, 2], items[:, 3])
    low = [np.ascontiguousarray(items[:, 1]), np.ascontiguousarray(items[:, 0])]
    return _split_top(items[:, 2], items[:, 3]) + low


def join_planes(layout: Layout, planes: list[Bytes], out: Bytes) -> None:
    """Write the items of `planes` to `out` (uint8 [n * item bytes]); the inverse of split_planes."""
    if layout is Layout.BYTES:
        out[:] = planes[0]
        return
    items = out.reshape(-1, ITEM_BYTES[layout])
    if layout is Layout.F16:
        items[:, 1], items[:, 0] = planes[0], planes[1]
        return
    exponent, rest = planes[0], planes[1]
    top = items.shape[1] - 1
    items[:, top] = (rest & 0x80) | (exponent >> 1)
    items[:, top - 1] = ((exponent & 1) << 7) | (rest & 0x7F)
    if layout is Layout.F32:
        items[:, 1], items[:, 0] = planes[2], planes[3]
    elif layout is Layout.F32_BF16_GRID:
        items[:, :2] = 0


def _split_top(low: Bytes, high: Bytes) -> list[Bytes]:
    """Exponent, and sign with mantissa, of the two top bytes of a bfloat16 or float32."""
    exponent: Bytes = ((high & np.uint8(0x7F)) << np.uint8(1)) | (low >> np.uint8(7))
    rest: Bytes = (high & np.uint8(0x80)) | (low & np.uint8(0x7F))
    return [exponent, rest]
