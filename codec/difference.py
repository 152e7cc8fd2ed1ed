"""Differences between the same stream of two versions, exact in integer arithmetic.

Packed int4 weights are subtracted nibble by nibble modulo 16, so that a weight which moved by one step is a one in its
own nibble and not a borrow in its neighbour; every other plane byte by byte modulo 256. Requantised on the base's
scales, a fine-tune changes few nibbles, and the difference is mostly zero.
"""

import numpy as np
from numpy.typing import NDArray

from codec.planes import Bytes
from wire.manifest import Dtype

_BLOCK_WORDS = 1 << 13
_TOP = np.uint64(0x8888888888888888)
_REST = np.uint64(0x7777777777777777)


def symbol_bits(dtype: Dtype) -> int:
    """Width of the symbols that differences of this type are made of: nibbles for u4, else bytes."""
    return 4 if dtype is Dtype.U4 else 8


def subtract(dtype: Dtype, new: Bytes, base: Bytes) -> Bytes:
    """Difference plane such that add(dtype, base, difference) == new; all uint8 [n]."""
    if symbol_bits(dtype) == 8:
        return new - base
    x, y = _words(new), _words(base)
    return _bytes(((x | _TOP) - (y & _REST)) ^ (~(x ^ y) & _TOP), new.size)


def add(dtype: Dtype, base: Bytes, difference: Bytes) -> Bytes:
    """The new plane from the base's plane and the difference; all uint8 [n]."""
    if symbol_bits(dtype) == 8:
        return base + difference
    x, y = _words(base), _words(difference)
    total = np.empty_like(x)
    for start in range(0, x.size, _BLOCK_WORDS):  # what lies in between stays in the cache
        a, b, out = (words[start : start + _BLOCK_WORDS] for words in (x, y, total))
        np.add(a & _REST, b & _REST, out=out)
        out ^= (a ^ b) & _TOP
    return _bytes(total, base.size)


def _words(data: Bytes) -> NDArray[np.uint64]:
    """Sixteen nibbles to a word, so that one operation treats them all; carries stop at each nibble's top bit
    (Warren, Hacker's Delight, section 2-18)."""
    if data.size % 8:
        data = np.concatenate([data, np.zeros(-data.size % 8, np.uint8)])
    return data.view(np.uint64)


def _bytes(words: NDArray[np.uint64], size_bytes: int) -> Bytes:
    return words.view(np.uint8)[:size_bytes]
