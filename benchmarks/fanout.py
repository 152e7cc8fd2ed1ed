"""What a depot publishes for 32 nodes through a real Mosquitto, and for 1,000 in simulation, beside a copy for each.

A node runs the agent's own transfer (benchmarks/crowd.py) behind the agent's bandwidth cap; eight share a process.
Uploads count every frame that the depot published, in artifacts; the least possible is 1. Duplicates are frames that a
node took a second time, as a share of the artifact. The simulation is benchmarks/simulation.py: the same carousel and
the same fetch on a virtual clock.
"""

import json
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.crowd import Order, Outcome
from benchmarks.harness import ROUNDS, Row, Samples, Target, at_most, exact, row
from benchmarks.packs import Artifact, make_artifact
from benchmarks.simulation import Node, Weather, World
from benchmarks.site import depot_child, running
from fleet.broker import PrivateBroker
from wire.manifest import FRAME_BYTES

NODES = 32
NODES_OF_A_PROCESS = 8
FRAMES = 300
SLOWEST_BYTES_PER_S = 3_000_000
START_LEAD_S = 3.0
"""From the order until the first node starts: by then all processes are there."""
MANY_NODES = 1000
MANY_FRAMES = 400
UPLOADS_LIMIT = 1.2
DUPLICATES_LIMIT = 0.05


@dataclass(frozen=True, slots=True)
class Setting:
    """How differently the nodes start and how differently fast their links are."""

    jitter_s: float
    factor: float
    slowest_bytes_per_s: int
    rounds: int
    judged: bool

    def __str__(self) -> str:
        return f"starts within {self.jitter_s:g} s, speeds within {self.factor:g}x"

    def draw(self, count: int, seed: int) -> list[tuple[float, float]]:
        """(start in seconds, bytes per second) of each node; the first and last start and speed are always there."""
        chance = random.Random(seed)
        starts = [0.0, 1.0, *(chance.random() for _ in range(count - 2))]
        speeds = [0.0, 1.0, *(chance.random() for _ in range(count - 2))]
        chance.shuffle(speeds)
        rate = [self.slowest_bytes_per_s * (1 + (self.factor - 1) * share) for share in speeds]
        return [(self.jitter_s * start, each) for start, each in zip(starts, rate, strict=True)]


SETTINGS = (
    Setting(0.2, 2, SLOWEST_BYTES_PER_S, ROUNDS, judged=True),
    Setting(1.0, 2, SLOWEST_BYTES_PER_S, 3, judged=False),
    Setting(0.2, 10, SLOWEST_BYTES_PER_S // 3, 3, judged=False),
    Setting(1.0, 10, SLOWEST_BYTES_PER_S // 3, 3, judged=False),
)


def run() -> Sequence[Row]:
    """Measure every setting, then simulate it."""
    pack = make_artifact(FRAMES * FRAME_BYTES - 5)
    rows: list[Row] = []
    for setting in SETTINGS:
        measured = [measure_once(setting, pack, seed) for seed in range(setting.rounds)]
        rows += _rows(f"{NODES} nodes, {setting}", setting, measured, NODES)
    large = make_artifact(MANY_FRAMES * FRAME_BYTES - 5)
    for setting in SETTINGS:
        simulated = [simulate(setting, large, seed) for seed in range(2)]
        rows += _rows(f"simulated, {MANY_NODES} nodes, {setting}", setting, simulated, MANY_NODES)
    return rows


def _rows(what: str, setting: Setting, figures: list[tuple[float, float]], nodes: int) -> list[Row]:
    uploads, duplicates = (Samples(tuple(column)) for column in zip(*figures, strict=True))

    def limit(bound: float) -> Target | None:
        return at_most(bound) if setting.judged else None

    return [
        row(f"uploads: {what}", "artifacts", uploads, limit(UPLOADS_LIMIT), ("a copy for each", exact(nodes))),
        row(f"duplicates: {what}", "of the artifact", duplicates, limit(DUPLICATES_LIMIT)),
    ]


def measure_once(setting: Setting, pack: Artifact, seed: int) -> tuple[float, float]:
    """(uploads in artifacts, mean duplicates per node as a share) of one fetch by all nodes."""
    with TemporaryDirectory() as place, PrivateBroker(Path(place) / "broker") as broker:
        work = Path(place)
        (work / "manifest").write_bytes(pack.document)
        (work / "pack").write_bytes(pack.pack)
        depot = depot_child(broker, "bench", work, (pack.digest, pack.document, work / "pack"))
        with running(depot):
            outcomes = _crowd(setting, pack, seed, broker.port, work)
        published = int(depot.log.read_text().splitlines()[-1])
    frames = pack.manifest.frame_count
    if any(outcome.frames < frames for outcome in outcomes):
        raise RuntimeError(f"not every node completed: {outcomes}")
    return published / frames, sum(outcome.duplicates for outcome in outcomes) / frames / len(outcomes)


def _crowd(setting: Setting, pack: Artifact, seed: int, port: int, work: Path) -> list[Outcome]:
    begins_s = time.time() + START_LEAD_S
    orders = [
        Order(f"node-{number}", str(work / f"node-{number}"), begins_s + start_s, int(rate))
        for number, (start_s, rate) in enumerate(setting.draw(NODES, seed))
    ]
    processes = []
    for first in range(0, NODES, NODES_OF_A_PROCESS):
        share = [asdict(order) for order in orders[first : first + NODES_OF_A_PROCESS]]
        manifest = str(work / "manifest")
        order = {"port": port, "root": "bench", "artifact": pack.digest, "manifest": manifest, "nodes": share}
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.crowd"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert process.stdin
        process.stdin.write(json.dumps(order) + "\n")
        process.stdin.flush()
        processes.append(process)
    return [Outcome(**entry) for process in processes for entry in json.loads(process.communicate()[0])]


def simulate(setting: Setting, pack: Artifact, seed: int) -> tuple[float, float]:
    """The same figures for MANY_NODES nodes on a virtual clock."""
    nodes = [
        Node(f"node-{number}", pack, Weather(frame_s=FRAME_BYTES / rate), start_s)
        for number, (start_s, rate) in enumerate(setting.draw(MANY_NODES, seed))
    ]
    world = World(nodes, seed)
    world.run()
    frames = pack.manifest.frame_count
    return world.published / frames, sum(node.fetch.duplicates for node in nodes) / frames / len(nodes)
