"""Sparse planes as gaps in Rice code and non-zero symbols: the codec of differences.

With a fraction p of changed symbols the gaps between them are geometric, and Rice code with the right parameter is
within a few hundredths of a bit of the entropy of a geometric source (Rice & Plaunt 1971; Golomb 1966). The non-zero
symbols follow as one Huffman section, or raw when that is smaller. Decoding is vectorised: unary lengths come from the
positions of the one bits, remainders from a reshaped bit array, positions from a cumulative sum.

Layout of a coded section, little-endian:
    symbol_bits u8 (4 or 8), parameter u8 (0..20), flags u8 (bit 0: symbols are a zstd frame), reserved u8 = 0,
    count u32 (changed symbols), quotient_bytes u32, then the parts one after the other:
    quotients   unary, one bits end each: gap >> parameter zeros, then a one; bits least significant first
    remainders  `parameter` bits each, least significant first, packed without padding between them
    symbols     one byte each (8 bits) or two to a byte, low nibble first (4 bits)
"""

import struct

import numpy as np
from numpy.typing import NDArray

from codec.huffman import decode_huffman, encode_huffman
from wire.errors import ArtifactError, Code

Bytes = NDArray[np.uint8]

_HEADER = struct.Struct("<BBBBII")
MAX_PARAMETER = 20


def encode_rice(plane: Bytes, symbol_bits: int) -> bytes:
    """Code `plane` (uint8 [n]) whose symbols are `symbol_bits` (4 or 8) wide and mostly zero."""
    symbols = _unpack_nibbles(plane) if symbol_bits == 4 else plane
    positions = np.flatnonzero(symbols)
    gaps = np.diff(positions, prepend=-1) - 1
    parameter = _best_parameter(gaps)
    quotients = _encode_unary(gaps >> parameter)
    remainders = _encode_remainders(gaps, parameter)
    changed = symbols[positions]
    values = _pack_nibbles(changed) if symbol_bits == 4 else changed
    raw = values.tobytes()
    coded = encode_huffman(raw) if raw else b""
    flags = int(bool(raw) and len(coded) < len(raw))
    header = _HEADER.pack(symbol_bits, parameter, flags, 0, positions.size, len(quotients))
    return header + quotients + remainders + (coded if flags else raw)


def decode_rice(coded: bytes | memoryview, raw_size: int) -> Bytes:
    """The plane, uint8 [raw_size]; ArtifactError(bad_section) when the parts do not fit each other exactly."""
    if len(coded) < _HEADER.size:
        raise _bad("it is shorter than its header")
    symbol_bits, parameter, flags, reserved, count, quotient_bytes = _HEADER.unpack_from(coded)
    if symbol_bits not in (4, 8) or parameter > MAX_PARAMETER or flags > 1 or reserved:
        raise _bad("its header is of an unknown form")
    total = raw_size * 8 // symbol_bits
    remainder_bytes = (count * parameter + 7) // 8
    body = memoryview(coded)[_HEADER.size :]
    if count > total or quotient_bytes + remainder_bytes > len(body):
        raise _bad("its counts exceed its length")
    quotients = _decode_unary(body[:quotient_bytes], count)
    remainders = _decode_remainders(body[quotient_bytes : quotient_bytes + remainder_bytes], count, parameter)
    positions = np.cumsum((quotients << parameter) + remainders + 1) - 1
    if count and positions[-1] >= total:
        raise _bad("a position lies outside the plane")
    value_bytes = (count * symbol_bits + 7) // 8
    rest = body[quotient_bytes + remainder_bytes :]
    if not flags and len(rest) != value_bytes:
        raise _bad("its symbols have the wrong length")
    values = np.frombuffer(decode_huffman(rest, value_bytes) if flags else rest, np.uint8)
    return _place(positions, values, symbol_bits, raw_size)


def _place(positions: NDArray[np.int64], values: Bytes, symbol_bits: int, raw_size: int) -> Bytes:
    plane = np.zeros(raw_size, np.uint8)
    if symbol_bits == 8:
        plane[positions] = values
        return plane
    nibbles = _unpack_nibbles(values)[: positions.size]
    low = (positions & 1) == 0
    # low and high nibbles apart: two symbols of one byte in one fancy assignment would lose the first
    plane[positions[low] >> 1] = nibbles[low]
    plane[positions[~low] >> 1] |= nibbles[~low] << 4
    return plane


def _best_parameter(gaps: NDArray[np.int64]) -> int:
    """The parameter with the fewest bits: sum(gap >> k) + n (k + 1)."""
    if gaps.size == 0:
        return 0
    costs = [int(np.sum(gaps >> k)) + gaps.size * (k + 1) for k in range(MAX_PARAMETER + 1)]
    return int(np.argmin(costs))


def _encode_unary(values: NDArray[np.int64]) -> bytes:
    ends = np.cumsum(values + 1)
    bits = np.zeros(int(ends[-1]) if ends.size else 0, np.uint8)
    bits[ends - 1] = 1
    return np.packbits(bits, bitorder="little").tobytes()


def _decode_unary(data: memoryview, count: int) -> NDArray[np.int64]:
    bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
    ends = np.flatnonzero(bits)
    if ends.size != count or (count and (int(ends[-1]) + 8) // 8 != len(data)) or (not count and len(data)):
        raise _bad("its gaps do not match their count")
    return np.diff(ends, prepend=-1) - 1


def _encode_remainders(gaps: NDArray[np.int64], parameter: int) -> bytes:
    shifts = np.arange(parameter, dtype=np.int64)
    bits = ((gaps[:, None] >> shifts) & 1).astype(np.uint8)
    return np.packbits(bits.ravel(), bitorder="little").tobytes()


def _decode_remainders(data: memoryview, count: int, parameter: int) -> NDArray[np.int64]:
    if parameter == 0:
        return np.zeros(count, np.int64)
    bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little", count=count * parameter)
    weights = np.int64(1) << np.arange(parameter, dtype=np.int64)
    return bits.reshape(count, parameter).astype(np.int64) @ weights


def _unpack_nibbles(packed: Bytes) -> Bytes:
    """uint8 [2 n] of nibbles, low one first."""
    return np.stack([packed & 0x0F, packed >> 4], axis=1).ravel()


def _pack_nibbles(nibbles: Bytes) -> Bytes:
    even = nibbles if nibbles.size % 2 == 0 else np.append(nibbles, np.uint8(0))
    pairs = even.reshape(-1, 2)
    return np.asarray(pairs[:, 0] | (pairs[:, 1] << 4), np.uint8)


def _bad(why: str) -> ArtifactError:
    return ArtifactError(Code.BAD_SECTION, f"Rice section refused: {why}; fetch the artifact again")
