"""Carousel and fetch on a virtual clock: whatever links, nodes and depots do, every node completes, within bounds.

What may never happen (a verified frame stored again, a damaged one believed, completeness without a journal) is checked
by benchmarks/simulation.py at every step. A history that fails is played again by its seed.
"""

import random

import pytest

from benchmarks.packs import Artifact, make_artifact
from benchmarks.simulation import Node, Weather, World
from fleet.carousel import BUDGET_WINDOW_S, GATHER_S, Carousel
from wire.bitmap import Bitmap
from wire.fetch import CREDIT_FIRST, CREDIT_HORIZON_S, CREDIT_MOST
from wire.manifest import FRAME_BYTES
from wire.messages import WANT_RENEW_S, WANT_VOID_S

PACKS = {frames: make_artifact(frames * FRAME_BYTES - 5) for frames in (1, 10, 60)}
SEEDS, SEEDS_OF_A_BLOCK, MORE_BLOCKS = 300, 2000, 10
DAY_S = 24 * 3600.0
ON_ITS_WAY_FRAMES = 2 * CREDIT_FIRST
"""What a new session, a crash, a depot more or a depot's restart may cost a node: what was on its way."""


def history(seed: int) -> tuple[World, tuple[float, ...]]:
    """A world and the moments at which its depots start anew; everything in it follows from the seed."""
    draw = random.Random(seed)
    pack = PACKS[draw.choice([1, 10, 60, 60])]
    nodes = [
        Node(f"node-{i}", pack, weather_of(draw), draw.choice([0, 0.2, 5]) * draw.random(),
             draw.choice([0, 0, 200_000]))
        for i in range(draw.randint(1, 6))
    ]  # fmt: skip
    world = World(nodes, seed, depots=draw.choice([1, 1, 2, 3]))
    return world, moments(draw, [0, 0, 1, 3])


def weather_of(draw: random.Random) -> Weather:
    """Any link and any node, from good to hardly usable."""

    def maybe(share: float, most: float) -> float:
        return draw.uniform(0, most) if draw.random() < share else 0.0

    return Weather(
        delay_s=draw.uniform(0, 0.3), jitter_s=maybe(0.4, 0.5),
        frame_s=draw.choice([0.0005, 0.005, 0.05, 0.2]) * draw.uniform(0.5, 1),
        loss=maybe(0.4, 0.4), want_loss=maybe(0.4, 0.4), duplicates=maybe(0.3, 0.3), damage=maybe(0.3, 0.3),
        breaks_s=moments(draw, [0, 0, 0, 1, 3]), crashes_s=moments(draw, [0, 0, 0, 1, 3]),
    )  # fmt: skip


def moments(draw: random.Random, how_many: list[int]) -> tuple[float, ...]:
    return tuple(draw.uniform(0, 20) for _ in range(draw.choice(how_many)))


def play(seed: int) -> None:
    """Every node completes; what is published is no more than sending to each node by itself would cost."""
    world, restarts_s = history(seed)
    try:
        world.run(restarts_s)
        alone = sum(node.artifact.manifest.frame_count + node.lost for node in world.nodes)
        turns = sum(node.session + world.restarts + len(world.depots) - 1 for node in world.nodes)
        assert world.published <= alone + ON_ITS_WAY_FRAMES * turns
    except AssertionError as error:
        raise AssertionError(f"seed {seed}: {error}") from error


def test_any_history_completes_stores_nothing_twice_and_publishes_within_bounds() -> None:
    for seed in range(SEEDS):
        play(seed)


@pytest.mark.full
@pytest.mark.parametrize("block", range(MORE_BLOCKS))
def test_many_more_histories_complete(block: int) -> None:
    first = SEEDS + block * SEEDS_OF_A_BLOCK
    for seed in range(first, first + SEEDS_OF_A_BLOCK):
        play(seed)


def test_history_is_the_same_whenever_its_seed_is_played() -> None:
    def outcome() -> tuple[float, int, list[int]]:
        world, restarts_s = history(11)
        world.run(restarts_s)
        return world.now_s, world.published, [node.received for node in world.nodes]

    assert outcome() == outcome()


def world_of(
    pack: Artifact, starts_s: list[float], frame_s: list[float], depots: int = 1, seed: int = 1, **weather: float
) -> World:
    nodes = [
        Node(f"node-{i}", pack, Weather(frame_s=each_s, **weather), start_s)
        for i, (start_s, each_s) in enumerate(zip(starts_s, frame_s, strict=True))
    ]
    return World(nodes, seed, depots=depots)


@pytest.mark.parametrize("seed", range(40))
def test_one_node_on_a_link_without_loss_gets_every_frame_exactly_once(seed: int) -> None:
    draw = random.Random(seed)
    pack = PACKS[draw.choice([1, 10, 60])]
    world = world_of(pack, [0.0], [draw.choice([0.0, 0.01, 0.1, 0.3, 2.0])], seed=seed, delay_s=draw.uniform(0, 0.3))
    world.run()
    assert world.published == pack.manifest.frame_count
    assert world.nodes[0].fetch.duplicates == 0


@pytest.mark.parametrize("seed", range(8))
def test_nodes_that_start_within_the_gathering_time_share_one_pass(seed: int) -> None:
    draw = random.Random(seed)
    starts_s = [draw.random() * GATHER_S / 2 for _ in range(draw.randint(2, 16))]
    world = world_of(PACKS[60], starts_s, [0.001] * len(starts_s), seed=seed)
    world.run()
    assert world.published <= 1.1 * PACKS[60].manifest.frame_count


@pytest.mark.parametrize("depots", [1, 2])
def test_32_nodes_starting_within_200_ms_at_speeds_within_2x_cost_at_most_1_2_passes(depots: int) -> None:
    pack = make_artifact(200 * FRAME_BYTES - 5)
    draw = random.Random(11)
    starts_s, frame_s = [0.2 * draw.random() for _ in range(32)], [draw.uniform(0.005, 0.01) for _ in range(32)]
    world = world_of(pack, starts_s, frame_s, depots)
    world.run()
    assert world.published <= 1.2 * pack.manifest.frame_count
    duplicates = sum(node.fetch.duplicates for node in world.nodes) / len(world.nodes)
    assert duplicates <= (0.05 if depots == 1 else 0.15) * pack.manifest.frame_count


def test_late_node_costs_only_what_it_missed() -> None:
    pack = make_artifact(200 * FRAME_BYTES - 5)
    world = world_of(pack, [0.0, 1.0], [0.01, 0.01])
    world.run()
    assert world.nodes[0].fetch.duplicates < 20
    assert world.published <= 1.7 * pack.manifest.frame_count


def test_second_depot_is_silent_while_the_first_serves_and_takes_over_when_it_is_gone() -> None:
    world = world_of(PACKS[60], [0.0], [0.1], depots=2)
    first, second = world.depots
    world.at(2.0, lambda: world.stop_depot(first))
    world.run()
    assert first.published <= 2 / 0.1 + CREDIT_MOST
    assert second.published >= 20
    assert world.published <= PACKS[60].manifest.frame_count + 2 * CREDIT_FIRST


def test_slow_link_is_given_no_more_credit_than_it_can_take_in_a_few_seconds() -> None:
    pack = make_artifact(400 * FRAME_BYTES)
    slow, quick = (world_of(pack, [0.0], [each_s]) for each_s in (1.0, 0.001))
    for world in (slow, quick):
        world.run()
    assert slow.nodes[0].fetch.credit <= CREDIT_HORIZON_S / 1.0
    assert quick.nodes[0].fetch.credit > 2 * CREDIT_FIRST


def test_day_of_nodes_that_come_and_go_leaves_nothing_behind() -> None:
    carousel = Carousel(50, 1, epoch=7)
    draw = random.Random(5)
    now_s, number = 0.0, 0
    while now_s < DAY_S:
        now_s += draw.expovariate(1 / 30)
        number += 1
        carousel.on_want(f"node-{number}", Bitmap.full(50), (0, 0), draw.randint(1, 16), now_s)
        while carousel.next_frame(now_s):
            pass
        assert carousel.readers <= 20, "one every 30 s, void after 15 s"
    now_s += BUDGET_WINDOW_S + WANT_VOID_S
    assert carousel.next_frame(now_s) is None
    assert carousel.is_idle
    assert not carousel._budgets
    assert carousel._wanted == 0


def test_day_without_a_depot_costs_a_node_a_want_per_renewal_and_nothing_else() -> None:
    node = Node("node-1", PACKS[10], Weather())
    wants, size, now_s = 0, len(node.fetch.__dict__), 0.0
    while now_s < DAY_S:
        wants += node.fetch.want(now_s) is not None
        now_s += 0.5
    assert wants == DAY_S / WANT_RENEW_S
    assert len(node.fetch.__dict__) == size
    assert node.fetch.want(now_s).silent
