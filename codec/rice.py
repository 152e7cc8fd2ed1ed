"""The codec `rice`: gaps between non-zero symbols in Rice code, then the symbols. Made for sparse differences.

With a share p of changed symbols the gaps are geometric, and Rice code with the right parameter stays within a few
hundredths of a bit of their entropy (Rice and Plaunt 1971; Golomb 1966). The changed symbols are mostly +1 or -1, so
each is an index into a small palette; the few others are exceptions, placed among the events by gaps of their own.

Layout of a coded section, little-endian, bit fields least significant bit first, every part padded to a whole byte:
    symbol_bits u8 (4 or 8), parameter u8, palette_bits u8, exception_parameter u8 (parameters 0..20, palette_bits 0..4)
    events u32, exceptions u32
    palette               2^palette_bits symbols, one byte each
    remainders            events x parameter bits: gap mod 2^parameter
    exception remainders  exceptions x exception_parameter bits: the same of the gaps between exceptions
    indices               (events - exceptions) x palette_bits bits
    exception symbols     one byte each
    quotients             unary: gap >> parameter zeros and a one, for every event, then for every exception
A gap counts the zero symbols (or the palette events) since the last event (exception). Invariant: decoding writes only
inside the plane, and its arrays are bounded by a quarter of the plane's symbols, whatever the input.
"""

import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from codec.planes import Bytes
from wire.errors import ArtifactError, Code

Integers = NDArray[np.int64]

MAX_PARAMETER = 20
MAX_PALETTE_BITS = 4
DENSITY_LIMIT = 4
"""At most one symbol in this many may be non-zero: beyond, other codecs are smaller, and memory stays bounded."""

_SPARSE = 32
"""With more than one event in this many bytes, unpacked nibbles are faster to fill than the bytes of events to find."""

_HEADER = struct.Struct("<BBBBII")


@dataclass(frozen=True, slots=True)
class _Header:
    symbol_bits: int
    parameter: int
    palette_bits: int
    exception_parameter: int
    events: int
    exceptions: int


def encode_rice(plane: Bytes, symbol_bits: int) -> bytes | None:
    """Code `plane` (uint8 [n]) of symbols `symbol_bits` (4 or 8) wide; None when it is not sparse."""
    symbols = _unpack_nibbles(plane) if symbol_bits == 4 else plane
    positions = np.flatnonzero(symbols)
    if positions.size * DENSITY_LIMIT > symbols.size:
        return None
    palette, indices, odd = _choose_palette(symbols[positions], symbol_bits)
    gaps, exception_gaps = _gaps(positions), _gaps(odd)
    parameter, exception_parameter = _best_parameter(gaps), _best_parameter(exception_gaps)
    palette_bits = palette.size.bit_length() - 1
    header = _HEADER.pack(symbol_bits, parameter, palette_bits, exception_parameter, positions.size, odd.size)
    quotients = np.concatenate([gaps >> parameter, exception_gaps >> exception_parameter])
    return b"".join(
        [
            header,
            palette.tobytes(),
            _pack_fields(gaps, parameter),
            _pack_fields(exception_gaps, exception_parameter),
            _pack_fields(indices, palette_bits),
            symbols[positions[odd]].tobytes(),
            _pack_unary(quotients),
        ]
    )


def decode_rice_into(coded: bytes, out: Bytes) -> None:
    """Decode into `out` (uint8 [n]), every byte of it. Raises ArtifactError(bad_section) unless all parts fit."""
    header = _parse_header(coded, out.size)
    events, exceptions = header.events, header.exceptions
    body = np.frombuffer(coded, np.uint8)[_HEADER.size :]
    sizes = (
        1 << header.palette_bits,
        _field_bytes(events, header.parameter),
        _field_bytes(exceptions, header.exception_parameter),
        _field_bytes(events - exceptions, header.palette_bits),
        exceptions,
    )
    ends = np.cumsum(sizes)
    if ends[-1] > body.size:
        raise _bad("its counts exceed its length")
    palette, low, exception_low, packed_indices, odd_symbols, unary = np.split(body, ends)
    quotients = _unpack_unary(unary, events + exceptions)
    total = out.size * 8 // header.symbol_bits
    positions = _positions(quotients[:events], _unpack_fields(low, header.parameter, events), header.parameter, total)
    values = palette.take(_unpack_fields(packed_indices, header.palette_bits, events - exceptions))
    if exceptions:
        parameter = header.exception_parameter
        remainders = _unpack_fields(exception_low, parameter, exceptions)
        values = _insert(values, _positions(quotients[events:], remainders, parameter, events), odd_symbols)
    _place(positions, values, header.symbol_bits, out)


def _parse_header(coded: bytes, size_bytes: int) -> _Header:
    if len(coded) < _HEADER.size:
        raise _bad("it is shorter than its header")
    header = _Header(*_HEADER.unpack_from(coded))
    if header.symbol_bits not in (4, 8) or header.palette_bits > MAX_PALETTE_BITS:
        raise _bad("its symbols are of an unknown form")
    if max(header.parameter, header.exception_parameter) > MAX_PARAMETER:
        raise _bad("a parameter is out of range")
    if header.events * DENSITY_LIMIT > size_bytes * 8 // header.symbol_bits or header.exceptions > header.events:
        raise _bad("it claims too many events")
    return header


def _choose_palette(symbols: Bytes, symbol_bits: int) -> tuple[Bytes, Integers, Integers]:
    """Palette, palette index of every event in it, and numbers of the events that are exceptions, by least cost."""
    counts = np.bincount(symbols, minlength=1 << symbol_bits)
    order = np.argsort(-counts, kind="stable")
    covered = np.cumsum(counts[order])

    def cost(bits: int) -> int:
        inside = int(covered[(1 << bits) - 1])
        outside = symbols.size - inside
        gap_bits = (symbols.size // outside).bit_length() + 1 if outside else 0
        return 8 * (1 << bits) + inside * bits + outside * (8 + gap_bits)

    bits = min(range(min(MAX_PALETTE_BITS, symbol_bits) + 1), key=cost)
    palette = order[: 1 << bits].astype(np.uint8)
    rank = np.full(256, -1, np.int64)
    rank[palette] = np.arange(palette.size)
    ranks = rank[symbols]
    return palette, ranks[ranks >= 0], np.flatnonzero(ranks < 0)


def _gaps(positions: Integers) -> Integers:
    return np.diff(positions, prepend=-1) - 1


def _positions(quotients: Integers, remainders: Integers, parameter: int, total: int) -> Integers:
    """Positions below `total` from the two halves of their gaps."""
    if quotients.size == 0:
        return quotients
    if int(quotients.max()) > total >> parameter:
        raise _bad("a position lies outside the plane")
    positions = np.cumsum((quotients << parameter) + remainders + 1) - 1
    if positions[-1] >= total:
        raise _bad("a position lies outside the plane")
    return positions


def _insert(values: Bytes, places: Integers, symbols: Bytes) -> Bytes:
    """`values` with `symbols` inserted so that they stand at `places` of the result."""
    merged = np.empty(values.size + symbols.size, np.uint8)
    inside = np.ones(merged.size, np.bool_)
    inside[places] = False
    merged[inside] = values
    merged[places] = symbols
    return merged


def _place(positions: Integers, values: Bytes, symbol_bits: int, out: Bytes) -> None:
    if symbol_bits == 8:
        out[:] = 0
        out[positions] = values
        return
    if values.size and int(values.max()) > 15:
        raise _bad("a nibble exceeds 15")
    if positions.size * _SPARSE > out.size:
        nibbles = np.zeros((out.size, 2), np.uint8)
        nibbles.reshape(-1)[positions] = values
        pairs = nibbles.view("<u2").reshape(-1)
        pairs |= pairs >> 4
        out[:] = pairs.astype(np.uint8)
        return
    out[:] = 0
    # Low and high nibbles apart: two symbols of one byte in one assignment by index would lose the first.
    high = (positions & 1).astype(np.bool_)
    low = ~high
    positions = positions >> 1
    out[positions[low]] = values[low]
    out[positions[high]] |= values[high] << 4


def _best_parameter(gaps: Integers) -> int:
    """The parameter k with the fewest bits, sum(gap >> k) + n (k + 1); it lies within 2 of log2 of the mean."""
    if gaps.size == 0:
        return 0
    near = int(gaps.mean()).bit_length()
    nearby = range(max(0, near - 2), min(MAX_PARAMETER, near + 1) + 1)
    return min(nearby, key=lambda k: int((gaps >> k).sum()) + gaps.size * (k + 1))


def _pack_unary(quotients: Integers) -> bytes:
    ends = np.cumsum(quotients + 1)
    bits = np.zeros(int(ends[-1]) if ends.size else 0, np.uint8)
    bits[ends - 1] = 1
    return np.packbits(bits, bitorder="little").tobytes()


def _unpack_unary(data: Bytes, count: int) -> Integers:
    """`count` quotients. The ones are counted before any array of their number is made."""
    if int(np.bitwise_count(data).sum(dtype=np.int64)) != count or (data.size and data[-1] == 0):
        raise _bad("its gaps do not match its counts")
    ends = np.flatnonzero(np.unpackbits(data, bitorder="little").view(np.bool_))
    return np.diff(ends, prepend=-1) - 1


def _field_bytes(count: int, width: int) -> int:
    return (count * width + 7) // 8


def _pack_fields(values: Integers, width: int) -> bytes:
    """The low `width` bits of every value, end to end."""
    bits = ((values[:, None] >> np.arange(width)) & 1).astype(np.uint8)
    return np.packbits(bits.ravel(), bitorder="little").tobytes()


def _unpack_fields(data: Bytes, width: int, count: int) -> Integers:
    """The inverse of _pack_fields. Eight fields fill `width` bytes, so each of the eight has a fixed shift."""
    if width == 0 or count == 0:
        return np.zeros(count, np.int64)
    groups = -(-count // 8)
    rows = np.zeros((groups, width), np.uint8)
    rows.reshape(-1)[: data.size] = data
    values = np.empty((groups, 8), np.int64)
    for field in range(8):
        first, shift = divmod(field * width, 8)
        word = rows[:, first].astype(np.uint32)
        for byte in range(1, (shift + width + 7) // 8):
            word |= rows[:, first + byte].astype(np.uint32) << (8 * byte)
        values[:, field] = (word >> shift) & ((1 << width) - 1)
    if values.reshape(-1)[count:].any():
        raise _bad("bits are set past its last field")
    return values.reshape(-1)[:count]


def _unpack_nibbles(packed: Bytes) -> Bytes:
    nibbles = np.empty(packed.size * 2, np.uint8)
    nibbles[0::2] = packed & 0x0F
    nibbles[1::2] = packed >> 4
    return nibbles


def _bad(why: str) -> ArtifactError:
    return ArtifactError(Code.BAD_SECTION, f"Rice section refused: {why}; fetch the artifact again")
