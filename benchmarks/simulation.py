"""A fleet on a virtual clock: the depot's carousel and the nodes' fetches as they are, links that do what links may do.

Deterministic: one seed, one history. Simulated are time, links, the broker's queue and crashes; what is published,
asked and believed is decided by fleet/carousel.py and wire/fetch.py alone. Every depot hears every want and every node
hears every depot, as over one broker. What may never happen raises AssertionError at the moment it happens.
"""

import hashlib
import heapq
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest import mock

from benchmarks.packs import Artifact
from fleet.carousel import Carousel
from wire import fetch as fetch_module
from wire.bitmap import Bitmap
from wire.fetch import Fetch, Judgement, credit_for
from wire.messages import FrameMessage, Want

NODE_TICK_S = 0.5
POLL_FIRST_S = 0.02
POLL_MOST_S = 1.0
BROKER_QUEUE_FRAMES = 1000
"""What Mosquitto keeps for one slow reader before it drops (fleet/broker.py MAX_QUEUED_MESSAGES)."""


@dataclass(frozen=True)
class Weather:
    """How a node hears and is heard; the default is a fine day on a quick link."""

    delay_s: float = 0.01
    jitter_s: float = 0.0
    """Uniformly on top of the delay, for each message alone: so messages overtake each other."""
    frame_s: float = 0.001
    """What one frame takes on the node's link."""
    loss: float = 0.0
    want_loss: float = 0.0
    duplicates: float = 0.0
    damage: float = 0.0
    """Share of frames that arrive a second time with a bit turned."""
    breaks_s: tuple[float, ...] = ()
    """When the bulk link breaks; what is on its way is lost, the node connects anew."""
    crashes_s: tuple[float, ...] = ()
    """When the node starts anew, with what its journal holds."""


@dataclass
class Node:
    """One node: a Fetch, the journal's bitmap, and the frames in its staging file."""

    name: str
    artifact: Artifact
    weather: Weather
    starts_s: float = 0.0
    rate_limit_bytes_per_s: int = 0
    journal: Bitmap = field(init=False)
    fetch: Fetch = field(init=False)
    session: int = 0
    """0 before the start; frames and wants of another session reach nobody."""
    free_s: float = 0.0
    received: int = 0
    lost: int = 0
    """Frames that were published while it listened and never came."""
    done_s: float | None = None
    stored: set[int] = field(default_factory=set)
    """Frames written in this life, or journalled in an earlier one."""

    def __post_init__(self) -> None:
        self.journal = Bitmap(self.artifact.manifest.frame_count)
        self.boot()

    def boot(self) -> None:
        """Begin a life with what the journal holds."""
        verified = Bitmap(self.journal.length, self.journal.pack())
        self.stored = set(verified)
        credit = credit_for(self.rate_limit_bytes_per_s)
        self.fetch = Fetch(self.name, self.artifact.digest, self.artifact.manifest, verified, credit)
        self._open_index()

    def take(self, message: FrameMessage, now_s: float) -> None:
        """What agent/transfer.py does with a frame, with checks."""
        self.received += 1
        if self.fetch.judge(message) is not Judgement.NEW:
            return
        assert message.frame not in self.journal, f"{self.name} stores verified frame {message.frame} again"
        assert message.frame not in self.stored, f"{self.name} stores frame {message.frame} twice"
        assert message.data == self.artifact.frame(message.frame), f"{self.name} believes a damaged frame"
        self.stored.add(message.frame)
        self.fetch.wrote(message.frame, now_s)
        self._open_index()
        self.flush(now_s)

    def flush(self, now_s: float) -> None:
        """Journal what is due."""
        if self.fetch.due(now_s):
            self.journal = self.fetch.verified
            self.fetch.journalled()

    def _open_index(self) -> None:
        if self.fetch.needs_index:
            self.fetch.open_index(self.artifact.pack[: self.artifact.manifest.index_size_bytes])


@dataclass
class Depot:
    """One start of a depot after the other; the epoch tells them apart."""

    epoch: int
    carousel: Carousel
    frame_s: float
    published: int = 0
    poll_s: float = POLL_FIRST_S
    turn: int = 0
    """Only the latest turn that was arranged takes place."""


class World:
    """Depots and nodes of one artifact, from the first want until every node is complete."""

    def __init__(self, nodes: list[Node], seed: int, *, depots: int = 1, depot_frame_s: float = 0.0005) -> None:
        self.artifact = nodes[0].artifact
        self.nodes = nodes
        self.now_s = 0.0
        self.restarts = 0
        self._random = random.Random(seed)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self._finished: list[str] = []
        self._stopped: list[Depot] = []
        self._frames = [self.artifact.frame(i) for i in range(self.artifact.manifest.frame_count)]
        self.depots = [Depot(i + 1, self._new_carousel(i + 1), depot_frame_s) for i in range(depots)]

    @property
    def published(self) -> int:
        """Frames that all depots together published."""
        return sum(depot.published for depot in (*self.depots, *self._stopped))

    def run(self, restarts_s: tuple[float, ...] = (), limit_s: float = 7200.0) -> None:
        """Play until every node is complete; AssertionError after `limit_s` simulated seconds.

        `restarts_s` are the moments at which the depots, in turn, start anew.
        """
        for number, at_s in enumerate(restarts_s):
            self.at(at_s, lambda number=number: self._restart(self.depots[number % len(self.depots)]))  # type: ignore[misc]
        for node in self.nodes:
            self.at(node.starts_s, lambda node=node: self._start(node))  # type: ignore[misc]
        left = {node.name for node in self.nodes}
        with _remembering(self._frames):
            while left:
                self.now_s, _, act = heapq.heappop(self._events)
                assert self.now_s < limit_s, f"incomplete after {limit_s:g} s: {sorted(left)}"
                act()
                left.difference_update(self._finished)
                self._finished.clear()

    def stop_depot(self, depot: Depot) -> None:
        """It publishes nothing more and hears nothing more."""
        depot.turn += 1
        self.depots.remove(depot)
        self._stopped.append(depot)

    def _new_carousel(self, epoch: int) -> Carousel:
        manifest = self.artifact.manifest
        return Carousel(manifest.frame_count, len(manifest.index_frames), epoch)

    def at(self, time_s: float, act: Callable[[], None]) -> None:
        """Have something happen at a moment."""
        self._count += 1
        heapq.heappush(self._events, (time_s, self._count, act))

    def _restart(self, depot: Depot) -> None:
        self.restarts += 1
        depot.epoch += len(self.depots)
        depot.carousel = self._new_carousel(depot.epoch)
        self._wake(depot)

    # nodes

    def _start(self, node: Node) -> None:
        for at_s in node.weather.breaks_s:
            self.at(self.now_s + at_s, lambda: self._connect(node))
        for at_s in node.weather.crashes_s:
            self.at(self.now_s + at_s, lambda: self._crash(node))
        self._connect(node)
        self._tick(node)

    def _connect(self, node: Node) -> None:
        if node.done_s is None:
            node.session += 1
            node.free_s = self.now_s
            node.fetch.begin_session()
            self._ask(node)

    def _crash(self, node: Node) -> None:
        if node.done_s is not None:
            return
        node.boot()
        for depot in self.depots:
            depot.carousel.drop(node.name)  # its will is published
        self._connect(node)

    def _tick(self, node: Node) -> None:
        if node.done_s is None:
            node.flush(self.now_s)
            self._ask(node)
            self.at(self.now_s + NODE_TICK_S, lambda: self._tick(node))

    def _ask(self, node: Node) -> None:
        want = node.fetch.want(self.now_s)
        if want is not None:
            self._say(node, want)

    def _say(self, node: Node, want: Want) -> None:
        for depot in self.depots:
            if self._random.random() >= node.weather.want_loss:
                self.at(self.now_s + self._delay(node), lambda depot=depot: self._hear(depot, want))  # type: ignore[misc]

    def _take(self, node: Node, session: int, message: FrameMessage) -> None:
        if session != node.session or node.done_s is not None:
            node.lost += session != node.session
            return
        node.take(message, self.now_s)
        if node.fetch.is_complete:
            assert node.journal == Bitmap.full(node.journal.length), "complete, and not journalled"
            node.done_s = self.now_s
            self._finished.append(node.name)
            self._say(node, node.fetch.farewell())
        else:
            self._ask(node)

    # depots

    def _hear(self, depot: Depot, want: Want) -> None:
        seen = want.seen_by(depot.epoch)
        depot.carousel.on_want(want.node, want.missing_frames(), seen, want.credit, self.now_s)
        self._wake(depot)

    def _wake(self, depot: Depot) -> None:
        depot.poll_s = POLL_FIRST_S
        self._arrange(depot, 0.0)

    def _arrange(self, depot: Depot, delay_s: float) -> None:
        depot.turn += 1
        turn = depot.turn
        self.at(self.now_s + delay_s, lambda: self._publish(depot) if turn == depot.turn else None)

    def _publish(self, depot: Depot) -> None:
        found = depot.carousel.next_frame(self.now_s)
        if found is None:
            depot.poll_s = min(2 * depot.poll_s, POLL_MOST_S)
            self._arrange(depot, depot.poll_s)
            return
        depot.published += 1
        depot.poll_s = POLL_FIRST_S
        message = FrameMessage(depot.epoch, found[1], found[0], self._frames[found[0]])
        for node in self.nodes:
            if node.session and node.done_s is None:
                self._send(node, message)
        self._arrange(depot, depot.frame_s)

    def _send(self, node: Node, message: FrameMessage) -> None:
        weather, draw = node.weather, self._random.random
        waiting_s = max(0.0, node.free_s - self.now_s)
        if draw() < weather.loss or waiting_s > BROKER_QUEUE_FRAMES * weather.frame_s:
            node.lost += 1
            return
        node.free_s = self.now_s + waiting_s + weather.frame_s
        copies = [message] * (1 + (draw() < weather.duplicates))
        if draw() < weather.damage:
            copies.append(_damaged(message))
        session = node.session
        for copy in copies:
            at_s = node.free_s + self._delay(node)
            self.at(at_s, lambda copy=copy: self._take(node, session, copy))  # type: ignore[misc]

    def _delay(self, node: Node) -> float:
        return node.weather.delay_s + self._random.random() * node.weather.jitter_s


def _damaged(message: FrameMessage) -> FrameMessage:
    data = bytes([message.data[0] ^ 1]) + message.data[1:]
    return FrameMessage(message.epoch, message.seq, message.frame, data)


@contextmanager
def _remembering(frames: list[bytes]) -> Iterator[None]:
    """Hash every frame of the pack once: a thousand nodes hash the same bytes objects. Others are hashed as ever."""
    known = {id(frame): hashlib.sha256(frame) for frame in frames}

    class Remembering:
        """Stands for hashlib in wire/fetch.py."""

        @staticmethod
        def sha256(data: bytes) -> "hashlib._Hash":
            return known.get(id(data)) or hashlib.sha256(data)

    with mock.patch.object(fetch_module, "hashlib", Remembering):
        yield
