"""What to ask the depot for, and what to believe of what comes: the fetch protocol, pure.

Frames of the index come first, because only they can be verified against the manifest; the index then verifies the
rest. Invariants: a frame counts only when its hash is right; `seen`, by which the depot paces itself and decides on
repeats, moves only by such frames, so that a stranger's bytes can neither stall nor hurry a pass; what is verified here
survives a crash only once it was journalled (see `due`).
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from wire.bitmap import Bitmap
from wire.index import Index, parse_index
from wire.manifest import FRAME_BYTES, Manifest
from wire.messages import WANT_RENEW_S, FrameMessage, Want

JOURNAL_EVERY_BYTES = 8 * 1024 * 1024
JOURNAL_EVERY_S = 1.0
"""Bounds of what a crash costs (docs/design.md section 4): one fdatasync per frame was 50 times slower."""
CREDIT_FIRST = 16
CREDIT_MOST = 128
"""15 MiB on their way, above the bandwidth-delay product of 1 Gbit/s at 100 ms."""
CREDIT_CAPPED_S = 4.0
"""With a bandwidth cap, credit is what this many seconds can take: more would only wait in buffers."""


class Judgement(StrEnum):
    """What became of a frame message."""

    NEW = "new"
    DUPLICATE = "duplicate"
    EARLY = "early"
    """A data frame before the index is known: it can be neither believed nor refused."""
    REFUSED = "refused"


@dataclass(slots=True)
class Credit:
    """How many frames the depot may be ahead: doubles while they arrive, halves after a silent renewal."""

    most: int
    value: int = CREDIT_FIRST

    def __post_init__(self) -> None:
        self.value = min(self.value, self.most)

    def grow(self) -> None:
        """All of it was used."""
        self.value = min(self.value * 2, self.most)

    def shrink(self) -> None:
        """Nothing came for a whole renewal."""
        self.value = max(self.value // 2, min(CREDIT_FIRST, self.most))


def credit_for(rate_limit_bytes_per_s: int) -> Credit:
    """Credit under a bandwidth cap; 0 means no cap."""
    if not rate_limit_bytes_per_s:
        return Credit(CREDIT_MOST)
    return Credit(max(2, min(CREDIT_MOST, int(rate_limit_bytes_per_s * CREDIT_CAPPED_S / FRAME_BYTES))))


class Fetch:
    """One artifact on its way; `verified` starts as the journal has it."""

    def __init__(self, node: str, artifact: str, manifest: Manifest, verified: Bitmap, credit: Credit) -> None:
        self._node = node
        self._artifact = artifact
        self._manifest = manifest
        self._index: Index | None = None
        self._index_frames = len(manifest.index_frames)
        self._verified = verified
        self._count = len(verified)
        self._index_left = sum(1 for frame in range(self._index_frames) if frame not in verified)
        self._credit = credit
        self._seen = (0, 0)
        self._asked: tuple[float, tuple[int, int]] | None = None
        self._unjournalled_bytes = 0
        self._unjournalled_since_s = 0.0
        self.refused = 0
        self.duplicates = 0

    @property
    def frames_total(self) -> int:
        """Frames of the artifact."""
        return self._verified.length

    @property
    def frames_verified(self) -> int:
        """Frames whose hash was right and that were written, journalled or not."""
        return self._count

    @property
    def verified(self) -> Bitmap:
        """A copy of the bitmap, for the journal."""
        return Bitmap(self._verified.length, self._verified.pack())

    @property
    def is_complete(self) -> bool:
        """True when every frame is there."""
        return self._count == self._verified.length

    @property
    def has_index(self) -> bool:
        """True from `open_index` on: every frame of data can be judged, and decoded."""
        return self._index is not None

    @property
    def needs_index(self) -> bool:
        """True when all frames of the index are there and `open_index` was not called yet."""
        return self._index is None and self._index_left == 0

    def open_index(self, data: bytes) -> None:
        """Take the verified bytes of the index; raises ArtifactError(bad_index)."""
        self._index = parse_index(data, self._manifest.pack_size_bytes - self._manifest.index_size_bytes)
        self._asked = None

    def judge(self, message: FrameMessage) -> Judgement:
        """Decide on a frame message. NEW has to be written at `offset` and then told to `wrote`.

        Frames that are there already are hashed too: they may be another node's, and move `seen` like any other.
        """
        if not 0 <= message.frame < self._verified.length:
            return self._refuse()
        start, end = self._manifest.frame_range(message.frame)
        if len(message.data) != end - start:
            return self._refuse()
        expected = self._expected(message.frame)
        if expected is None:
            return Judgement.EARLY
        if hashlib.sha256(message.data).digest() != expected:
            return self._refuse()
        epoch, seq = self._seen
        self._seen = (message.epoch, max(seq, message.seq) if message.epoch == epoch else message.seq)
        if message.frame in self._verified:
            self.duplicates += 1
            return Judgement.DUPLICATE
        return Judgement.NEW

    def offset(self, frame: int) -> int:
        """Where a frame lies in the pack."""
        return self._manifest.frame_range(frame)[0]

    def wrote(self, frame: int, now_s: float) -> None:
        """A NEW frame was written (not yet flushed)."""
        start, end = self._manifest.frame_range(frame)
        self._verified.set(frame)
        self._count += 1
        self._index_left -= frame < self._index_frames
        if not self._unjournalled_bytes:
            self._unjournalled_since_s = now_s
        self._unjournalled_bytes += end - start

    def due(self, now_s: float) -> bool:
        """True when the file should be flushed and then the journal written."""
        if not self._unjournalled_bytes:
            return False
        waited_s = now_s - self._unjournalled_since_s
        return self.is_complete or self._unjournalled_bytes >= JOURNAL_EVERY_BYTES or waited_s >= JOURNAL_EVERY_S

    def journalled(self) -> None:
        """Flush and journal row are done."""
        self._unjournalled_bytes = 0

    def begin_session(self) -> None:
        """The link is new: what was asked is void, what was on its way is lost, nothing of this session was seen."""
        self._asked = None
        self._seen = (0, 0)

    def want(self, now_s: float) -> Want | None:
        """The want to publish now, or None when the last one still holds."""
        if self._asked is not None:
            asked_s, asked_seen = self._asked
            arrived = self._seen[1] - asked_seen[1] if self._seen[0] == asked_seen[0] else self._credit.value
            waited = now_s - asked_s >= WANT_RENEW_S
            if 2 * arrived < self._credit.value and not waited:
                return None
            if arrived:
                self._credit.grow()
            elif waited:
                self._credit.shrink()
        self._asked = (now_s, self._seen)
        return self._want(self._missing())

    def farewell(self) -> Want:
        """The want that makes the depot forget this node: nothing is missing."""
        return self._want(Bitmap(self._verified.length))

    def _want(self, missing: Bitmap) -> Want:
        return Want(
            node=self._node,
            artifact=self._artifact,
            frames=missing.length,
            missing=Want.encode_missing(missing),
            seen_epoch=self._seen[0],
            seen_seq=self._seen[1],
            credit=self._credit.value,
        )

    def _missing(self) -> Bitmap:
        missing = self._verified.complement()
        if self._index is None:
            for frame in range(self._index_frames, missing.length):
                missing.clear(frame)
        return missing

    def _expected(self, frame: int) -> bytes | None:
        if frame < self._index_frames:
            return bytes.fromhex(self._manifest.index_frames[frame])
        return self._index.frame_hashes[frame - self._index_frames] if self._index else None

    def _refuse(self) -> Judgement:
        self.refused += 1
        return Judgement.REFUSED


def recheck(manifest: Manifest, read: Callable[[int, int], bytes]) -> Bitmap:
    """Frames that still have their hashes; those of data count as right while the index is wrong.

    `read` gives the bytes from start to end of the pack. Without the index nothing can be said of the data: it is
    fetched first, then asked again.
    """
    good = Bitmap.full(manifest.frame_count)
    expected = [bytes.fromhex(digest) for digest in manifest.index_frames]
    _clear_wrong(good, manifest, expected, 0, read)
    if len(good) == good.length:
        index = parse_index(read(0, manifest.index_size_bytes), manifest.pack_size_bytes - manifest.index_size_bytes)
        _clear_wrong(good, manifest, index.frame_hashes, len(expected), read)
    return good


def _clear_wrong(
    good: Bitmap, manifest: Manifest, expected: Sequence[bytes], first: int, read: Callable[[int, int], bytes]
) -> None:
    for frame, digest in enumerate(expected, first):
        if hashlib.sha256(read(*manifest.frame_range(frame))).digest() != digest:
            good.clear(frame)
