"""The only module that makes bytes durable: every fsync, rename, chmod and removal of the project is here.

Invariant: what is at its final name is whole and on the disk. A file or directory is written under a temporary name in
the same file system, flushed, renamed, and the directory that holds the name is flushed.
A crash leaves either the old thing, the new thing, or a temporary name (`.NAME.tmp`) that the next write replaces.
Foreign OSErrors are wrapped here, once, as StoreError; a missing file stays FileNotFoundError, which is no fault.
"""

# ruff: noqa: PTH101, PTH102, PTH104, PTH105, PTH108
# Every change of the disk is a call of `os`, so that the crash matrix can count them and kill at each.

import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from wire.errors import Code, StoreError

READ_ONLY_FILE = 0o440
READ_ONLY_DIRECTORY = 0o550
_WRITABLE_DIRECTORY = 0o750


def write_atomically(path: Path, data: bytes, *, mode: int = 0o640) -> None:
    """Replace `path` by `data` so that a reader, and a reader after a power cut, sees all of the old or the new.

    Raises StoreError (no_space, io_error).
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with _wrapped(path):
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
        try:
            os.fchmod(descriptor, mode)
            _write_all(descriptor, data)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
        _sync_directory(path.parent)


def commit_directory(temporary: Path, final: Path) -> None:
    """Make `temporary` durable and read-only and give it its `final` name; both must be on one file system.

    Files become 0440 and directories 0550. Links and special files are refused. Raises StoreError; corrupt when
    `final` exists, because an immutable directory is never replaced.
    """
    if final.exists():
        raise StoreError(Code.CORRUPT, f"{final} exists already and is never replaced; remove it first")
    with _wrapped(final):
        directories = [temporary]
        for entry in _walk(temporary):
            if entry.is_dir(follow_symlinks=False):
                directories.append(Path(entry.path))
                continue
            if not entry.is_file(follow_symlinks=False):
                raise StoreError(Code.CORRUPT, f"{entry.path} is no plain file; only plain files are committed")
            os.chmod(entry.path, READ_ONLY_FILE)
            _sync_path(entry.path, os.O_RDONLY)
        for directory in reversed(directories[1:]):
            os.chmod(directory, READ_ONLY_DIRECTORY)
            _sync_directory(directory)
        _sync_directory(temporary)
        os.rename(temporary, final)
        seal_directory(final)
        _sync_directory(final.parent)
        if temporary.parent != final.parent:
            _sync_directory(temporary.parent)


def seal_directory(directory: Path) -> None:
    """Make a committed directory read-only; apart from commit_directory only for one that a crash left writable.

    It happens after the rename, because moving a directory needs write permission on it.
    """
    with _wrapped(directory):
        os.chmod(directory, READ_ONLY_DIRECTORY)
        _sync_directory(directory)


def sync_files(directory: Path) -> None:
    """Flush every plain file below `directory`, so that a later commit_directory has little left to wait for."""
    with _wrapped(directory):
        for entry in _walk(directory):
            if entry.is_file(follow_symlinks=False):
                _sync_path(entry.path, os.O_RDONLY)


def move_file(source: Path, target: Path) -> None:
    """Rename a file durably within one directory, replacing `target`."""
    with _wrapped(source):
        os.replace(source, target)
        _sync_directory(target.parent)


def move_directory(source: Path, target: Path) -> None:
    """Rename a directory, read-only ones included, durably; `target` must be free and on the same file system."""
    with _wrapped(source):
        os.chmod(source, _WRITABLE_DIRECTORY)
        os.rename(source, target)
        _sync_directory(target.parent)
        _sync_directory(source.parent)


def make_directory(directory: Path, *, mode: int = _WRITABLE_DIRECTORY) -> None:
    """Create `directory` and its missing parents durably; no fault when it exists."""
    with _wrapped(directory):
        missing = []
        probe = directory
        while not probe.exists():
            missing.append(probe)
            probe = probe.parent
        for level in reversed(missing):
            os.mkdir(level, mode)
            _sync_directory(level.parent)


def preallocate(path: Path, size_bytes: int) -> None:
    """Make `path` a file of exactly `size_bytes` with blocks behind it; bytes that are there already stay.

    Raises StoreError(no_space) before anything depends on the room.
    """
    with _wrapped(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        try:
            if size_bytes:
                os.posix_fallocate(descriptor, 0, size_bytes)
            os.ftruncate(descriptor, size_bytes)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        _sync_directory(path.parent)


def sync_data(descriptor: int) -> None:
    """Flush the data of an open file (fdatasync); raises StoreError."""
    with _wrapped(f"file descriptor {descriptor}"):
        os.fdatasync(descriptor)


def write_at(descriptor: int, data: bytes, offset: int) -> None:
    """Write all of `data` at `offset`, not durable before sync_data; raises StoreError."""
    with _wrapped(f"file descriptor {descriptor}"):
        view = memoryview(data)
        while view:
            written = os.pwrite(descriptor, view, offset)
            view, offset = view[written:], offset + written


def remove_file(path: Path) -> None:
    """Remove a file durably; no fault when it is gone."""
    with _wrapped(path):
        try:
            os.unlink(path)
        except FileNotFoundError:
            return
        _sync_directory(path.parent)


def remove_tree(path: Path) -> None:
    """Remove a directory with everything in it, read-only directories included; no fault when it is gone.

    Links are removed, never followed.
    """
    with _wrapped(path):
        if not os.path.lexists(path):
            return
        if path.is_symlink() or not path.is_dir():
            os.unlink(path)
        else:
            os.chmod(path, _WRITABLE_DIRECTORY)
            for entry in _walk(path):
                if entry.is_dir(follow_symlinks=False):
                    os.chmod(entry.path, _WRITABLE_DIRECTORY)
            shutil.rmtree(path)
        _sync_directory(path.parent)


def read_bounded(path: Path, limit_bytes: int) -> bytes:
    """The bytes of a file that must not be longer than `limit_bytes`.

    Raises FileNotFoundError, and StoreError: corrupt when it is longer, io_error otherwise.
    """
    with _wrapped(path), path.open("rb") as file:
        data = file.read(limit_bytes + 1)
    if len(data) > limit_bytes:
        raise StoreError(Code.CORRUPT, f"{path} is longer than {limit_bytes} bytes; it is not what was written here")
    return data


def lock_directory(directory: Path) -> int:
    """Hold `directory` for this process until it ends: keep the descriptor. StoreError when another process has it."""
    with _wrapped(directory):
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise StoreError(Code.IO_ERROR, f"another process works in {directory}; stop it first") from error
    return descriptor


def free_bytes(path: Path) -> int:
    """Bytes that an unprivileged process can still write on the file system of `path`."""
    with _wrapped(path):
        figures = os.statvfs(path)
    return figures.f_bavail * figures.f_frsize


def tree_size_bytes(path: Path) -> int:
    """Bytes of the plain files below `path`; 0 when it is missing."""
    if not path.is_dir():
        return 0
    with _wrapped(path):
        entries = (entry for entry in _walk(path) if stat.S_ISREG(entry.stat(follow_symlinks=False).st_mode))
        return sum(entry.stat(follow_symlinks=False).st_size for entry in entries)


def _walk(directory: Path) -> Iterator[os.DirEntry[str]]:
    """Entries below `directory`, a directory before what it holds, so that it can be opened up first."""
    pending = [str(directory)]
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in list(entries):
                yield entry
                if entry.is_dir(follow_symlinks=False):
                    pending.append(entry.path)


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _sync_directory(directory: Path) -> None:
    _sync_path(directory, os.O_RDONLY | os.O_DIRECTORY)


def _sync_path(path: str | Path, flags: int) -> None:
    descriptor = os.open(path, flags | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _wrapped(what: Path | str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise _store_error(error, what) from error


def _store_error(error: OSError, what: Path | str) -> StoreError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StoreError(Code.NO_SPACE, f"no room to write {what}: free space on its file system")
    reason = os.strerror(error.errno) if error.errno else str(error)
    return StoreError(Code.IO_ERROR, f"{what}: {reason}; check the disk and the owner of the store")
