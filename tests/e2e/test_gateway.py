"""A site behind a gateway: two Mosquittos, `amperage fleet serve`, `amperage depot` and agents, all real processes."""

import queue
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import pytest
from agent_process import Agent, publish, publisher_in
from agent_simulators import MODEL, Made, Publisher
from fleet_process import AMPERAGE, Site
from fleet_samples import wait
from toxics import Toxics, Weather

from fleet.broker import PrivateBroker
from host.link import Broker, Received
from host.mqtt import Connection
from wire.documents import parse_document
from wire.messages import FrameMessage, Want
from wire.topics import Topics

pytestmark = pytest.mark.e2e

NAMES = ("n1", "n2", "n3")


class Tap:
    """Every frame and want that passes a broker."""

    def __init__(self, broker: Broker, topics: Topics) -> None:
        self.frames: list[tuple[str, int]] = []
        self.wants: list[Want] = []
        self._inbox: queue.Queue[object] = queue.Queue(10_000)
        self._link = Connection(broker, "tap", self._inbox)
        self._link.subscribe(topics.frames("+"))
        self._link.subscribe(topics.every_node("want"))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tap")

    def __enter__(self) -> Self:
        self._link.start()
        wait(self._link.is_up)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._link.stop()

    def _run(self) -> None:
        while not self._stop.is_set():
            with suppress(queue.Empty):
                message = self._inbox.get(timeout=0.05)
                if isinstance(message, Received) and message.topic.endswith("/want"):
                    self.wants.append(parse_document(Want, message.payload, limit_bytes=1 << 23))
                elif isinstance(message, Received):
                    self.frames.append((message.topic.rpartition("/")[2], FrameMessage.parse(message.payload).frame))


@dataclass
class Branch:
    """Control plane and upstream broker on one side, the site's broker, gateway and nodes on the other."""

    directory: Path
    site: Site
    here: Broker
    proxy: Toxics
    tap: Tap
    publisher: Publisher
    agents: list[Agent] = field(default_factory=list)
    gateway: subprocess.Popen[bytes] | None = None

    def start_gateway(self) -> None:
        settings = self.directory / "depot.toml"
        settings.write_text(
            f'directory = "{self.directory}/gateway"\nroot = "{self.site.topics.root}"\n'
            f'[broker]\nhost = "{self.here.host}"\nport = {self.here.port}\nreconnect_max_s = 0.5\n'
            f'[upstream]\nname = "gate"\n'
            f'[upstream.broker]\nhost = "{self.proxy.host}"\nport = {self.proxy.port}\nreconnect_max_s = 0.5\n'
        )
        with (self.directory / "gateway.log").open("ab") as log:
            self.gateway = subprocess.Popen([AMPERAGE, "depot", "--settings", str(settings)], stdout=log, stderr=log)

    def stop_gateway(self, number: int) -> int:
        assert self.gateway
        self.gateway.send_signal(number)
        return self.gateway.wait(15)

    def add_node(self, name: str) -> Agent:
        folder = self.directory / name
        folder.mkdir()
        agent = Agent(folder, self.here, self.site.topics, self.publisher, name=name)
        agent.start()
        self.agents.append(agent)
        return agent

    def roll_out(self, version: str, *names: str, weights_bytes: int = 3_000_000) -> tuple[Made, int]:
        made = self.publisher.make(version, weights_bytes=weights_bytes)
        publish(self.site, made)
        wait(lambda: {row["node"] for row in self.site.client.get("/api/nodes") if row["online"]} >= set(names))
        return made, self.site.order(made.digest, *names)

    def see_succeeded(self, made: Made, identity: int) -> None:
        wait(lambda: self.site.rollout(identity)["state"] != "running", 60)
        assert self.site.rollout(identity)["state"] == "succeeded", self.site.rollout(identity)
        for row in self.site.rollout(identity)["nodes"]:
            agent = next(agent for agent in self.agents if agent.name == row["node"])
            assert agent.store.served(MODEL).decoded == made.decoded

    def upstream_frames(self, made: Made) -> list[int]:
        return [frame for artifact, frame in self.tap.frames if artifact == made.artifact]


@pytest.fixture(scope="module")
def branch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Branch]:
    directory = tmp_path_factory.mktemp("branch")
    topics, publisher = Topics("branch"), publisher_in(directory / "keys")
    with PrivateBroker(directory / "far") as far, PrivateBroker(directory / "near") as near:
        there = Broker(host=far.host, port=far.port)
        with Toxics(far.host, far.port) as proxy, Tap(there, topics) as tap:
            site = Site(directory, there, topics, publisher)
            here = Broker(host=near.host, port=near.port, reconnect_max_s=0.5)
            branch = Branch(directory, site, here, proxy, tap, publisher)
            site.start()
            branch.start_gateway()
            yield branch
            for agent in branch.agents:
                agent.close()
            assert branch.stop_gateway(signal.SIGTERM) == 0, (directory / "gateway.log").read_text()
            assert site.stop() == 0


def test_site_of_three_nodes_downloads_once_and_its_next_node_nothing(branch: Branch) -> None:
    for name in NAMES:
        branch.add_node(name)
    made, identity = branch.roll_out("1.0", *NAMES)
    branch.see_succeeded(made, identity)
    assert sorted(branch.upstream_frames(made)) == list(range(made.manifest.frame_count)), "each frame exactly once"
    assert {want.node for want in branch.tap.wants} == {"gate"}
    branch.add_node("n4")
    wait(lambda: any(row["node"] == "n4" for row in branch.site.client.get("/api/nodes")))
    identity = branch.site.order(made.digest, "n4")
    branch.see_succeeded(made, identity)
    assert len(branch.upstream_frames(made)) == made.manifest.frame_count
    assert {event["node"] for event in branch.site.client.get("/api/events?limit=200")} == {*NAMES, "n4"}


def test_gateway_killed_in_the_middle_asks_for_nothing_that_it_has(branch: Branch) -> None:
    branch.proxy.weather = Weather(bandwidth_bytes_per_s=2_000_000)
    made, identity = branch.roll_out("2.0", "n1", weights_bytes=5_000_000)

    def half_way() -> bool:
        last = branch.tap.wants[-1]
        return last.artifact == made.artifact and len(last.missing_frames()) < 0.7 * last.frames and last.seen_seq > 2

    wait(half_way)
    known = branch.tap.wants[-1].missing_frames().complement()
    branch.stop_gateway(signal.SIGKILL)
    branch.proxy.weather = Weather()
    mark = len(branch.tap.wants)
    branch.start_gateway()
    branch.see_succeeded(made, identity)
    asked = {frame for want in branch.tap.wants[mark:] for frame in want.missing_frames()}
    assert asked
    assert not asked & set(known), "what was on the gateway's disk was asked for again"
    assert set(branch.upstream_frames(made)) == set(range(made.manifest.frame_count))


def test_site_installs_a_node_while_the_upstream_is_away(branch: Branch) -> None:
    node = next(agent for agent in branch.agents if agent.name == "n1")
    before = node.store.served(MODEL)
    wait(lambda: len(branch.site.client.get("/api/nodes/n1")["reported"]["models"]) == 1)
    frames = len(branch.tap.frames)
    branch.proxy.swallow()
    node.kill()
    for path in sorted((node.directory / "store").rglob("*"), reverse=True):
        path.chmod(0o700)
        path.rmdir() if path.is_dir() else path.unlink()
    node.start()
    wait(lambda: node.store.served(MODEL), 30)
    assert node.store.served(MODEL).decoded == before.decoded
    assert len(branch.tap.frames) == frames
    branch.proxy.release()
