"""The binary index at the head of a pack: hashes of the data frames and the section table.

Layout, little-endian, no padding:
    magic     4 bytes  b"AMPI"
    version   u16      1
    reserved  u16      0
    frames    u32      data frames F
    sections  u32      sections S
    F x 32 bytes       SHA-256 of each data frame
    S x 20 bytes       stream u32, plane u8, codec u8, reserved u16 = 0, raw_size u32, coded_size u32, crc32 u32

Sections appear in the order of their bytes in the pack. Within one (stream, plane) they are in the order of the plane,
so offsets follow by addition and cannot overlap. `crc32` is of the decoded plane bytes (for a difference: of the
difference). The index itself is covered by the manifest's `index_frames`.
"""

import struct
from dataclasses import dataclass
from enum import IntEnum

from wire.errors import ArtifactError, Code
from wire.manifest import FRAME_BYTES, SECTION_LIMIT_BYTES

MAGIC = b"AMPI"
_HEADER = struct.Struct("<4sHHII")
_SECTION = struct.Struct("<IBBHIII")
_HASH_BYTES = 32


class SectionCodec(IntEnum):
    """How a section's bytes are coded."""

    RAW = 0
    HUFFMAN = 1
    """One zstd frame (RFC 8878) with its content size, no checksum, no dictionary."""
    ANS = 2
    DICTIONARY = 3
    RICE = 4


@dataclass(frozen=True, slots=True)
class Section:
    """One row of the section table; sizes in bytes."""

    stream: int
    plane: int
    codec: SectionCodec
    raw_size: int
    coded_size: int
    crc32: int


@dataclass(frozen=True, slots=True)
class Index:
    """SHA-256 (32 raw bytes each) of the data frames, and the section table in pack order."""

    frame_hashes: tuple[bytes, ...]
    sections: tuple[Section, ...]


def index_size(frames: int, sections: int) -> int:
    """Bytes of an encoded index."""
    return _HEADER.size + frames * _HASH_BYTES + sections * _SECTION.size


def encode_index(index: Index) -> bytes:
    """Encode `index`; the inverse of parse_index."""
    parts = [_HEADER.pack(MAGIC, 1, 0, len(index.frame_hashes), len(index.sections)), *index.frame_hashes]
    parts += [_SECTION.pack(s.stream, s.plane, s.codec, 0, s.raw_size, s.coded_size, s.crc32) for s in index.sections]
    return b"".join(parts)


def parse_index(data: bytes, data_size_bytes: int) -> Index:
    """Parse an index whose frames were verified; `data_size_bytes` is the pack less the index, from the manifest.

    Raises ArtifactError(bad_index) on any inconsistency. Allocates no more than `data` itself implies.
    """
    if len(data) < _HEADER.size:
        raise _bad("shorter than its header")
    magic, version, reserved, frames, sections = _HEADER.unpack_from(data)
    if magic != MAGIC or version != 1 or reserved != 0:
        raise _bad("unknown magic or version")
    if len(data) != index_size(frames, sections):
        raise _bad("length does not match its counts")
    if frames != -(-data_size_bytes // FRAME_BYTES):
        raise _bad("frame count does not match the pack")
    hashes_end = _HEADER.size + frames * _HASH_BYTES
    hashes = tuple(data[i : i + _HASH_BYTES] for i in range(_HEADER.size, hashes_end, _HASH_BYTES))
    table = tuple(_parse_section(row) for row in _SECTION.iter_unpack(memoryview(data)[hashes_end:]))
    if sum(section.coded_size for section in table) != data_size_bytes:
        raise _bad("sections do not fill the pack")
    return Index(hashes, table)


def _parse_section(row: tuple[int, ...]) -> Section:
    stream, plane, codec, reserved, raw_size, coded_size, crc32 = row
    if reserved != 0 or max(raw_size, coded_size) > SECTION_LIMIT_BYTES or (raw_size == 0) != (coded_size == 0):
        raise _bad("a section's sizes are out of range")
    try:
        return Section(stream, plane, SectionCodec(codec), raw_size, coded_size, crc32)
    except ValueError as error:
        raise _bad(f"codec {codec} is unknown; upgrade this node") from error


def _bad(why: str) -> ArtifactError:
    return ArtifactError(Code.BAD_INDEX, f"pack index refused: {why}; publish the artifact again")
