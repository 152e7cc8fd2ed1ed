"""A pack to a version directory.

A stream (one tensor, or a file without tensors) is cut into chunks of at most SECTION_LIMIT_BYTES per plane; a chunk is
one section per plane, in plane order, all of one raw size. So a chunk is decoded, joined and written by one thread,
straight into its slice of the mapped file, and no more than `threads` chunks are in memory.
"""

import hashlib
import mmap
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from codec.difference import add
from codec.planes import ITEM_BYTES, PLANE_NAMES, Bytes, join_planes, split_planes
from codec.sections import decode_section
from codec.versions import VERSION_FILE, match_streams, read_version, stream_bytes
from wire.digest import digest_of
from wire.documents import encode_document
from wire.errors import ArtifactError, Code
from wire.index import Index, Section, parse_index
from wire.manifest import INDEX_LIMIT_BYTES, Manifest, Stream, VersionDocument, streams_of

_HASH_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Chunk:
    """One section per plane of a slice of a stream; `start` counts bytes of a plane, `position` bytes of the pack."""

    stream: int
    start: int
    sections: tuple[Section, ...]
    position: int


def decode_pack(manifest: Manifest, pack: Path, into: Path, *, base: Path | None = None, threads: int = 2) -> None:
    """Write the version that `pack` encodes into the existing empty directory `into`; `base` for a delta.

    Raises ArtifactError when anything differs from what the manifest signs. Does not flush: the caller commits.
    """
    streams = streams_of(manifest.version)
    bases = _open_bases(manifest, streams, base)
    with pack.open("rb") as source, mmap.mmap(source.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        if len(mapped) != manifest.pack_size_bytes:
            raise ArtifactError(Code.BAD_INDEX, "pack has another size than its manifest says; fetch it again")
        index = read_index(manifest, mapped)
        chunks = list(_chunks_of(index, manifest, streams))
        targets = [_map_target(into / entry.path, entry.size_bytes) for entry in manifest.version.files]
        with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
            decoder = _Decoder(manifest.operations, streams, mapped, targets, bases)
            for batch in _batches(chunks, threads * 2):
                list(pool.map(decoder.decode, batch))
            for stream, operation, original in zip(streams, manifest.operations, bases, strict=True):
                if operation == "c" and original is not None:
                    _slice_of(targets[stream.file], stream)[:] = original
            list(pool.map(lambda i: _verify_file(manifest.version, i, targets[i]), range(len(targets))))
    (into / VERSION_FILE).write_bytes(encode_document(manifest.version))


def read_index(manifest: Manifest, mapped: mmap.mmap) -> Index:
    """Verify the index frames of a mapped pack and parse them."""
    data = mapped[: min(manifest.index_size_bytes, INDEX_LIMIT_BYTES)]
    for frame, expected in enumerate(manifest.index_frames):
        start, end = manifest.frame_range(frame)
        if digest_of(data[start:end]) != expected:
            raise ArtifactError(Code.BAD_INDEX, f"index frame {frame} is not the signed one; fetch it again")
    return parse_index(data, manifest.pack_size_bytes - manifest.index_size_bytes)


@dataclass(frozen=True, slots=True)
class _Decoder:
    operations: str
    streams: Sequence[Stream]
    mapped: mmap.mmap
    targets: Sequence[Bytes]
    bases: Sequence[Bytes | None]

    def decode(self, chunk: Chunk) -> None:
        """Decode one chunk into its slice of the target file."""
        stream = self.streams[chunk.stream]
        planes: list[Bytes] = []
        position = chunk.position
        for section in chunk.sections:
            planes.append(decode_section(section, self.mapped[position : position + section.coded_size]))
            position += section.coded_size
        item = ITEM_BYTES[stream.layout]
        begin, end = chunk.start * item, (chunk.start + chunk.sections[0].raw_size) * item
        if self.operations[chunk.stream] == "d":
            original = self.bases[chunk.stream]
            if original is None:
                raise ArtifactError(Code.BASE_MISMATCH, f"stream {stream.name or stream.path} is not in the base")
            old = split_planes(stream.layout, np.asarray(original[begin:end]))
            planes = [add(stream.dtype, a, d) for a, d in zip(old, planes, strict=True)]
        join_planes(stream.layout, planes, _slice_of(self.targets[stream.file], stream)[begin:end])


def _open_bases(manifest: Manifest, streams: Sequence[Stream], base: Path | None) -> list[Bytes | None]:
    """The base's bytes for every stream that needs them."""
    if manifest.base is None:
        return [None] * len(streams)
    if base is None:
        raise ArtifactError(Code.BASE_MISMATCH, "this is a delta: name the version directory that it applies to")
    version = read_version(base)
    if version.decoded_digest() != manifest.base:
        raise ArtifactError(
            Code.BASE_MISMATCH,
            f"delta applies to {manifest.base[:12]}…, not to {version.decoded_digest()[:12]}…: fetch the full artifact",
        )
    opened: list[Bytes | None] = []
    for stream, operation, found in zip(
        streams, manifest.operations, match_streams(streams, streams_of(version)), strict=True
    ):
        if operation != "f" and found is None:
            raise ArtifactError(Code.BASE_MISMATCH, f"stream {stream.name or stream.path} is not in the base")
        opened.append(stream_bytes(base, found) if operation != "f" and found is not None else None)
    return opened


def _chunks_of(index: Index, manifest: Manifest, streams: Sequence[Stream]) -> Iterator[Chunk]:
    """Group the section table into chunks, checking that every stream is covered exactly once and in order."""
    table = iter(index.sections)
    position = manifest.index_size_bytes
    for number, stream in enumerate(streams):
        if manifest.operations[number] == "c":
            continue
        planes = len(PLANE_NAMES[stream.layout])
        if stream.size_bytes % ITEM_BYTES[stream.layout]:
            raise _bad(f"stream {stream.name or stream.path} holds no whole items")
        size, start = stream.size_bytes // ITEM_BYTES[stream.layout], 0
        while start < size:
            sections = tuple(islice(table, planes))
            raw_size = sections[0].raw_size if sections else 0
            wanted = [(number, plane, raw_size) for plane in range(planes)]
            if [(s.stream, s.plane, s.raw_size) for s in sections] != wanted or start + raw_size > size:
                raise _bad(f"sections of stream {stream.name or stream.path} do not cover it")
            yield Chunk(number, start, sections, position)
            position += sum(section.coded_size for section in sections)
            start += raw_size
    if next(table, None) is not None:
        raise _bad("it has sections that belong to no stream")


def _map_target(path: Path, size_bytes: int) -> Bytes:
    """A new file of `size_bytes` zero bytes, mapped for writing."""
    if size_bytes == 0:
        path.touch()
        return np.zeros(0, np.uint8)
    return np.memmap(path, np.uint8, "w+", shape=(size_bytes,))


def _slice_of(target: Bytes, stream: Stream) -> Bytes:
    return target[stream.offset : stream.offset + stream.size_bytes]


def _verify_file(version: VersionDocument, file: int, target: Bytes) -> None:
    digest = hashlib.sha256()
    for start in range(0, target.size, _HASH_BLOCK_BYTES):
        digest.update(target[start : start + _HASH_BLOCK_BYTES].data)
    entry = version.files[file]
    if digest.hexdigest() != entry.sha256:
        raise ArtifactError(
            Code.DIGEST_MISMATCH, f"{entry.path} decodes to other bytes than were signed; publish the release again"
        )


def _batches(chunks: Sequence[Chunk], size: int) -> Iterator[Sequence[Chunk]]:
    for start in range(0, len(chunks), size):
        yield chunks[start : start + size]


def _bad(why: str) -> ArtifactError:
    return ArtifactError(Code.BAD_INDEX, f"pack index refused: {why}; publish the artifact again")
