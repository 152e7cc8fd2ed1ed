"""Differences between the same stream of two versions, exact in integer arithmetic.

Packed int4 weights are subtracted nibble by nibble modulo 16, so that a weight which moved by one step is a one in its
own nibble and not a borrow in its neighbour; every other plane byte by byte modulo 256. Requantised on the base's
scales, a fine-tune changes few nibbles, and the difference is mostly zero.
"""

import numpy as np
from numpy.typing import NDArray

from wire.manifest import Dtype

Bytes = NDArray[np.uint8]

LOW, HIGH = np.uint8(0x0F), np.uint8(0xF0)


def subtract(dtype: Dtype, new: Bytes, base: Bytes) -> Bytes:
    """Difference plane such that add(dtype, base, difference) == new; all uint8 [n]."""
    if dtype is not Dtype.U4:
        return new - base
    low: Bytes = (new - base) & LOW
    high: Bytes = ((new & HIGH) - (base & HIGH)) & HIGH
    return low | high


def add(dtype: Dtype, base: Bytes, difference: Bytes) -> Bytes:
    """The new plane from the base's plane and the difference; all uint8 [n]."""
    if dtype is not Dtype.U4:
        return base + difference
    low: Bytes = (base + difference) & LOW
    high: Bytes = ((base & HIGH) + (difference & HIGH)) & HIGH
    return low | high
