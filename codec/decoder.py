"""A pack to a version directory.

Owns the files below the directory that it is given, until it returns. Invariant: it returns only when every file has
the size and SHA-256 that the manifest states. Every size comes from the manifest or the verified index; beside the
file-backed targets, memory is one chunk per thread. A crash leaves a directory without `version.json`, which nobody
takes for a version; nothing here is made durable.
"""

import errno
import hashlib
import mmap
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from codec.difference import add
from codec.plan import Chunk, plan_chunks
from codec.planes import Bytes, join_planes, split_planes
from codec.sections import decode_section_into
from codec.versions import VERSION_FILE, Partner, find_partners, read_version
from wire.digest import digest_of
from wire.documents import encode_document
from wire.errors import ArtifactError, Code, StoreError
from wire.index import Index, SectionCodec, parse_index
from wire.manifest import SECTION_LIMIT_BYTES, FileEntry, Layout, Manifest, VersionDocument, streams_of

_FILE_MODE = 0o640
_HASH_BLOCK_BYTES = 1 << 20
_Item = TypeVar("_Item")


def decode_pack(manifest: Manifest, pack: Path, into: Path, *, base: Path | None = None, threads: int = 2) -> None:
    """Write the version that `pack` encodes into the existing empty directory `into`; `base` for a delta.

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
        targets = [_create_target(into / entry.path, entry.size_bytes) for entry in entries]
        _for_each(_Decoder(source, targets, bases).decode, chunks, threads)
        _for_each(_verify_file, list(zip(entries, targets, strict=True)), threads)
        (into / VERSION_FILE).write_bytes(encode_document(manifest.version))


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


@dataclass(frozen=True, slots=True)
class _Decoder:
    """Decodes chunks. Threads share it: chunks touch disjoint bytes of the targets and nothing else changes."""

    pack: _Source
    targets: Sequence[Bytes]
    bases: Sequence[_Base | None]

    def decode(self, chunk: Chunk) -> None:
        """Decode one chunk into its slice of the target file."""
        stream = chunk.stream
        out = self.targets[stream.file][stream.offset + chunk.start : stream.offset + chunk.end]
        if chunk.operation == "c":
            out[:] = self._base_bytes(chunk)
        elif chunk.operation == "f" and stream.layout is Layout.BYTES:
            self._decode_planes(chunk, [out])
        else:
            planes = [np.empty(section.raw_size, np.uint8) for section in chunk.sections]
            self._decode_planes(chunk, planes)
            if chunk.operation == "d":
                old = split_planes(stream.layout, self._base_bytes(chunk))
                planes = [add(stream.dtype, a, d) for a, d in zip(old, planes, strict=True)]
            join_planes(stream.layout, planes, out)

    def _decode_planes(self, chunk: Chunk, planes: Sequence[Bytes]) -> None:
        position = chunk.position
        for section, plane in zip(chunk.sections, planes, strict=True):
            dictionary = self._dictionary(chunk) if section.codec is SectionCodec.DICTIONARY else None
            decode_section_into(section, self.pack.read(position, section.coded_size), plane, dictionary)
            position += section.coded_size

    def _base_bytes(self, chunk: Chunk) -> Bytes:
        base = self.bases[chunk.row]
        if base is None or not base.partner.alike:
            raise _wrong_base(f"it lacks stream {chunk.stream.name or chunk.stream.path}")
        return np.frombuffer(base.read(chunk.start, chunk.end), np.uint8)

    def _dictionary(self, chunk: Chunk) -> bytes | None:
        base = self.bases[chunk.row]
        if chunk.operation != "f" or base is None or base.partner.stream.size_bytes > SECTION_LIMIT_BYTES:
            return None
        return base.read(0, base.partner.stream.size_bytes)


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


def _create_target(path: Path, size_bytes: int) -> Bytes:
    """Map a new file of zeros. Its blocks are reserved first: a full disk is an error here, not a SIGBUS later."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _FILE_MODE)
    try:
        if size_bytes == 0:
            return np.empty(0, np.uint8)
        os.posix_fallocate(descriptor, 0, size_bytes)
        return np.frombuffer(mmap.mmap(descriptor, size_bytes), np.uint8)
    finally:
        os.close(descriptor)


def _verify_file(item: tuple[FileEntry, Bytes]) -> None:
    entry, target = item
    digest = hashlib.sha256()
    for start in range(0, target.size, _HASH_BLOCK_BYTES):
        digest.update(target[start : start + _HASH_BLOCK_BYTES].data)
    if digest.hexdigest() != entry.sha256:
        raise ArtifactError(
            Code.DIGEST_MISMATCH, f"{entry.path} decodes to other bytes than were signed; publish the release again"
        )


def _for_each(work: Callable[[_Item], None], items: Iterable[_Item], threads: int) -> None:
    """Do `work` on every item in `threads` threads, this one among them; the first failure stops all and is raised."""
    waiting, lock = iter(items), threading.Lock()
    failures: list[BaseException] = []

    def drain() -> None:
        while not failures:
            with lock:
                item = next(waiting, None)
            if item is None:
                return
            try:
                work(item)
            except BaseException as error:  # noqa: BLE001  # raised again by the caller's thread
                failures.append(error)

    others = [threading.Thread(target=drain, name=f"decode-{number}") for number in range(1, threads)]
    for thread in others:
        thread.start()
    drain()
    for thread in others:
        thread.join()
    if failures:
        raise failures[0]


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
