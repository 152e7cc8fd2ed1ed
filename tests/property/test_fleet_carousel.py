"""The carousel against simulated nodes on simulated links: whatever a link does, every node completes, within bounds.

The simulator is deterministic: one seed, one history. Time is simulated; frames and wants may be lost, delayed,
reordered and duplicated, nodes may be slow, the depot may start anew.
"""

import heapq
import random
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from fleet.carousel import (
    BUDGET_PASSES,
    BUDGET_SPARE_FRAMES,
    GATHER_MOST_S,
    GATHER_S,
    PATIENCE_FIRST_S,
    Carousel,
)
from wire.bitmap import Bitmap
from wire.messages import WANT_RENEW_S, WANT_VOID_S

LIMIT_S = 3600.0
TICK_S = 0.02


@dataclass(slots=True)
class Link:
    """How a node hears and is heard."""

    delay_s: float = 0.01
    jitter_s: float = 0.0
    frame_s: float = 0.001
    """Time that one frame takes: the node's bandwidth."""
    loss: float = 0.0
    want_loss: float = 0.0
    duplicates: float = 0.0


@dataclass(slots=True)
class Node:
    """A reader that follows the rules of wire/messages.py Want."""

    name: str
    link: Link
    missing: Bitmap
    index_frames: int
    credit: int
    starts_s: float = 0.0
    seen: tuple[int, int] = (0, 0)
    asked_s: float = -1e9
    asked_seen: tuple[int, int] = (0, 0)
    received: int = 0
    duplicates: int = 0
    free_s: float = 0.0
    done_s: float | None = None

    def wanted(self) -> Bitmap:
        """Only frames of the index while one of them is missing."""
        index_missing = [frame for frame in self.missing if frame < self.index_frames]
        if not index_missing:
            return self.missing
        wanted = Bitmap(self.missing.length)
        for frame in index_missing:
            wanted.set(frame)
        return wanted

    def asks(self, now_s: float, *, at_once: bool) -> bool:
        """True when a want is due: half the credit has arrived, five seconds have passed, or the index is there."""
        arrived = self.seen[1] - self.asked_seen[1] if self.seen[0] == self.asked_seen[0] else self.credit
        if not (at_once or 2 * arrived >= self.credit or now_s - self.asked_s >= WANT_RENEW_S):
            return False
        self.asked_s, self.asked_seen = now_s, self.seen
        return True

    def take(self, epoch: int, seq: int, frame: int) -> bool:
        """A frame arrived; True when the node asks at once because its index is complete now."""
        index_missing = any(i in self.missing for i in range(self.index_frames))
        if index_missing and frame >= self.index_frames:
            return False
        self.seen = (epoch, max(self.seen[1], seq) if self.seen[0] == epoch else seq)
        self.received += 1
        if frame not in self.missing:
            self.duplicates += 1
            return False
        self.missing.clear(frame)
        return index_missing and not any(i in self.missing for i in range(self.index_frames))


class World:
    """A depot and nodes, from the first want until every node is complete."""

    def __init__(self, frames: int, index_frames: int, nodes: list[Node], seed: int, depot_frame_s: float = 0.0005):
        self.frames, self.index_frames, self.nodes = frames, index_frames, nodes
        self.random = random.Random(seed)
        self.now_s = 0.0
        self.published = 0
        self.depot_frame_s = depot_frame_s
        self.epoch = 1
        self.carousel = Carousel(frames, index_frames, self.epoch)
        self._events: list[tuple[float, int, str, tuple[object, ...]]] = []
        self._count = 0

    def restart_depot(self) -> None:
        """All wants are forgotten; a new epoch begins."""
        self.epoch += 1
        self.carousel = Carousel(self.frames, self.index_frames, self.epoch)

    def run(self, restarts_s: tuple[float, ...] = (), limit_s: float = LIMIT_S) -> None:
        """Play until every node is complete; fails after `limit_s` simulated seconds."""
        for at_s in restarts_s:
            self._at(at_s, "restart")
        for node in self.nodes:
            self._at(node.starts_s, "start", node)
        self._at(0.0, "depot")
        while any(node.done_s is None for node in self.nodes):
            self.now_s, _, kind, arguments = heapq.heappop(self._events)
            assert self.now_s < limit_s, [(node.name, list(node.missing)[:5]) for node in self.nodes]
            getattr(self, f"_on_{kind}")(*arguments)

    def _at(self, time_s: float, kind: str, *arguments: object) -> None:
        self._count += 1
        heapq.heappush(self._events, (time_s, self._count, kind, arguments))

    def _on_restart(self) -> None:
        self.restart_depot()

    def _on_start(self, node: Node) -> None:
        node.starts_s = -1.0
        self._ask(node, at_once=True)
        self._at(self.now_s + 1.0, "tick", node)

    def _on_tick(self, node: Node) -> None:
        if node.done_s is None:
            self._ask(node, at_once=False)
            self._at(self.now_s + 1.0, "tick", node)

    def _ask(self, node: Node, *, at_once: bool) -> None:
        if not node.asks(self.now_s, at_once=at_once) or self.random.random() < node.link.want_loss:
            return
        copy = Bitmap(self.frames, node.wanted().pack())
        self._at(self.now_s + self._delay(node), "want", node, copy, node.seen)

    def _on_want(self, node: Node, missing: Bitmap, seen: tuple[int, int]) -> None:
        self.carousel.on_want(node.name, missing, seen, node.credit, self.now_s)

    def _on_depot(self) -> None:
        found = self.carousel.next_frame(self.now_s)
        if found is None:
            self._at(self.now_s + TICK_S, "depot")
            return
        self.published += 1
        for node in self.nodes:
            if node.starts_s < 0 and node.done_s is None:
                self._send(node, found)
        self._at(self.now_s + self.depot_frame_s, "depot")

    def _send(self, node: Node, found: tuple[int, int]) -> None:
        if self.random.random() < node.link.loss:
            return
        node.free_s = max(node.free_s, self.now_s) + node.link.frame_s
        for _ in range(1 + (self.random.random() < node.link.duplicates)):
            self._at(node.free_s + self._delay(node), "frame", node, self.epoch, found[1], found[0])

    def _on_frame(self, node: Node, epoch: int, seq: int, frame: int) -> None:
        if node.done_s is not None:
            return
        at_once = node.take(epoch, seq, frame)
        if not len(node.missing):
            node.done_s = self.now_s
            self.carousel.on_want(node.name, node.missing, node.seen, node.credit, self.now_s)
            return
        self._ask(node, at_once=at_once)

    def _delay(self, node: Node) -> float:
        return node.link.delay_s + self.random.random() * node.link.jitter_s


def _node(i: int, frames: int, index_frames: int = 1, credit: int = 16, **link: float) -> Node:
    return Node(f"node-{i}", Link(**link), Bitmap.full(frames), index_frames, credit)


links = st.builds(
    Link,
    delay_s=st.floats(0.0, 0.3), jitter_s=st.floats(0.0, 0.5), frame_s=st.floats(0.0, 0.2),
    loss=st.floats(0.0, 0.4), want_loss=st.floats(0.0, 0.4), duplicates=st.floats(0.0, 0.3),
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 60), st.integers(1, 2), st.lists(st.tuples(links, st.integers(1, 32), st.floats(0, 20)), min_size=1,
    max_size=5), st.lists(st.floats(0.1, 30), max_size=2), st.integers(0, 1 << 30),
)  # fmt: skip
def test_any_links_and_depot_restarts_every_node_completes(
    data_frames: int, index_frames: int, readers: list[tuple[Link, int, float]], restarts_s: list[float], seed: int
) -> None:
    frames = data_frames + index_frames
    nodes = [
        Node(f"node-{i}", link, Bitmap.full(frames), index_frames, credit, starts_s)
        for i, (link, credit, starts_s) in enumerate(readers)
    ]
    World(frames, index_frames, nodes, seed).run(tuple(restarts_s))
    assert all(not len(node.missing) for node in nodes)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 200), st.integers(1, 64), st.floats(0.0, 0.3), st.floats(0.0, 0.3), st.integers(0, 1 << 30))
def test_one_node_on_a_link_without_loss_gets_every_frame_exactly_once(
    frames: int, credit: int, delay_s: float, frame_s: float, seed: int
) -> None:
    node = _node(0, frames, credit=min(credit, max(1, int(2 / max(frame_s, 0.01)))), delay_s=delay_s, frame_s=frame_s)
    world = World(frames, 1, [node], seed)
    world.run()
    assert world.published == frames
    assert node.duplicates == 0


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 16), st.integers(0, 1 << 30))
def test_nodes_that_start_within_the_gathering_time_share_one_pass(count: int, seed: int) -> None:
    frames = 100
    nodes = [_node(i, frames) for i in range(count)]
    for node in nodes:
        node.starts_s = random.Random(f"{seed} {node.name}").random() * GATHER_S / 2
    world = World(frames, 1, nodes, seed)
    world.run()
    assert world.published <= 1.1 * frames


def test_32_nodes_starting_within_200_ms_at_speeds_within_2x_cost_at_most_1_2_passes() -> None:
    frames = 400
    source = random.Random(11)
    nodes = [_node(i, frames, credit=64, frame_s=source.uniform(0.005, 0.01)) for i in range(32)]
    for node in nodes:
        node.starts_s = source.random() * 0.2
    world = World(frames, 1, nodes, 11)
    world.run()
    assert world.published <= 1.2 * frames


def test_late_node_costs_only_what_it_missed() -> None:
    frames = 200
    early, late = _node(0, frames, frame_s=0.01), _node(1, frames, frame_s=0.01)
    late.starts_s = 1.0
    world = World(frames, 1, [early, late], 3)
    world.run()
    assert early.duplicates < 20
    assert world.published <= 1.7 * frames


def test_frames_in_flight_that_are_lost_at_the_tail_come_again_after_one_silent_renewal() -> None:
    carousel = Carousel(5, 1, epoch=7)
    missing = Bitmap.full(5)
    missing.clear(0)
    carousel.on_want("n", missing, (0, 0), 16, 0.0)
    sent = [carousel.next_frame(GATHER_S + i / 100) for i in range(5)]
    assert [found[0] for found in sent if found] == [1, 2, 3, 4]
    assert sent[4] is None
    carousel.on_want("n", missing, (0, 0), 16, PATIENCE_FIRST_S / 2)
    assert carousel.next_frame(PATIENCE_FIRST_S / 2) is None, "not silent for long enough"
    carousel.on_want("n", missing, (0, 0), 16, WANT_RENEW_S)
    assert carousel.next_frame(WANT_RENEW_S) == (1, 5)


def test_slow_reader_whose_frames_were_late_not_lost_is_given_more_patience() -> None:
    carousel = Carousel(3, 1, epoch=7)
    missing = Bitmap.full(3)
    carousel.on_want("n", missing, (0, 0), 1, 0.0)
    assert carousel.next_frame(0.0) == (0, 1)
    carousel.on_want("n", missing, (0, 0), 1, 5.0)
    assert carousel.next_frame(5.0) == (0, 2), "given up as lost"
    missing.clear(0)
    carousel.on_want("n", missing, (7, 1), 1, 6.0)
    assert carousel.next_frame(6.1) is None, "the first copy came after all, the second is on its way"
    carousel.on_want("n", missing, (7, 2), 1, 6.2)
    assert carousel.next_frame(6.2) == (1, 3)
    carousel.on_want("n", missing, (7, 2), 1, 11.3)
    assert carousel.next_frame(11.3) is None, "five silent seconds are not enough any more"
    carousel.on_want("n", missing, (7, 2), 1, 16.4)
    assert carousel.next_frame(16.4) == (2, 4), "ten are; the pass goes on where it was"


def test_frame_that_a_gap_in_seen_shows_lost_is_repeated_and_no_other() -> None:
    carousel = Carousel(6, 1, epoch=7)
    missing = Bitmap.full(6)
    missing.clear(0)
    carousel.on_want("n", missing, (0, 0), 16, 0.0)
    while carousel.next_frame(1.0):
        pass
    only_three = Bitmap(6)
    for frame in (3, 5):
        only_three.set(frame)
    carousel.on_want("n", only_three, (7, 4), 16, 1.1)  # seq 3 carried frame 3; frame 5 is still on its way
    assert carousel.next_frame(1.1) == (3, 6)
    assert carousel.next_frame(1.2) is None


def test_depot_stays_within_the_credit_of_the_reader_it_serves() -> None:
    carousel = Carousel(100, 1, epoch=7)
    missing = Bitmap.full(100)
    missing.clear(0)
    carousel.on_want("fast", missing, (0, 0), 8, 0.0)
    carousel.on_want("slow", missing, (0, 0), 4, 0.0)
    sent = 0
    while carousel.next_frame(1.0):
        sent += 1
    assert sent == 8
    for frame in range(1, 9):
        missing.clear(frame)
    carousel.on_want("fast", missing, (7, 6), 8, 1.1)
    while carousel.next_frame(1.2):
        sent += 1
    assert sent == 14, "six more: two are still on their way"


def test_node_that_goes_offline_or_silent_is_sent_nothing_more() -> None:
    for silence in (True, False):
        carousel = Carousel(10, 1, epoch=7)
        carousel.on_want("n", Bitmap.full(10), (0, 0), 4, 0.0)
        assert carousel.next_frame(0.0)
        if silence:
            assert carousel.next_frame(WANT_VOID_S + 0.1) is None
        else:
            carousel.drop("n")
            assert carousel.next_frame(0.2) is None
        assert carousel.readers == 0


def test_reader_that_begins_a_new_session_gets_what_was_on_its_way_at_once() -> None:
    carousel = Carousel(6, 1, epoch=7)
    missing = Bitmap.full(6)
    missing.clear(0)
    carousel.on_want("n", missing, (0, 0), 16, 0.0)
    while carousel.next_frame(1.0):
        pass
    missing.clear(1)
    carousel.on_want("n", missing, (7, 1), 16, 1.1)
    assert carousel.next_frame(1.1) is None, "all is on its way"
    carousel.on_want("n", missing, (0, 0), 16, 1.2)
    sent = [carousel.next_frame(1.3) for _ in range(4)]
    assert sorted(found[0] for found in sent if found) == [2, 3, 4, 5]


def test_pass_waits_while_readers_keep_coming_but_not_for_ever() -> None:
    carousel = Carousel(6, 1, epoch=7)
    missing = Bitmap.full(6)
    missing.clear(0)
    now_s = 0.0
    while now_s < GATHER_MOST_S:
        carousel.on_want(f"n{now_s}", missing, (0, 0), 16, now_s)
        assert carousel.next_frame(now_s) is None
        now_s += 0.8 * GATHER_S
    assert carousel.next_frame(GATHER_MOST_S) == (1, 1)


def test_pass_begins_at_once_when_every_node_that_is_online_is_here() -> None:
    carousel = Carousel(6, 1, epoch=7)
    missing = Bitmap.full(6)
    missing.clear(0)
    carousel.company = 2
    carousel.on_want("a", missing, (0, 0), 16, 0.0)
    assert carousel.next_frame(0.01) is None, "one of two may still come"
    carousel.on_want("b", missing, (0, 0), 16, 0.02)
    assert carousel.next_frame(0.02) == (1, 1)


def test_reader_that_has_seen_the_future_gains_nothing() -> None:
    carousel = Carousel(50, 1, epoch=7)
    carousel.on_want("n", Bitmap.full(50), (0, 0), 4, 0.0)
    for moment in range(1, 4):
        while carousel.next_frame(float(moment)):
            pass
        carousel.on_want("n", Bitmap.full(50), (7, 1 << 62), 4, float(moment))
    assert carousel.seq == 12, "four frames of credit for each of three wants"


def test_greedy_node_that_never_has_enough_is_cut_off_and_others_are_served() -> None:
    carousel = Carousel(20, 1, epoch=7)
    sent, now_s = 0, 0.0
    for _ in range(1000):
        now_s += 0.2
        carousel.on_want("greedy", Bitmap.full(20), (7, 1 << 62), 4096, now_s)
        while carousel.next_frame(now_s):
            sent += 1
    assert sent == BUDGET_PASSES * 20 + BUDGET_SPARE_FRAMES
    assert carousel.over_budget > 0
    carousel.on_want("honest", Bitmap.full(20), (0, 0), 4096, now_s)
    frames = []
    while found := carousel.next_frame(now_s + 1):
        frames.append(found[0])
    assert sorted(frames) == list(range(20))


def test_index_goes_before_the_pass_of_others() -> None:
    carousel = Carousel(50, 2, epoch=7)
    data = Bitmap.full(50)
    data.clear(0)
    data.clear(1)
    carousel.on_want("a", data, (0, 0), 64, 0.0)
    for _ in range(10):
        assert carousel.next_frame(1.0)
    index = Bitmap(50)
    index.set(0)
    index.set(1)
    carousel.on_want("b", index, (0, 0), 64, 1.0)
    assert [carousel.next_frame(1.0), carousel.next_frame(1.0)] == [(0, 11), (1, 12)]
    assert carousel.next_frame(1.0) == (12, 13), "the pass goes on where it was"
