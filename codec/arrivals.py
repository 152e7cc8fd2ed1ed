"""Which chunks of a pack can be decoded by now: those whose frames are all there.

Frames arrive in any order, while others are decoded. Invariant: every chunk is handed out once, the first of a pack
first among those that are ready, so that hashing, which goes by files' order, is not left behind. No I/O.
"""

import heapq
import threading
from collections import defaultdict
from collections.abc import Iterable, Sequence

from codec.plan import Chunk
from wire.errors import ArtifactError, Code
from wire.manifest import FRAME_BYTES, Manifest


class Arrivals:
    """Hands chunks to decoding threads as their frames arrive."""

    def __init__(self, manifest: Manifest, chunks: Sequence[Chunk]) -> None:
        self._chunks = chunks
        self._missing: list[int] = []
        self._waiting: dict[int, list[int]] = defaultdict(list)
        self._frame_count = manifest.frame_count
        self._ready: list[int] = []
        self._left = len(chunks)
        self._taken_bytes, self._total_bytes = 0, sum(chunk.end - chunk.start for chunk in chunks)
        self._failure: BaseException | None = None
        self._changed = threading.Condition()
        for number, chunk in enumerate(chunks):
            frames = _frames_of(manifest, chunk)
            self._missing.append(len(frames))
            for frame in frames:
                self._waiting[frame].append(number)
            if not frames:
                self._ready.append(number)

    def add(self, frames: Iterable[int]) -> None:
        """These frames are in the pack and right; again is no harm. ArtifactError for one that no pack has."""
        with self._changed:
            for frame in frames:
                if not 0 <= frame < self._frame_count:
                    raise ArtifactError(Code.BAD_INDEX, f"the pack has no frame {frame}; this is a defect of the agent")
                for number in self._waiting.pop(frame, ()):
                    self._missing[number] -= 1
                    if self._missing[number] == 0:
                        heapq.heappush(self._ready, number)
            self._changed.notify_all()

    def end(self) -> None:
        """No more frames will come: whoever still waits for some fails."""
        if self._waiting:
            self.fail(ArtifactError(Code.CORRUPT, "the fetch ended before the pack was whole; fetch it again"))

    def fail(self, error: BaseException) -> None:
        """Hand out nothing more; the first error is the one that `check` raises."""
        with self._changed:
            self._failure = self._failure or error
            self._changed.notify_all()

    def take(self) -> Chunk | None:
        """The next chunk, waiting until one is ready; None when there is none any more or something failed."""
        with self._changed:
            while not self._failure and self._left and not self._ready:
                self._changed.wait()
            if self._failure or not self._left:
                return None
            self._left -= 1
            if not self._left:
                self._changed.notify_all()
            chunk = self._chunks[heapq.heappop(self._ready)]
            self._taken_bytes += chunk.end - chunk.start
            return chunk

    @property
    def taken(self) -> tuple[int, int]:
        """Decoded bytes of the chunks handed out so far, and of all."""
        return self._taken_bytes, self._total_bytes

    def check(self) -> None:
        """Raise what failed."""
        if self._failure is not None:
            raise self._failure


def _frames_of(manifest: Manifest, chunk: Chunk) -> range:
    """Frames that hold the chunk's sections; none for a copy."""
    coded_bytes = sum(section.coded_size for section in chunk.sections)
    if not coded_bytes:
        return range(0)
    start = chunk.position - manifest.index_size_bytes
    first = len(manifest.index_frames)
    return range(first + start // FRAME_BYTES, first + (start + coded_bytes - 1) // FRAME_BYTES + 1)
