"""Interleaved rANS over bytes, in numpy: the codec of planes whose symbols cost little.

Huffman spends a whole number of bits on a symbol, at least one; where a difference makes a byte cheap that is several
per cent. rANS (Duda, arXiv 1311.2540) spends the fraction too. Many independent lanes are stepped together, one array
operation at a time: byte i of the plane belongs to lane i mod lanes, and the lanes share one sequence of 16-bit words,
taken in lane order by those whose state ran low (the construction of Giesen, arXiv 1402.3392).

Layout of a coded section, little-endian:
    lanes_log2 u8 (0..12), reserved 3 bytes = 0
    present      32 bytes, bit s (least significant first) set when byte value s occurs
    frequencies  of every present value, ascending: LEB128 of frequency - 1, at most 2 bytes; they sum to 2^13
    states       u32 per lane, each at least 2^16
    words        u16 to the end
One step of a lane: slot = state mod 2^13 lies in the range of one value s, which is the byte; then state =
frequency[s] * (state >> 13) + slot - start[s]; if that is below 2^16, state = state << 16 | the next word. At the end
every state is 2^16 and no word is left, a check on every bit read. Invariant: state < 2^32, so 32 bits never overflow.
"""

import struct

import numpy as np
from numpy.typing import NDArray

from codec.entropy import byte_histogram, entropy_bytes
from codec.planes import Bytes
from wire.errors import ArtifactError, Code

PRECISION = 13
"""Frequencies are in units of 2^-13: coarser costs compression where one value dominates, finer costs cache."""

LOW = 1 << 16
"""Lower bound of a state."""

MAX_LANES_LOG2 = 12
MAX_STEPS = 1 << 11
"""Steps to decode a section, which bounds its time: about 20 ms on a fast core."""

_BYTES_PER_LANE = 256
"""A lane costs two bytes more than it carries: one per this many coded bytes keeps that below one per cent."""

_HEADER = struct.Struct("<B3s")
_PRESENT_BYTES = 32

Counts = NDArray[np.int64]
Words = NDArray[np.uint32]


def ans_size_bytes(histogram: Counts) -> float:
    """About what encode_ans would need for a plane of this histogram."""
    ideal = entropy_bytes(histogram)
    tables = _HEADER.size + _PRESENT_BYTES + 1.2 * int(np.count_nonzero(histogram))
    return ideal * (1 + 2 / _BYTES_PER_LANE) + tables


def encode_ans(plane: Bytes) -> bytes:
    """Code `plane` (uint8 [n], n >= 1)."""
    histogram = byte_histogram(plane)
    frequencies = _quantise(histogram)
    lanes_log2 = _lanes_log2(plane.size, entropy_bytes(histogram))
    states, words = _encode_lanes(plane, frequencies, 1 << lanes_log2)
    present = np.packbits(histogram > 0, bitorder="little").tobytes()
    coded_frequencies = b"".join(_encode_leb128(f - 1) for f in frequencies[frequencies > 0].tolist())
    return b"".join([_HEADER.pack(lanes_log2, bytes(3)), present, coded_frequencies, states, words])


def decode_ans_into(coded: bytes, out: Bytes) -> None:
    """Decode into `out` (uint8 [n], n >= 1), every byte of it. Raises ArtifactError(bad_section) unless all fits."""
    if len(coded) < _HEADER.size + _PRESENT_BYTES:
        raise _bad("it is shorter than its header")
    lanes_log2, reserved = _HEADER.unpack_from(coded)
    if lanes_log2 > MAX_LANES_LOG2 or any(reserved) or out.size > MAX_STEPS << lanes_log2:
        raise _bad("its header is of an unknown form")
    lanes = 1 << lanes_log2
    values, frequencies, position = _parse_frequencies(coded)
    if len(coded) < position + 4 * lanes or (len(coded) - position) % 2:
        raise _bad("its states are cut")
    states = np.frombuffer(coded, "<u4", lanes, position).astype(np.uint32)
    words = np.frombuffer(coded, "<u2", -1, position + 4 * lanes).astype(np.uint32)
    if int(states.min()) < LOW:
        raise _bad("a state is out of range")
    used = _Decoder(values, frequencies, words).run(states, out)
    if used != words.size or bool((states != LOW).any()):
        raise _bad("it does not end where it should")


class _Decoder:
    """Tables per slot of 2^PRECISION: the byte, its frequency, the slot's distance from the byte's first slot."""

    def __init__(self, values: Bytes, frequencies: Counts, words: Words) -> None:
        starts = np.cumsum(frequencies) - frequencies
        self._value = np.repeat(values, frequencies)
        self._frequency = np.repeat(frequencies, frequencies).astype(np.uint32)
        self._distance = (np.arange(1 << PRECISION) - np.repeat(starts, frequencies)).astype(np.uint32)
        self._words = words
        self._used = 0

    def run(self, states: Words, out: Bytes) -> int:
        """Fill `out`, leaving the final states in `states`; the number of words used."""
        lanes = states.size
        for start in range(0, out.size, lanes):
            row = out[start : start + lanes]
            self._step(states[: row.size], row)
        return self._used

    def _step(self, states: Words, out: Bytes) -> None:
        slots = (states & np.uint32((1 << PRECISION) - 1)).astype(np.intp)
        self._value.take(slots, out=out, mode="clip")
        states >>= np.uint32(PRECISION)
        states *= self._frequency.take(slots)
        states += self._distance.take(slots)
        low = (states < LOW).nonzero()[0]
        if low.size == 0:
            return
        words = self._words[self._used : self._used + low.size]
        if words.size < low.size:
            raise _bad("its words are cut")
        states[low] = states[low] << np.uint32(16) | words
        self._used += low.size


def _lanes_log2(size: int, coded_bytes: float) -> int:
    affordable = max(0, int(coded_bytes / _BYTES_PER_LANE).bit_length() - 1)
    needed = max(0, (-(-size // MAX_STEPS) - 1).bit_length())
    return min(MAX_LANES_LOG2, max(affordable, needed))


def _quantise(histogram: Counts) -> Counts:
    """Frequencies of sum 2^PRECISION, at least 1 where a value occurs, at the least cost in bits one by one."""
    occurs = histogram > 0
    scaled = np.rint(histogram * ((1 << PRECISION) / histogram.sum()))
    frequencies: Counts = np.maximum(scaled, occurs).astype(np.int64)
    while (excess := int(frequencies.sum()) - (1 << PRECISION)) != 0:
        step = -1 if excess > 0 else 1
        movable = occurs & (frequencies + step > 0)
        now = np.where(movable, frequencies, 2)
        loss = np.where(movable, histogram * np.log2(now / (now + step)), np.inf)
        frequencies[np.argmin(loss)] += step
    return frequencies


def _encode_lanes(plane: Bytes, frequencies: Counts, lanes: int) -> tuple[bytes, bytes]:
    """Run the steps of the decoder backwards; the states and the words that it will start from."""
    frequency = frequencies.astype(np.uint64)
    start = np.cumsum(frequency) - frequency
    states = np.full(lanes, LOW, np.uint64)
    words: list[NDArray[np.uint16]] = []
    for first in range((plane.size - 1) // lanes * lanes, -1, -lanes):
        values = plane[first : first + lanes]
        state, f = states[: values.size], frequency[values]
        full = state >= f << np.uint64(32 - PRECISION)
        words.append(state[full].astype("<u2"))
        state[full] >>= np.uint64(16)
        quotient, remainder = np.divmod(state, f)
        state[:] = (quotient << np.uint64(PRECISION)) + remainder + start[values]
    return states.astype("<u4").tobytes(), np.concatenate(words[::-1]).tobytes()


def _parse_frequencies(coded: bytes) -> tuple[Bytes, Counts, int]:
    """Values that occur, their frequencies, and where the states begin."""
    bitmap = np.frombuffer(coded, np.uint8, _PRESENT_BYTES, _HEADER.size)
    values = np.flatnonzero(np.unpackbits(bitmap, bitorder="little")).astype(np.uint8)
    position, frequencies = _HEADER.size + _PRESENT_BYTES, []
    for _ in range(values.size):
        field = coded[position : position + 2]
        if not field or (field[0] > 127 and (len(field) < 2 or field[1] > 127)):
            raise _bad("a frequency is cut or too long")
        length = 1 + (field[0] > 127)
        frequencies.append((field[0] & 127) + (field[1] << 7 if length == 2 else 0) + 1)
        position += length
    if sum(frequencies) != 1 << PRECISION:
        raise _bad("its frequencies have another sum")
    return values, np.array(frequencies, np.int64), position


def _encode_leb128(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value & 127 | 128, value >> 7])


def _bad(why: str) -> ArtifactError:
    return ArtifactError(Code.BAD_SECTION, f"ANS section refused: {why}; fetch the artifact again")
