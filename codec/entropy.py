"""Order-0 entropy: the bound that every codec of this package is measured against.

H0 = -sum p_i log2 p_i over the histogram of a plane's symbols (Shannon 1948). A codec without context cannot code the
plane in fewer than n * H0 bits.
"""

import numpy as np
from numpy.typing import NDArray

LOG2_BITS = 20


def byte_histogram(data: NDArray[np.uint8]) -> NDArray[np.int64]:
    """How often each byte value occurs, int64 [256]."""
    return np.bincount(data, minlength=256).astype(np.int64)


def nibble_histogram(packed: NDArray[np.uint8]) -> NDArray[np.int64]:
    """How often each nibble occurs in `packed`, two to a byte, int64 [16]."""
    pairs = byte_histogram(packed).reshape(16, 16)
    return np.asarray(pairs.sum(axis=0) + pairs.sum(axis=1), np.int64)


def entropy_bytes(histogram: NDArray[np.int64]) -> float:
    """Order-0 entropy of the counted symbols, in bytes; the same float on any machine (see log2_fixed)."""
    counts = histogram[histogram > 0]
    if counts.size == 0:
        return 0.0
    total = int(counts.sum())
    spent = log2_fixed(np.array([total]))[0] - log2_fixed(counts)
    return int((counts * spent).sum()) / (8 << LOG2_BITS)


def log2_fixed(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """log2 of `values` (1 to 2^31) in units of 2^-LOG2_BITS, rounded down.

    In integers alone: an encoder decides by it, and floating logarithms differ in their last bits between processors,
    which would make other bytes of the same input. Bit by bit, by squaring (Knuth, TAOCP volume 1, 1.2.2 exercise 25).
    """
    whole = np.frexp(values.astype(np.float64))[1].astype(np.int64) - 1
    mantissa = values.astype(np.uint64) << (31 - whole).astype(np.uint64)
    result = whole
    for _ in range(LOG2_BITS):
        mantissa = mantissa * mantissa >> np.uint64(31)
        carry = mantissa >> np.uint64(32)
        mantissa >>= carry
        result = result << 1 | carry.astype(np.int64)
    return result
