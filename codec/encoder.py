"""A version directory to a pack: sections, index, frames.

Streams are coded in order, sections in parallel; results are written in order, so the bytes do not depend on timing.
A crash leaves a partial pack under its temporary name.
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from codec.difference import subtract
from codec.entropy import byte_histogram, entropy_bytes
from codec.planes import ITEM_BYTES, PLANE_NAMES, Bytes, split_planes
from codec.sections import CodedSection, encode_section
from codec.versions import match_streams, stream_bytes
from wire.digest import digest_of
from wire.index import Index, Section, SectionCodec, encode_index
from wire.manifest import FRAME_BYTES, SECTION_LIMIT_BYTES, Dtype, Stream, VersionDocument, streams_of

Progress = Callable[[int, int], None]
"""Called with (plane bytes coded so far, plane bytes in all)."""


@dataclass(frozen=True, slots=True)
class PlaneFigures:
    """What one plane of one stream cost; `entropy_bytes` is the order-0 bound on its histogram."""

    stream: str
    plane: str
    operation: str
    raw_bytes: int
    coded_bytes: int
    entropy_bytes: float
    codecs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class EncodedPack:
    """What the manifest needs to say of a pack, and figures for people."""

    operations: str
    index_size_bytes: int
    index_frames: tuple[str, ...]
    pack_size_bytes: int
    planes: tuple[PlaneFigures, ...]


@dataclass(slots=True)
class _Work:
    """One stream on its way: the planes to code, with the sections that come out of them."""

    stream: Stream
    operation: str
    planes: list[Bytes]
    sections: list[list["Future[CodedSection]"]] = field(default_factory=list)


def encode_pack(
    version: VersionDocument,
    directory: Path,
    pack: Path,
    *,
    base: tuple[VersionDocument, Path] | None = None,
    progress: Progress | None = None,
) -> EncodedPack:
    """Encode the version in `directory` to the file `pack`, as a delta when `base` is given."""
    streams = streams_of(version)
    total = sum(_plane_bytes(stream) for stream in streams)
    operations: list[str] = []
    table: list[Section] = []
    planes: list[PlaneFigures] = []
    data = pack.with_name(f".{pack.name}.data")
    done = 0
    with data.open("wb") as sink, ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="encode") as pool:
        for number, work in enumerate(_plan(streams, directory, base)):
            operations.append(work.operation)
            if work.operation != "c":
                _submit(work, pool)
                _drain(work, number, sink, table)
                planes += _figures(work)
            done += _plane_bytes(work.stream)
            if progress is not None:
                progress(done, total)
    hashes = tuple(_frame_hashes(data))
    index = encode_index(Index(hashes, tuple(table)))
    _assemble(index, data, pack)
    frames = tuple(digest_of(index[i : i + FRAME_BYTES]) for i in range(0, len(index), FRAME_BYTES))
    return EncodedPack("".join(operations), len(index), frames, pack.stat().st_size, tuple(planes))


def _plan(streams: tuple[Stream, ...], directory: Path, base: tuple[VersionDocument, Path] | None) -> Iterator[_Work]:
    """Choose full, copy or difference for every stream."""
    matches = match_streams(streams, streams_of(base[0])) if base else [None] * len(streams)
    for stream, found in zip(streams, matches, strict=True):
        stored = np.asarray(stream_bytes(directory, stream))
        if base is None or found is None:
            yield _Work(stream, "f", split_planes(stream.layout, stored))
            continue
        original = np.asarray(stream_bytes(base[1], found))
        if np.array_equal(stored, original):
            yield _Work(stream, "c", [])
            continue
        new, old = split_planes(stream.layout, stored), split_planes(stream.layout, original)
        difference = [subtract(stream.dtype, n, o) for n, o in zip(new, old, strict=True)]
        if _looks_smaller(difference, new):
            yield _Work(stream, "d", difference)
        else:
            yield _Work(stream, "f", new)


def _looks_smaller(difference: list[Bytes], full: list[Bytes]) -> bool:
    """Whether the order-0 bound favours the difference; a measured try of both would cost twice the time."""
    return sum(entropy_bytes(byte_histogram(p)) for p in difference) < sum(
        entropy_bytes(byte_histogram(p)) for p in full
    )


def _submit(work: _Work, pool: ThreadPoolExecutor) -> None:
    bits = (4 if work.stream.dtype is Dtype.U4 else 8) if work.operation == "d" else None
    size = work.planes[0].size
    for start in range(0, size, SECTION_LIMIT_BYTES):
        chunk = [plane[start : start + SECTION_LIMIT_BYTES] for plane in work.planes]
        work.sections.append([pool.submit(encode_section, part, sparse_symbol_bits=bits) for part in chunk])


def _drain(work: _Work, number: int, sink: BinaryIO, table: list[Section]) -> None:
    for chunk in work.sections:
        for plane, future in enumerate(chunk):
            section = future.result()
            sink.write(section.coded)
            table.append(section.row(number, plane))


def _figures(work: _Work) -> Iterator[PlaneFigures]:
    for plane, name in enumerate(PLANE_NAMES[work.stream.layout]):
        sections = [chunk[plane].result() for chunk in work.sections]
        yield PlaneFigures(
            work.stream.name or work.stream.path, name, work.operation, work.planes[plane].size,
            sum(len(section.coded) for section in sections),
            entropy_bytes(byte_histogram(work.planes[plane])),
            tuple(sorted({SectionCodec(section.codec).name.lower() for section in sections})),
        )  # fmt: skip


def _frame_hashes(data: Path) -> Iterator[bytes]:
    with data.open("rb") as source:
        while frame := source.read(FRAME_BYTES):
            yield hashlib.sha256(frame).digest()


def _assemble(index: bytes, data: Path, pack: Path) -> None:
    with pack.open("wb") as sink, data.open("rb") as source:
        sink.write(index)
        while block := source.read(1 << 20):
            sink.write(block)
    data.unlink()


def _plane_bytes(stream: Stream) -> int:
    return stream.size_bytes // ITEM_BYTES[stream.layout] * len(PLANE_NAMES[stream.layout])
