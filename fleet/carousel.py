"""Which frame of an artifact to publish next, and for whom: the depot's logic, pure (docs/design.md section 4).

One Carousel stands for one artifact. Readers say what they miss, how far they have come (`seen`) and how far the depot
may run ahead (`credit`); the carousel walks the union of what is missing in one cyclic pass, the index first.
Invariants: a frame is published again for a reader only when the reader's `seen` has passed it, or everything that was
on its way to the reader is given up as lost, or the reader came after it; no frame is published unless a reader who
needs it has credit left; a reader can cost at most BUDGET_PASSES passes per BUDGET_WINDOW_S.
Nothing here survives a restart: a new epoch starts, and every want that is renewed joins anew.
"""

import math
from collections import deque
from dataclasses import dataclass
from itertools import islice

from wire.bitmap import Bitmap
from wire.messages import WANT_VOID_S

GATHER_S = 0.1
GATHER_MOST_S = 0.5
"""A pass over the data begins when no further reader came for GATHER_S: a rollout starts its nodes together, and what
waits for all of them need not be repeated for the later ones. With all of them here it begins at once.
A frame of the index goes out at once too, and again after GATHER_S at the earliest, for all who came meanwhile."""
PATIENCE_FIRST_S = 4.0
"""Silence after which what is on its way counts as lost; below WANT_RENEW_S, so that one silent renewal is enough."""
PATIENCE_MOST_S = 60.0
HISTORY_FRAMES = 16 * 1024
"""Publications remembered: four times the largest credit. What is older counts as passed."""
BUDGET_PASSES = 8
BUDGET_SPARE_FRAMES = 64
BUDGET_WINDOW_S = 600.0
EXPIRE_EVERY_S = 1.0


@dataclass(slots=True)
class _Reader:
    """One node that wants the artifact."""

    needs: Bitmap
    """What it misses, less what is on its way to it."""
    position: int
    """Everything published up to this seq was passed by it, is given up for it, or came before it."""
    credit: int
    renewed_s: float
    seen: int = 0
    lost_up_to: int = 0
    patience_s: float = PATIENCE_FIRST_S
    has_index: bool = False
    silent_since_s: float | None = None
    """Since when something published beyond `position` has had no answer; None when nothing is on its way."""


@dataclass(slots=True)
class _Budget:
    left: int
    ends_s: float


class Carousel:
    """The wants for one artifact and the pass over what they miss; `epoch` is random per start of the depot."""

    def __init__(self, frames: int, index_frames: int, epoch: int) -> None:
        self.frames = frames
        self.epoch = epoch
        self.seq = 0
        self.over_budget = 0
        self.available = -1
        """Bit per frame: what can be published now. All ones, but for a pack that is still on its way to here."""
        self.company = 0
        """Nodes that could want this, as far as is known; once all of them are here, nobody is waited for."""
        self._index_mask = (1 << index_frames) - 1
        self._index_sent_s = [-math.inf] * index_frames
        self._readers: dict[str, _Reader] = {}
        self._budgets: dict[str, _Budget] = {}
        self._published: deque[int] = deque(maxlen=HISTORY_FRAMES)
        self._wanted = 0
        """Bit per frame: a superset of what a reader with credit needs."""
        self._pointer = 0
        self._opens_s: float | None = None
        """When the pass over the data may begin; None while nobody wants data."""
        self._gathering_ends_s = 0.0
        self._expire_due_s = 0.0

    @property
    def readers(self) -> int:
        """Nodes whose want holds."""
        return len(self._readers)

    @property
    def is_idle(self) -> bool:
        """True when nothing of this state is needed any more: no reader, and no budget that somebody used up."""
        return not self._readers and not self._budgets

    def on_want(self, node: str, missing: Bitmap, seen: tuple[int, int], credit: int, now_s: float) -> None:
        """A node renewed its want; `seen` is (epoch, seq), `missing` has as many bits as the artifact has frames.

        With another epoch in `seen`, another depot serves the node; with 0 nobody does.
        """
        if not len(missing) or seen[0] not in (0, self.epoch):
            self.drop(node)
            return
        seq = min(seen[1], self.seq) if seen[0] else 0
        reader = self._readers.get(node)
        if reader is None or (reader.seen and not seq):  # new here, or a new life that has seen nothing of ours
            reader = self._readers[node] = _Reader(Bitmap(self.frames), self.seq, credit, now_s, seen=seq)
        else:
            self._note_progress(reader, seq, now_s)
        reader.credit, reader.renewed_s = credit, now_s
        reader.needs = self._needs_beyond(missing, reader.position)
        if self._allowance(node, now_s) <= 0:
            self.over_budget += 1
            reader.needs = Bitmap(self.frames)
        self._want(reader, now_s)

    def drop(self, node: str) -> None:
        """Forget a node: it is done, its will was published, or its want is void."""
        if self._readers.pop(node, None) is not None and not self._readers:
            self._wanted, self._opens_s = 0, None

    def next_frame(self, now_s: float) -> tuple[int, int] | None:
        """(frame, seq) to publish now, which is then counted as published; None when there is nothing to do yet."""
        self._expire(now_s)
        while (frame := self._candidate(now_s)) is not None:
            takers = [(node, reader) for node, reader in self._readers.items() if frame in reader.needs]
            if any(self._has_credit(reader) for _, reader in takers):
                self._publish(frame, takers, now_s)
                return frame, self.seq
            self._recollect()
        return None

    def _note_progress(self, reader: _Reader, seq: int, now_s: float) -> None:
        if seq > reader.seen:
            if seq <= reader.lost_up_to:  # it was late, not lost: be more patient with this reader
                reader.patience_s = min(2 * reader.patience_s, PATIENCE_MOST_S)
            reader.seen = seq
            reader.position = max(reader.position, seq)
            reader.silent_since_s = now_s if self.seq > reader.position else None
        elif reader.silent_since_s is not None and now_s - reader.silent_since_s >= reader.patience_s:
            reader.position = reader.lost_up_to = self.seq
            reader.silent_since_s = None

    def _needs_beyond(self, missing: Bitmap, position: int) -> Bitmap:
        """`missing` less the frames that were published after `position`."""
        needs = Bitmap(self.frames, missing.pack())
        for frame in islice(reversed(self._published), self.seq - position):
            needs.clear(frame)
        return needs

    def _want(self, reader: _Reader, now_s: float) -> None:
        bits = int.from_bytes(reader.needs.pack(), "little")
        self._wanted |= bits
        reader.has_index = reader.has_index or bits & ~self._index_mask != 0
        if self._opens_s is None:
            if not reader.has_index:
                return
            self._gathering_ends_s = now_s + GATHER_MOST_S
            self._opens_s = now_s + GATHER_S
        elif now_s < self._opens_s:
            self._opens_s = min(now_s + GATHER_S, self._gathering_ends_s)
        if now_s < self._opens_s and 0 < self.company <= sum(each.has_index for each in self._readers.values()):
            self._opens_s = now_s

    def _candidate(self, now_s: float) -> int | None:
        wanted = self._wanted & self.available
        for frame, sent_s in enumerate(self._index_sent_s if wanted & self._index_mask else ()):
            if wanted >> frame & 1 and now_s - sent_s >= GATHER_S:
                return frame
        wanted &= ~self._index_mask
        if not wanted or self._opens_s is None or now_s < self._opens_s:
            return None
        if ahead := wanted >> self._pointer:
            return self._pointer + _lowest(ahead)
        return _lowest(wanted)

    def _has_credit(self, reader: _Reader) -> bool:
        return self.seq - reader.position < reader.credit

    def _recollect(self) -> None:
        """A reader ran out of credit: what only such readers need waits until they renew their want."""
        self._wanted = 0
        for reader in self._readers.values():
            if self._has_credit(reader):
                self._wanted |= int.from_bytes(reader.needs.pack(), "little")

    def _publish(self, frame: int, takers: list[tuple[str, _Reader]], now_s: float) -> None:
        self.seq += 1
        self._published.append(frame)
        if self._index_mask >> frame & 1:
            self._index_sent_s[frame] = now_s
        else:  # a late reader's index does not send the pass back to its start
            self._pointer = frame + 1
        self._wanted &= ~(1 << frame)
        for node, reader in takers:
            reader.needs.clear(frame)
            self._budgets[node].left -= 1
            if not self._budgets[node].left:
                reader.needs = Bitmap(self.frames)
        for reader in self._readers.values():
            if reader.silent_since_s is None:
                reader.silent_since_s = now_s

    def _allowance(self, node: str, now_s: float) -> int:
        budget = self._budgets.get(node)
        if budget is None or now_s >= budget.ends_s:
            left = BUDGET_PASSES * self.frames + BUDGET_SPARE_FRAMES
            budget = self._budgets[node] = _Budget(left, now_s + BUDGET_WINDOW_S)
        return budget.left

    def _expire(self, now_s: float) -> None:
        if now_s < self._expire_due_s:
            return
        self._expire_due_s = now_s + EXPIRE_EVERY_S
        for node in [node for node, reader in self._readers.items() if now_s - reader.renewed_s >= WANT_VOID_S]:
            self.drop(node)
        for node in [node for node, budget in self._budgets.items() if now_s >= budget.ends_s]:
            if node not in self._readers:
                del self._budgets[node]


def _lowest(bits: int) -> int:
    return (bits & -bits).bit_length() - 1
