"""Looking into a pack without decoding it to files: every frame against its hash, every section by itself.

Invariant: nothing is believed that the manifest does not sign, memory is the index and one section, and an error names
the frame or the section where it is. Nothing here writes.
"""

import errno
import hashlib
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from codec.entropy import byte_histogram, entropy_bytes
from codec.plan import Chunk, plan_chunks
from codec.planes import Bytes, item_count, plane_names
from codec.sections import decode_section_into
from codec.versions import find_partners, read_version
from wire.digest import digest_of
from wire.errors import ArtifactError, Code, StoreError
from wire.index import Index, Section, SectionCodec, parse_index
from wire.manifest import SECTION_LIMIT_BYTES, Manifest, Stream, VersionDocument, streams_of

Progress = Callable[[int, int], None]
"""Called with (done, of), in bytes."""


@dataclass(frozen=True, slots=True)
class OpenPack:
    """A pack whose index was verified; `chunks` says where everything lies."""

    manifest: Manifest
    descriptor: int
    index: Index
    chunks: tuple[Chunk, ...]

    def read(self, start: int, end: int) -> bytes:
        """Bytes [start, end); ArtifactError(corrupt) when the file was cut meanwhile."""
        return _read(self.descriptor, start, end)


@dataclass(frozen=True, slots=True)
class DecodedSection:
    """A section with its place. `data` is uint8 [raw_size], or None where it needs a base that is not there."""

    number: int
    chunk: Chunk
    section: Section
    data: Bytes | None


@dataclass(frozen=True, slots=True)
class CodecShare:
    """How much one codec carries; sizes in bytes."""

    sections: int
    raw_bytes: int
    coded_bytes: int


@dataclass(frozen=True, slots=True)
class PlaneCost:
    """What one plane of one stream costs, in bytes; `codecs` by name, none for a copy.

    `entropy_bytes` is the order-0 bound on what the sections decode to, a difference for operation `d`; None when it
    was not computed. A copy sends nothing, so its bound is 0.
    """

    stream: Stream
    operation: str
    plane: str
    raw_bytes: int
    coded_bytes: int
    entropy_bytes: float | None
    codecs: dict[str, CodecShare]


@contextmanager
def open_pack(manifest: Manifest, pack: Path) -> Iterator[OpenPack]:
    """Open `pack` and verify its index against `manifest`.

    Raises ArtifactError (bad_index, frame_mismatch naming the frame), StoreError when the file cannot be read.
    """
    with _opened(pack) as descriptor:
        size_bytes = os.fstat(descriptor).st_size
        if size_bytes != manifest.pack_size_bytes:
            raise ArtifactError(
                Code.BAD_INDEX,
                f"{pack.name} has {size_bytes} bytes, its manifest says {manifest.pack_size_bytes}; fetch it again",
            )
        data = _read(descriptor, 0, manifest.index_size_bytes)
        for frame, expected in enumerate(manifest.index_frames):
            start, end = manifest.frame_range(frame)
            if digest_of(data[start:end]) != expected:
                raise _wrong_frames(manifest, [frame])
        index = parse_index(data, manifest.pack_size_bytes - manifest.index_size_bytes)
        yield OpenPack(manifest, descriptor, index, plan_chunks(manifest, index))


def check_frames(pack: OpenPack, progress: Progress | None = None) -> int:
    """Compare every frame with its hash; returns their number.

    Raises ArtifactError(frame_mismatch) naming the first that differs, and how many do.
    """
    manifest, wrong = pack.manifest, []
    for number, expected in enumerate(pack.index.frame_hashes, len(manifest.index_frames)):
        start, end = manifest.frame_range(number)
        if hashlib.sha256(pack.read(start, end)).digest() != expected:
            wrong.append(number)
        if progress is not None:
            progress(end, manifest.pack_size_bytes)
    if wrong:
        raise _wrong_frames(manifest, wrong)
    return manifest.frame_count


def decode_sections(pack: OpenPack, base: Path | None = None) -> Iterator[DecodedSection]:
    """Every section in the order of the pack, decoded by itself and held against its CRC-32.

    `base` is the version that the dictionaries of a delta lie in; differences are not added to it.
    Raises ArtifactError that names the section.
    """
    dictionaries = _Dictionaries(pack.manifest, base)
    number = 0
    for chunk in pack.chunks:
        position = chunk.position
        for section in chunk.sections:
            end = position + section.coded_size
            try:
                data = _decode(section, pack.read(position, end), dictionaries.of(chunk))
            except ArtifactError as error:
                raise _wrong_section(number, chunk, section, (position, end), error) from error
            yield DecodedSection(number, chunk, section, data)
            position, number = end, number + 1


def measure_planes(pack: OpenPack, *, entropy: bool = True, progress: Progress | None = None) -> tuple[PlaneCost, ...]:
    """The cost of every plane in the order of the pack; with `entropy` by decoding all sections (ArtifactError)."""
    histograms = _histograms(pack, progress) if entropy else {}
    sections: dict[tuple[int, int], list[Section]] = {}
    for section in pack.index.sections:
        sections.setdefault((section.stream, section.plane), []).append(section)
    streams = streams_of(pack.manifest.version)
    return tuple(
        _cost(stream, operation, plane, sections.get((row, plane), []), histograms.get((row, plane)))
        for row, (stream, operation) in enumerate(zip(streams, pack.manifest.operations, strict=True))
        for plane in range(len(plane_names(stream.layout, operation)))
    )


def _cost(
    stream: Stream, operation: str, plane: int, sections: list[Section], histogram: NDArray[np.int64] | None
) -> PlaneCost:
    shares: dict[str, CodecShare] = {}
    for section in sections:
        old = shares.get(section.codec.name.lower(), CodecShare(0, 0, 0))
        shares[section.codec.name.lower()] = CodecShare(
            old.sections + 1, old.raw_bytes + section.raw_size, old.coded_bytes + section.coded_size
        )
    copied = operation == "c"
    items = item_count(stream.layout, stream.size_bytes) if copied else sum(section.raw_size for section in sections)
    bound = None if histogram is None else entropy_bytes(histogram)
    return PlaneCost(
        stream, operation, plane_names(stream.layout, operation)[plane], items, sum(s.coded_size for s in sections),
        bound if sections else 0.0, shares,
    )  # fmt: skip


def _histograms(pack: OpenPack, progress: Progress | None) -> dict[tuple[int, int], NDArray[np.int64] | None]:
    """By stream and plane how often each byte occurs, int64 [256]; None where a section could not be decoded."""
    found: dict[tuple[int, int], NDArray[np.int64] | None] = {}
    done, total = 0, sum(section.raw_size for section in pack.index.sections)
    for decoded in decode_sections(pack):
        place = (decoded.section.stream, decoded.section.plane)
        before = found.setdefault(place, np.zeros(256, np.int64))
        found[place] = None if decoded.data is None or before is None else before + byte_histogram(decoded.data)
        done += decoded.section.raw_size
        if progress is not None:
            progress(done, total)
    return found


class _Dictionaries:
    """What the base holds in the place of a stream, for sections that refer to it."""

    def __init__(self, manifest: Manifest, base: Path | None) -> None:
        self._base = base
        version = None if base is None else read_version(base)
        self._partners = _partners(manifest, version)

    def of(self, chunk: Chunk) -> bytes | None:
        """None when there is no base, or none that fits: decoding to files says what is wrong with it."""
        partner = self._partners[chunk.row]
        if self._base is None or partner is None or partner.size_bytes > SECTION_LIMIT_BYTES:
            return None
        with _opened(self._base / partner.path) as descriptor:
            return _read(descriptor, partner.offset, partner.offset + partner.size_bytes)


def _partners(manifest: Manifest, base: VersionDocument | None) -> list[Stream | None]:
    streams = streams_of(manifest.version)
    if base is None or base.decoded_digest() != manifest.base:
        return [None] * len(streams)
    return [found.stream if found else None for found in find_partners(streams, streams_of(base))]


def _decode(section: Section, coded: bytes, dictionary: bytes | None) -> Bytes | None:
    if section.codec is SectionCodec.DICTIONARY and dictionary is None:
        return None
    out = np.empty(section.raw_size, np.uint8)
    decode_section_into(section, coded, out, dictionary)
    if zlib.crc32(out.data) != section.crc32:
        raise ArtifactError(Code.BAD_SECTION, "it decodes to other bytes than were packed; fetch it again")
    return out


def _read(descriptor: int, start: int, end: int) -> bytes:
    data = os.pread(descriptor, end - start, start)
    if len(data) != end - start:
        raise ArtifactError(Code.CORRUPT, "a file shrank while it was read; check the disk and fetch it again")
    return data


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        missing = error.errno in (errno.ENOENT, errno.ENOTDIR)
        code = Code.CORRUPT if missing else Code.IO_ERROR
        raise StoreError(code, f"{path} cannot be read ({error.strerror}); fetch it again or check the disk") from error
    try:
        yield descriptor
    except OSError as error:
        raise StoreError(Code.IO_ERROR, f"{path} cannot be read ({error.strerror}); check the disk") from error
    finally:
        os.close(descriptor)


def _wrong_frames(manifest: Manifest, wrong: list[int]) -> ArtifactError:
    start, end = manifest.frame_range(wrong[0])
    others = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
    return ArtifactError(
        Code.FRAME_MISMATCH,
        f"frame {wrong[0]} of {manifest.frame_count} (bytes {start} to {end} of the pack{others}) is not the one that "
        "was signed; fetch the pack again, or make the release again",
    )


def _wrong_section(
    number: int, chunk: Chunk, section: Section, place: tuple[int, int], error: ArtifactError
) -> ArtifactError:
    stream, plane = chunk.stream, plane_names(chunk.stream.layout, chunk.operation)[section.plane]
    what = f"tensor {stream.name!r} in {stream.path}" if stream.name else f"file {stream.path}"
    return ArtifactError(
        error.code,
        f"section {number} ({what}, plane {plane}, codec {section.codec.name.lower()}, bytes {place[0]} to {place[1]} "
        f"of the pack): {error.message}",
    )
