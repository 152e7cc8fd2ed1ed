"""What to ask the depot for, and what to believe of what comes: the fetch protocol, pure.

Frames of the index come first, because only they can be verified against the manifest; the index then verifies the
rest. Invariants: a frame counts only when its hash is right; `seen`, by which the depot paces itself and decides on
repeats, moves only by such frames, so that a stranger's bytes can neither stall nor hurry a pass; what is verified here
survives a crash only once it was journalled (see `due`).
"""

import hashlib
import math
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
CREDIT_LEAST = 2
CREDIT_SHARES = 8
"""Of a small pack no more than one in so many frames: what has been sent already a later node cannot share."""
CREDIT_HORIZON_S = 4.0
"""Credit is at most what the node takes in this many seconds: more would only wait in the broker and in buffers."""
TIME_STEP_S = 0.001
LOSS_SHARE = 1 / 16
"""Lost frames per frame that came, from which a renewal counts as lossy."""


class Judgement(StrEnum):
    """What became of a frame message."""

    NEW = "new"
    DUPLICATE = "duplicate"
    EARLY = "early"
    """A data frame before the index is known: it can be neither believed nor refused."""
    REFUSED = "refused"


@dataclass(slots=True)
class Credit:
    """How many frames the depot may be ahead: slow start, halved by loss and silence, bounded by the node's goodput."""

    most: int
    value: int = CREDIT_FIRST

    def __post_init__(self) -> None:
        self.value = min(self.value, self.most)

    def adapt(self, arrived: int, lost: int, elapsed_s: float) -> None:
        """A want is renewed: so many frames came, and did not, in the seconds since the one before."""
        halved = max(self.value // 2, CREDIT_LEAST)
        if not arrived or lost > LOSS_SHARE * arrived:
            self.value = min(self.value, max(halved, CREDIT_FIRST))
            return
        enough = math.ceil(CREDIT_HORIZON_S * arrived / max(elapsed_s, TIME_STEP_S))
        self.value = min(2 * self.value, self.most, max(enough, halved))


def credit_for(rate_limit_bytes_per_s: int) -> Credit:
    """Credit under a bandwidth cap; 0 means no cap."""
    if not rate_limit_bytes_per_s:
        return Credit(CREDIT_MOST)
    frames = int(rate_limit_bytes_per_s * CREDIT_HORIZON_S / FRAME_BYTES)
    return Credit(max(CREDIT_LEAST, min(CREDIT_MOST, frames)))


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
        self.set_credit(credit)
        self._seen = (0, 0)
        self._heard = 0
        """Frame messages of the depot that `seen` names, since the last want."""
        self._silent = False
        """Nothing came for a whole renewal: the next depot that is heard is followed."""
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

    @property
    def credit(self) -> int:
        """Frames that the depot may be ahead."""
        return self._credit.value

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
        self._note_seen(message.epoch, message.seq)
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

    def set_credit(self, credit: Credit) -> None:
        """The link that comes is another: as fast as it may be, and no faster, frames are asked for."""
        self._credit = credit
        self._credit.most = min(credit.most, max(CREDIT_FIRST, self._verified.length // CREDIT_SHARES))

    def begin_session(self) -> None:
        """The link is new: what was asked is void, what was on its way is lost, nothing of this session was seen."""
        self._asked = None
        self._seen, self._heard, self._silent = (0, 0), 0, False

    def want(self, now_s: float) -> Want | None:
        """The want to publish now, or None when the last one still holds."""
        if self._asked is not None:
            asked_s, (epoch, seq) = self._asked
            elapsed_s = now_s - asked_s
            waited = elapsed_s >= WANT_RENEW_S
            changed = self._seen[0] != epoch
            if 2 * self._heard < self._credit.value and not waited and not changed:
                return None
            lost = self._seen[1] - seq - self._heard if seq and not changed else 0
            self._credit.adapt(self._heard, lost, elapsed_s)
            self._silent = not self._heard
        self._asked, self._heard = (now_s, self._seen), 0
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
            silent=self._silent,
            credit=self._credit.value,
        )

    def _note_seen(self, epoch: int, seq: int) -> None:
        """Of several depots all nodes follow the one of the lowest epoch, until it falls silent."""
        followed = self._seen[0]
        if epoch == followed:
            self._seen = (epoch, max(self._seen[1], seq))
        elif not followed or epoch < followed or self._silent:
            self._seen, self._heard = (epoch, seq), 0
        else:
            return
        self._heard += 1
        self._silent = False

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
