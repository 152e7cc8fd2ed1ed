"""A version directory to a pack: sections, index, frames.

Owns the pack while it is written. Invariant: chunks are coded in parallel and written in order, so the bytes do not
depend on timing; every stream takes the operation that came out smallest; and what was read had the digests that the
version states, so the pack decodes to that version. A crash leaves at most a partial pack, which the next run
overwrites; the sections wait in an unnamed file until their hashes, which stand before them, are known.
"""

import hashlib
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from codec.difference import subtract, symbol_bits
from codec.entropy import byte_histogram, entropy_bytes
from codec.plan import cut
from codec.planes import ITEM_BYTES, PLANE_NAMES, Bytes, compact_sparse, plane_names, split_planes
from codec.sections import CodedSection, encode_section
from codec.versions import check_version, find_partners, stream_bytes
from wire.digest import digest_of
from wire.index import Index, Section, encode_index
from wire.manifest import FRAME_BYTES, SECTION_LIMIT_BYTES, Stream, VersionDocument, streams_of

SPARSE_LEAST = 1 / 16
SPARSE_LEAST_BYTES = 1 / 4
"""Shares of zero items from which a mask is tried. A mask says once what several planes would each say; where there is
one plane its histogram says it as well, until whole bits become too many for it."""

Progress = Callable[[int, int], None]
"""Called with (stored bytes coded so far, stored bytes in all), from the caller's thread."""


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
    """What the manifest needs to say of a pack, and figures for people (copied streams cost nothing and have none)."""

    operations: str
    index_size_bytes: int
    index_frames: tuple[str, ...]
    pack_size_bytes: int
    planes: tuple[PlaneFigures, ...]


@dataclass(frozen=True, slots=True)
class _Source:
    """A stream's bytes, what the base has to subtract from, and what it has to refer to."""

    stream: Stream
    new: Bytes
    old: Bytes | None
    dictionary: bytes | None


@dataclass(frozen=True, slots=True)
class _Job:
    """One chunk of a stream, to be coded by one operation."""

    stream: Stream
    operation: str
    new: Bytes
    old: Bytes | None
    dictionary: bytes | None


@dataclass(frozen=True, slots=True)
class _CodedPlane:
    section: CodedSection
    histogram: NDArray[np.int64]


_CodedChunk = tuple[_CodedPlane, ...]


@dataclass(frozen=True, slots=True)
class _CodedStream:
    operation: str
    chunks: tuple[_CodedChunk, ...]

    @property
    def size_bytes(self) -> int:
        return sum(len(plane.section.coded) for chunk in self.chunks for plane in chunk)


def encode_pack(
    version: VersionDocument,
    directory: Path,
    pack: Path,
    *,
    base: tuple[VersionDocument, Path] | None = None,
    progress: Progress | None = None,
) -> EncodedPack:
    """Encode the version in `directory` to the file `pack`, as a delta when `base` is given.

    Raises ArtifactError when a directory does not hold what its version states.
    """
    check_version(version, directory)
    if base is not None:
        check_version(*base)
    streams = streams_of(version)
    total, done = sum(stream.size_bytes for stream in streams), 0
    operations: list[str] = []
    table: list[Section] = []
    figures: list[PlaneFigures] = []
    with tempfile.TemporaryFile(dir=pack.parent) as data:
        for row, (stream, coded) in enumerate(zip(streams, _code_streams(streams, directory, base), strict=True)):
            operations.append(coded.operation)
            table.extend(_write_chunks(row, coded.chunks, data))
            figures.extend(_figures(stream, coded))
            done += stream.size_bytes
            if progress is not None:
                progress(done, total)
        index = encode_index(Index(_frame_hashes(data), tuple(table)))
        size = _assemble(index, data, pack)
    frames = tuple(digest_of(index[i : i + FRAME_BYTES]) for i in range(0, len(index), FRAME_BYTES))
    return EncodedPack("".join(operations), len(index), frames, size, tuple(figures))


def _code_streams(
    streams: Sequence[Stream], directory: Path, base: tuple[VersionDocument, Path] | None
) -> Iterator[_CodedStream]:
    """Every stream in order, by the smallest of its candidates."""
    sources = list(_open_sources(streams, directory, base))
    plans = [_candidates(source) for source in sources]
    jobs = (
        _Job(
            source.stream,
            operation,
            source.new[start:end],
            source.old[start:end] if source.old is not None else None,
            source.dictionary,
        )
        for source, operations in zip(sources, plans, strict=True)
        for operation in operations
        if operation != "c"
        for start, end in cut(source.stream)
    )
    coded = _in_order(jobs)
    for stream, operations in zip(streams, plans, strict=True):
        count = len(list(cut(stream)))
        tried = [_CodedStream(o, () if o == "c" else tuple(islice(coded, count))) for o in operations]
        yield min(tried, key=lambda candidate: candidate.size_bytes)


def _open_sources(
    streams: Sequence[Stream], directory: Path, base: tuple[VersionDocument, Path] | None
) -> Iterator[_Source]:
    partners = find_partners(streams, streams_of(base[0])) if base else [None] * len(streams)
    for stream, partner in zip(streams, partners, strict=True):
        new = stream_bytes(directory, stream)
        if base is None or partner is None:
            yield _Source(stream, new, None, None)
            continue
        old = stream_bytes(base[1], partner.stream)
        # Tensors have no repetitions that a dictionary could serve; whole files such as JSON and graphs have.
        usable = not stream.name and old.size <= SECTION_LIMIT_BYTES
        yield _Source(stream, new, old if partner.alike else None, old.tobytes() if usable else None)


def _candidates(source: _Source) -> str:
    """Operations to try, the one without base first: it wins where two are equal."""
    if source.old is not None and np.array_equal(source.new, source.old):
        return "c"
    full = "fs" if _is_sparse(source.stream, source.new) else "f"
    return full if source.old is None else full + "d"


def _is_sparse(stream: Stream, data: Bytes) -> bool:
    """Whether so many items of a tensor are zero that a mask may be worth its bits."""
    if not stream.name:
        return False
    items = data.view(f"u{ITEM_BYTES[stream.layout]}")
    least = SPARSE_LEAST if len(PLANE_NAMES[stream.layout]) > 1 else SPARSE_LEAST_BYTES
    return items.size - int(np.count_nonzero(items)) >= least * items.size > 0


def _in_order(jobs: Iterable[_Job]) -> Iterator[_CodedChunk]:
    """Code in parallel, a bounded number of chunks ahead of the one handed out."""
    workers = os.cpu_count() or 1
    ahead: deque[Future[_CodedChunk]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="encode") as pool:
        for job in jobs:
            ahead.append(pool.submit(_code_chunk, job))
            if len(ahead) > 4 * workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def _code_chunk(job: _Job) -> _CodedChunk:
    planes, sparse, dictionary = split_planes(job.stream.layout, job.new), None, None
    if job.operation == "d" and job.old is not None:
        sparse = symbol_bits(job.stream.dtype)
        old = split_planes(job.stream.layout, job.old)
        planes = [subtract(job.stream.dtype, n, o) for n, o in zip(planes, old, strict=True)]
    elif job.operation == "s":
        planes = compact_sparse(planes)
    else:
        dictionary = job.dictionary
    sections = [encode_section(plane, sparse_symbol_bits=sparse, dictionary=dictionary) for plane in planes]
    return tuple(_CodedPlane(s, byte_histogram(p)) for s, p in zip(sections, planes, strict=True))


def _write_chunks(row: int, chunks: Sequence[_CodedChunk], sink: IO[bytes]) -> Iterator[Section]:
    for chunk in chunks:
        for number, plane in enumerate(chunk):
            sink.write(plane.section.coded)
            yield plane.section.row(row, number)


def _figures(stream: Stream, coded: _CodedStream) -> Iterator[PlaneFigures]:
    if not coded.chunks:
        return
    for name, planes in zip(plane_names(stream.layout, coded.operation), zip(*coded.chunks, strict=True), strict=True):
        sections = [plane.section for plane in planes]
        histogram = np.sum([plane.histogram for plane in planes], axis=0)
        yield PlaneFigures(
            stream.name or stream.path, name, coded.operation,
            sum(section.raw_size for section in sections), sum(len(section.coded) for section in sections),
            entropy_bytes(histogram), tuple(sorted({section.codec.name.lower() for section in sections})),
        )  # fmt: skip


def _frame_hashes(data: IO[bytes]) -> tuple[bytes, ...]:
    data.seek(0)
    return tuple(hashlib.sha256(frame).digest() for frame in iter(lambda: data.read(FRAME_BYTES), b""))


def _assemble(index: bytes, data: IO[bytes], pack: Path) -> int:
    data.seek(0)
    with pack.open("wb") as sink:
        sink.write(index)
        shutil.copyfileobj(data, sink, 1 << 20)
        return sink.tell()
