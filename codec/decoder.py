"""A pack to a version directory.

Owns the files below the directory that it is given, until it returns. Invariant: it returns only when every file has
the size and SHA-256 that the manifest states. Every size comes from the manifest or the verified index; beside the
file-backed targets, memory is the planes of one chunk per thread. Frames may still be arriving: chunks are decoded as
they become whole. A crash leaves a directory without `version.json`, which nobody takes for a version; nothing here is
made durable.
"""

import errno
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from codec.arrivals import Arrivals
from codec.difference import add
from codec.plan import Chunk, plan_chunks
from codec.planes import PLANE_NAMES, Bytes, expand_sparse, join_planes, split_planes
from codec.sections import check_section, decode_section_into
from codec.target import Target
from codec.versions import VERSION_FILE, Partner, find_partners, read_version
from wire.digest import digest_of
from wire.documents import encode_document
from wire.errors import ArtifactError, Code, StoreError
from wire.index import Index, Section, SectionCodec, parse_index
from wire.manifest import SECTION_LIMIT_BYTES, Manifest, VersionDocument, streams_of

Progress = Callable[[int, int], None]
"""Called with (decoded bytes so far, decoded bytes in all), from the caller's thread."""


def _silent(_done: int, _total: int) -> None:
    """Progress that nobody watches."""


def decode_pack(  # noqa: PLR0913  # what most callers leave out has its name
    manifest: Manifest,
    pack: Path,
    into: Path,
    *,
    base: Path | None = None,
    threads: int = 2,
    arriving: Iterable[Iterable[int]] | None = None,
    progress: Progress | None = None,
) -> None:
    """Write the version that `pack` encodes into the existing empty directory `into`; `base` for a delta.

    `arriving` gives the numbers of frames as they come to be in the pack, which has its full size and its index from
    the beginning; it is read in a thread of its own. Without it all frames are there.

    Raises ArtifactError when pack or base differ from what the manifest signs, StoreError when the disk refuses.
    Does not flush: the caller commits.
    """
    entries = manifest.version.files
    with _store_errors(), ExitStack() as stack:
        _check_space(into, sum(entry.size_bytes for entry in entries))
        bases = _open_bases(manifest, base, stack)
        source = stack.enter_context(_opened(pack))
        if source.size_bytes != manifest.pack_size_bytes:
            raise ArtifactError(Code.BAD_INDEX, "pack has another size than its manifest says; fetch it again")
        chunks = plan_chunks(manifest, _read_index(manifest, source))
        starts: list[list[int]] = [[] for _ in entries]
        for chunk in chunks:
            starts[chunk.stream.file].append(chunk.offset)
        targets = [Target(into, *pair) for pair in zip(entries, starts, strict=True)]
        decoder = _Decoder(source, targets, bases)
        arrivals = Arrivals(manifest, chunks)
        report = progress or _silent
        _decode_all(decoder, arrivals, arriving or [range(manifest.frame_count)], threads, report)
        for number, target in enumerate(targets):
            try:
                target.verify()
            except ArtifactError:
                decoder.blame(chunk for chunk in chunks if chunk.stream.file == number)
                raise
        (into / VERSION_FILE).write_bytes(encode_document(manifest.version))


def _decode_all(
    decoder: "_Decoder", arrivals: Arrivals, arriving: Iterable[Iterable[int]], threads: int, progress: Progress
) -> None:
    """Decode all chunks in `threads` threads, this one among them; the first failure stops all and is raised."""

    def feed() -> None:
        try:
            for frames in arriving:
                arrivals.add(frames)
            arrivals.end()
        except BaseException as error:  # noqa: BLE001  # raised again by the caller's thread
            arrivals.fail(error)

    def drain(report: Progress) -> None:
        try:
            while (chunk := arrivals.take()) is not None:
                decoder.decode(chunk)
                report(*arrivals.taken)
        except BaseException as error:  # noqa: BLE001  # raised again by the caller's thread
            arrivals.fail(error)

    # A daemon: after a failure it may wait for frames for ever, and nobody listens any more.
    threading.Thread(target=feed, name="decode-feed", daemon=True).start()
    others = [threading.Thread(target=drain, args=(_silent,), name=f"decode-{number}") for number in range(1, threads)]
    for thread in others:
        thread.start()
    drain(progress)
    for thread in others:
        thread.join()
    arrivals.check()


@dataclass(frozen=True, slots=True)
class _Source:
    """An open file, read by position from any thread. Not mapped: a file that is cut meanwhile must be an error, and
    in a mapping it would be a SIGBUS."""

    descriptor: int
    size_bytes: int

    def read(self, position: int, size_bytes: int) -> bytes:
        """Exactly `size_bytes`."""
        data = os.pread(self.descriptor, size_bytes, position)
        if len(data) != size_bytes:
            raise ArtifactError(Code.CORRUPT, "a file shrank while it was read; check the disk and fetch it again")
        return data


@dataclass(frozen=True, slots=True)
class _Base:
    """Where the base holds a stream's partner."""

    file: _Source
    partner: Partner

    def read(self, start: int, end: int) -> bytes:
        """Bytes [start, end) of the partner."""
        return self.file.read(self.partner.stream.offset + start, end - start)


class _Scratch(threading.local):
    """Planes of the chunk that a thread is at; kept, because fresh memory costs a page fault every 4 KiB."""

    def __init__(self) -> None:
        self._planes: list[Bytes] = []

    def planes(self, sizes: Sequence[int]) -> list[Bytes]:
        """An array per size (at most SECTION_LIMIT_BYTES), uint8, of any content."""
        while len(self._planes) < len(sizes):
            self._planes.append(np.empty(SECTION_LIMIT_BYTES, np.uint8))
        return [plane[:size] for plane, size in zip(self._planes, sizes, strict=False)]


@dataclass(frozen=True, slots=True)
class _Decoder:
    """Decodes chunks. Threads share it: chunks touch disjoint bytes of the targets and nothing else changes."""

    pack: _Source
    targets: Sequence[Target]
    bases: Sequence[_Base | None]
    scratch: _Scratch = field(default_factory=_Scratch)

    def decode(self, chunk: Chunk) -> None:
        """Decode one chunk into its slice of the target file, which hashes it when its turn comes."""
        target = self.targets[chunk.stream.file]
        self._decode_into(chunk, target.bytes[chunk.offset : chunk.stream.offset + chunk.end])
        target.finish_chunk(chunk.offset)

    def blame(self, chunks: Iterable[Chunk]) -> None:
        """A file came out wrong: raise ArtifactError(bad_section) for the first section whose CRC-32 says so too."""
        for chunk in chunks:
            planes = self.scratch.planes([section.raw_size for section in chunk.sections])
            for section, plane in zip(chunk.sections, self._decode_planes(chunk, planes), strict=True):
                check_section(section, plane, chunk.stream.name or chunk.stream.path)

    def _decode_into(self, chunk: Chunk, out: Bytes) -> None:
        stream = chunk.stream
        if chunk.operation == "c":
            out[:] = self._base_bytes(chunk)
        elif chunk.operation == "f" and len(PLANE_NAMES[stream.layout]) == 1:
            self._decode_planes(chunk, [out])
        else:
            planes = self._decode_planes(chunk, self.scratch.planes([section.raw_size for section in chunk.sections]))
            if chunk.operation == "s":
                planes = expand_sparse(planes, chunk.items)
            elif chunk.operation == "d":
                old = split_planes(stream.layout, self._base_bytes(chunk))
                planes = [add(stream.dtype, a, d) for a, d in zip(old, planes, strict=True)]
            join_planes(stream.layout, planes, out)

    def _decode_planes(self, chunk: Chunk, planes: list[Bytes]) -> list[Bytes]:
        position = chunk.position
        for section, plane in zip(chunk.sections, planes, strict=True):
            dictionary = self._dictionary(chunk, section)
            decode_section_into(section, self.pack.read(position, section.coded_size), plane, dictionary)
            position += section.coded_size
        return planes

    def _base_bytes(self, chunk: Chunk) -> Bytes:
        base = self.bases[chunk.row]
        if base is None or not base.partner.alike:
            raise _wrong_base(f"it lacks stream {chunk.stream.name or chunk.stream.path}")
        return np.frombuffer(base.read(chunk.start, chunk.end), np.uint8)

    def _dictionary(self, chunk: Chunk, section: Section) -> bytes | None:
        base = self.bases[chunk.row]
        if section.codec is not SectionCodec.DICTIONARY or chunk.operation != "f" or base is None:
            return None
        size_bytes = base.partner.stream.size_bytes
        return base.read(0, size_bytes) if size_bytes <= SECTION_LIMIT_BYTES else None


def _read_index(manifest: Manifest, pack: _Source) -> Index:
    """Verify the index frames and parse them."""
    data = pack.read(0, manifest.index_size_bytes)
    for frame, expected in enumerate(manifest.index_frames):
        start, end = manifest.frame_range(frame)
        if digest_of(data[start:end]) != expected:
            raise ArtifactError(Code.BAD_INDEX, f"index frame {frame} is not the signed one; fetch it again")
    return parse_index(data, manifest.pack_size_bytes - manifest.index_size_bytes)


def _open_bases(manifest: Manifest, base: Path | None, stack: ExitStack) -> list[_Base | None]:
    """The base's place of every stream, None where the base has none like it. The base must be the one signed."""
    streams = streams_of(manifest.version)
    if manifest.base is None:
        return [None] * len(streams)
    if base is None:
        raise _wrong_base("none was given")
    version = read_version(base)
    if version.decoded_digest() != manifest.base:
        raise _wrong_base(f"it needs {manifest.base[:12]}…, this is {version.decoded_digest()[:12]}…")
    files = _open_files(version, base, stack)
    partners = find_partners(streams, streams_of(version))
    return [None if partner is None else _Base(files[partner.stream.file], partner) for partner in partners]


def _open_files(version: VersionDocument, directory: Path, stack: ExitStack) -> list[_Source]:
    files = []
    for entry in version.files:
        try:
            file = stack.enter_context(_opened(directory / entry.path))
        except FileNotFoundError as error:
            raise _wrong_base(f"{entry.path} is missing") from error
        if file.size_bytes != entry.size_bytes:
            raise _wrong_base(f"{entry.path} has another size than its version says")
        files.append(file)
    return files


@contextmanager
def _opened(path: Path) -> Iterator[_Source]:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield _Source(descriptor, os.fstat(descriptor).st_size)
    finally:
        os.close(descriptor)


def _check_space(directory: Path, size_bytes: int) -> None:
    """Refuse before the first block is reserved: reserving until nothing is left starves whoever shares the disk."""
    disk = os.statvfs(directory)
    free_bytes = disk.f_bavail * disk.f_frsize
    if size_bytes > free_bytes:
        raise StoreError(
            Code.NO_SPACE, f"the version needs {size_bytes} bytes and the disk has {free_bytes}: make room, then retry"
        )


@contextmanager
def _store_errors() -> Iterator[None]:
    """What the file system refuses becomes a StoreError, here and nowhere else."""
    try:
        yield
    except OSError as error:
        code = Code.NO_SPACE if error.errno in (errno.ENOSPC, errno.EDQUOT) else Code.IO_ERROR
        raise StoreError(code, f"decoding stopped: {error}; make room or check the disk, then try again") from error


def _wrong_base(why: str) -> ArtifactError:
    return ArtifactError(Code.BASE_MISMATCH, f"this delta does not apply: {why}; fetch the full artifact")
