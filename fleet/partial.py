"""A pack that is on its way from an upstream depot: a file with holes, and which of its frames are right.

Invariant: a bit is set only for a frame whose hash was checked, in this life or an earlier one. Nothing is journalled:
after a crash every frame is hashed again, which takes a second for a gigabyte and believes nothing but the bytes.
"""

import os
from pathlib import Path

from host.files import move_file, preallocate, sync_data, write_at
from wire.bitmap import Bitmap
from wire.errors import ArtifactError
from wire.fetch import recheck
from wire.manifest import Manifest


class Partial:
    """An open partial pack at `path`; written by one thread, `bits` may be read by any."""

    def __init__(self, manifest: Manifest, path: Path) -> None:
        """Take up what is there, or make room. Raises StoreError (no_space, io_error)."""
        self.manifest = manifest
        self.path = path
        resumed = path.exists() and path.stat().st_size == manifest.pack_size_bytes
        if not resumed:
            preallocate(path, manifest.pack_size_bytes)
        self._descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self.verified = self._recheck() if resumed else Bitmap(manifest.frame_count)
        self.bits = int.from_bytes(self.verified.pack(), "little")
        """Bit per frame that can be read; replaced, never changed in place."""

    def write(self, frame: int, data: bytes) -> None:
        """Keep a frame that was verified; raises StoreError."""
        write_at(self._descriptor, data, self.manifest.frame_range(frame)[0])
        self.bits |= 1 << frame

    def index(self) -> bytes:
        """The bytes of the index; whole only when all of its frames are there."""
        return os.pread(self._descriptor, self.manifest.index_size_bytes, 0)

    def commit(self, final: Path) -> None:
        """Make it durable and give it its name; raises StoreError."""
        sync_data(self._descriptor)
        move_file(self.path, final)

    def close(self) -> None:
        """Release the file; idempotent."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _recheck(self) -> Bitmap:
        index_frames = len(self.manifest.index_frames)
        try:
            good = recheck(self.manifest, lambda start, end: os.pread(self._descriptor, end - start, start))
        except ArtifactError:  # an index that was signed and does not parse: nothing can be said of the data
            return Bitmap(self.manifest.frame_count)
        if any(frame not in good for frame in range(index_frames)):
            for frame in range(index_frames, good.length):
                good.clear(frame)
        return good
