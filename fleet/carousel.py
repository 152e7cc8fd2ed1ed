"""Which frame of one artifact to publish next: pure logic of the carousel (docs/design.md section 4).

The depot walks the union of what its nodes lack in one cyclic pass and publishes each frame once for all. A frame is
repeated only for a node that lacks it although its `seen` has passed the last publication; a node that joins late has
passed everything published before it came. A want that is renewed without progress while nothing is left to publish
means that what was in flight is lost.

Invariant: at most `credit` frames lie between the fastest node's `seen` and the last publication.
"""

from collections import deque
from dataclasses import dataclass, field

from wire.messages import WANT_VOID_S, Want

LOST_AFTER_S = 2.0
"""Silence of the depot after which an unchanged `seen` means loss and not delay."""


@dataclass(slots=True)
class _Listener:
    """One node's want: bitmaps as integers, bit i for frame i."""

    missing: int
    pending: int
    """Missing and not in flight to this node."""
    passed: int
    """seq up to which everything published has reached this node or never will."""
    credit: int
    renewed_s: float
    said: tuple[int, int]


@dataclass(slots=True)
class Carousel:
    """The pass over one artifact of `frames` frames; `epoch` is the depot's."""

    frames: int
    epoch: int
    seq: int = 0
    _cursor: int = 0
    _published_s: float = 0.0
    _recent: deque[tuple[int, int]] = field(default_factory=deque)
    """(seq, frame) of publications that some listener has not passed, oldest first."""
    _listeners: dict[str, _Listener] = field(default_factory=dict)

    def want(self, want: Want, now_s: float) -> None:
        """Take a node's want; one without missing frames is a farewell. Raises ArtifactError on a wrong bitmap."""
        missing = int.from_bytes(want.missing_frames().pack(), "little")
        if want.frames != self.frames or not missing:
            self._listeners.pop(want.node, None)
            return
        before = self._listeners.get(want.node)
        passed = self.seq if before is None else before.passed
        said = (want.seen_epoch, want.seen_seq)
        if want.seen_epoch == self.epoch:
            passed = max(passed, min(want.seen_seq, self.seq)) if before is not None else passed
        stuck = before is not None and before.said == said and now_s - self._published_s >= LOST_AFTER_S
        if stuck and not self._pending():
            passed = self.seq
        pending = missing
        for seq, frame in self._recent:
            if seq > passed:
                pending &= ~(1 << frame)
        self._listeners[want.node] = _Listener(missing, pending, passed, want.credit, now_s, said)
        self._forget_passed()

    def leave(self, node: str) -> None:
        """The node went off line."""
        self._listeners.pop(node, None)

    def is_idle(self, now_s: float) -> bool:
        """True when nobody wants anything any more."""
        self._void(now_s)
        return not self._listeners

    def next_frame(self, now_s: float) -> tuple[int, int] | None:
        """(seq, frame) to publish now, or None: nobody lacks anything, or the credit is used up."""
        self._void(now_s)
        if not self._listeners:
            return None
        fastest = max(self._listeners.values(), key=lambda listener: listener.passed)
        if self.seq - fastest.passed >= fastest.credit:
            return None
        pending = self._pending()
        if not pending:
            return None
        ahead = pending >> self._cursor << self._cursor
        chosen = ahead or pending
        frame = (chosen & -chosen).bit_length() - 1
        self.seq += 1
        self._cursor = (frame + 1) % self.frames
        self._published_s = now_s
        self._recent.append((self.seq, frame))
        for listener in self._listeners.values():
            listener.pending &= ~(1 << frame)
        return self.seq, frame

    def _pending(self) -> int:
        union = 0
        for listener in self._listeners.values():
            union |= listener.pending
        return union

    def _void(self, now_s: float) -> None:
        gone = [node for node, listener in self._listeners.items() if now_s - listener.renewed_s > WANT_VOID_S]
        for node in gone:
            del self._listeners[node]

    def _forget_passed(self) -> None:
        slowest = min(listener.passed for listener in self._listeners.values())
        while self._recent and self._recent[0][0] <= slowest:
            self._recent.popleft()
