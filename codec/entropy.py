"""Order-0 entropy: the bound that every codec of this package is measured against.

H0 = -sum p_i log2 p_i over the histogram of a plane's symbols (Shannon 1948). A codec without context cannot code the
plane in fewer than n * H0 bits.
"""

import numpy as np
from numpy.typing import NDArray


def byte_histogram(data: NDArray[np.uint8]) -> NDArray[np.int64]:
    """How often each byte value occurs, int64 [256]."""
    return np.bincount(data, minlength=256).astype(np.int64)


def nibble_histogram(packed: NDArray[np.uint8]) -> NDArray[np.int64]:
    """How often each nibble occurs in `packed`, two to a byte, int64 [16]."""
    pairs = byte_histogram(packed).reshape(16, 16)
    return np.asarray(pairs.sum(axis=0) + pairs.sum(axis=1), np.int64)


def entropy_bytes(histogram: NDArray[np.int64]) -> float:
    """Order-0 entropy of the counted symbols, in bytes."""
    total = int(histogram.sum())
    if total == 0:
        return 0.0
    counts = histogram[histogram > 0].astype(np.float64)
    return float(np.sum(counts * (np.log2(total) - np.log2(counts))) / 8)
