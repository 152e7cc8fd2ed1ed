"""One file of a version while it is decoded: mapped, filled in any order by any thread, hashed in its own order.

SHA-256 has one direction and chunks are done in any. So whichever thread closes a gap hashes all that is whole by then,
while it is still in the cache and the other threads go on decoding: hashing costs no second pass over the file.
Invariant: a byte is hashed once, after the chunk that holds it is done, and never changes afterwards. A crash leaves a
file without `version.json`.
"""

import hashlib
import mmap
import os
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from codec.planes import Bytes
from wire.errors import ArtifactError, Code
from wire.manifest import FileEntry

_FILE_MODE = 0o640


class Target:
    """A new file of `entry`'s size below `directory`, all zeros; `starts` are where its chunks begin, ascending."""

    def __init__(self, directory: Path, entry: FileEntry, starts: Sequence[int]) -> None:
        self.entry = entry
        self.bytes = _map_new_file(directory / entry.path, entry.size_bytes)
        self._starts = starts
        self._done = [False] * len(starts)
        self._first_open = 0
        self._number = {start: number for number, start in enumerate(starts)}
        self._lock = threading.Lock()
        self._hashing = False
        self._hashed_bytes = 0
        self._digest = hashlib.sha256()

    def finish_chunk(self, start: int) -> None:
        """The chunk that begins at `start` is whole; hash what can be hashed by now unless somebody is at it."""
        with self._lock:
            self._done[self._number[start]] = True
            if self._hashing:
                return
            self._hashing = True
        while (end := self._next_end()) is not None:
            self._digest.update(self.bytes[self._hashed_bytes : end].data)
            self._hashed_bytes = end

    def verify(self) -> None:
        """ArtifactError(digest_mismatch) unless the file, all of whose chunks are done, is the signed one."""
        self._digest.update(self.bytes[self._hashed_bytes :].data)
        self._hashed_bytes = self.entry.size_bytes
        if self._digest.hexdigest() != self.entry.sha256:
            raise ArtifactError(
                Code.DIGEST_MISMATCH,
                f"{self.entry.path} decodes to other bytes than were signed; publish the release again",
            )

    def _next_end(self) -> int | None:
        """Where the whole part ends when that is further than what is hashed; else None, and nobody hashes any more."""
        with self._lock:
            while self._first_open < len(self._done) and self._done[self._first_open]:
                self._first_open += 1
            whole = self._first_open == len(self._done)
            end = self.entry.size_bytes if whole else self._starts[self._first_open]
            self._hashing = end > self._hashed_bytes
            return end if self._hashing else None


def _map_new_file(path: Path, size_bytes: int) -> Bytes:
    """Map a new file of zeros. Its blocks are reserved first: a full disk is an error here, not a SIGBUS later."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _FILE_MODE)
    try:
        if size_bytes == 0:
            return np.empty(0, np.uint8)
        os.posix_fallocate(descriptor, 0, size_bytes)
        return np.frombuffer(mmap.mmap(descriptor, size_bytes), np.uint8)
    finally:
        os.close(descriptor)
