"""The whole job in bad weather: agent, control plane and Mosquitto are real processes; a proxy spoils the node's link.

Every case ends committed, and no frame that the journal calls verified is ever asked for again or lost.
"""

import queue
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Self

import pytest
from agent_process import Agent, publish, publisher_in
from agent_simulators import MODEL, NODE, Made, Publisher
from fleet_process import AMPERAGE, Site
from fleet_samples import wait
from toxics import Toxics, Weather

from fleet.broker import PrivateBroker
from fleet.carousel import PATIENCE_FIRST_S
from fleet.library import Library
from host.link import Broker, Received
from host.mqtt import Connection
from wire.bitmap import Bitmap
from wire.documents import encode_document, parse_document
from wire.messages import State, Want
from wire.topics import Topics

pytestmark = pytest.mark.e2e

PACK_BYTES = 5_000_000
SETTLED_S = 0.5
"""A want says what the journal said a moment before it went through the weather."""


class Watch:
    """Hears every want at the broker itself, and compares it with the node's journal."""

    def __init__(self, broker: Broker, topics: Topics, agent: Agent, proxy: Toxics) -> None:
        self._proxy = proxy
        self.held_s = 0.0
        """For how long a silence may hold a want back, so that it is heard long after it was said."""
        self.asked_again: set[int] = set()
        self.lost: set[int] = set()
        self.wants = 0
        self.made: Made | None = None
        self._agent = agent
        self._known: list[tuple[float, Bitmap]] = []
        self._inbox: queue.Queue[object] = queue.Queue(10_000)
        self._link = Connection(broker, "watch", self._inbox)
        self._link.subscribe(topics.want(agent.name))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch")

    def __enter__(self) -> Self:
        self._link.start()
        wait(self._link.is_up)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._link.stop()

    def look_at(self, made: Made) -> None:
        """The release whose fetch is judged from now on."""
        self.made, self._known, self.wants = made, [], 0
        self.asked_again, self.lost = set(), set()

    def frames(self) -> int:
        """Verified so far, by the journal."""
        return len(self._known[-1][1]) if self._known else 0

    def _run(self) -> None:
        while not self._stop.is_set():
            with suppress(queue.Empty):
                message = self._inbox.get(timeout=0.02)
                if isinstance(message, Received):
                    self._take(message)
                    message.ack()
            self._look()

    def _look(self) -> None:
        bitmap = self._agent.journalled(self.made) if self.made else None
        if bitmap is None:
            return
        before = self._known[-1][1] if self._known else Bitmap(bitmap.length)
        self.lost |= set(before) - set(bitmap)
        if bitmap.pack() != before.pack():
            self._known.append((time.monotonic(), bitmap))

    def _take(self, message: Received) -> None:
        want = parse_document(Want, message.payload, limit_bytes=1 << 23)
        if self.made is None or want.artifact != self.made.artifact:
            return
        self.wants += 1
        weather = self._proxy.weather
        said_s = time.monotonic() - SETTLED_S - self.held_s - weather.latency_s - weather.jitter_s
        settled = [known for at_s, known in self._known if at_s < said_s]
        self.asked_again |= set(settled[-1]) & set(want.missing_frames()) if settled else set()


@dataclass
class Scene:
    """All that is there; parts may be killed and started again."""

    broker: PrivateBroker
    proxy: Toxics
    site: Site
    agent: Agent
    watch: Watch
    publisher: Publisher
    releases: int = 0

    def make(self, pack_bytes: int = PACK_BYTES) -> Made:
        """One more version."""
        self.releases += 1
        return self.publisher.make(f"{self.releases}.0", weights_bytes=pack_bytes)

    def roll_out(self, made: Made) -> int:
        """Publish a version and order it; the number of the rollout."""
        publish(self.site, made)
        self.watch.look_at(made)
        return self.site.order(made.digest, NODE)

    def update(self, timeout_s: float = 60.0) -> dict[str, object]:
        """One more version from its order to its end in the weather that is."""
        made = self.make()
        return self.see_committed(made, self.roll_out(made), timeout_s)

    def see_committed(self, made: Made, identity: int, timeout_s: float = 60.0) -> dict[str, object]:
        """The end that every case has; returns what the node said of its fetch."""
        wait(lambda: self.site.rollout(identity)["state"] != "running", timeout_s)
        assert self.site.rollout(identity)["state"] == "succeeded", self.site.rollout(identity)
        wait(lambda: self.events(made, State.COMMITTED) and self.events(made, State.DECODING))
        assert self.agent.store.served(MODEL).decoded == made.decoded
        assert self.watch.asked_again == set(), "verified frames were asked for again"
        assert self.watch.lost == set(), "verified frames were lost"
        return dict(self.events(made, State.DECODING)[0]["data"])

    def events(self, made: Made, after: State) -> list[dict[str, Any]]:
        """Of this release, as the control plane has them."""
        rows = self.site.client.get(f"/api/events?node={NODE}&limit=50")
        return [row for row in rows if row["release"] == made.digest and row["after"] == after]

    def break_when_under_way(self, breakage: Callable[[], object], share: float = 0.15) -> tuple[Made, int]:
        """Order a release and do something when `share` of its frames are verified."""
        made = self.make()
        identity = self.roll_out(made)
        wait(lambda: self.watch.frames() >= share * made.manifest.frame_count)
        breakage()
        return made, identity

    def restart_broker(self) -> None:
        """Killed with all that it remembered, and started again on its port."""
        port, directory = self.broker.port, self.broker._directory
        self.broker._process.kill()
        self.broker.stop()
        self.broker = PrivateBroker(directory, port)
        self.broker.start()

    def silence(self, kind: str) -> None:
        if kind == "broker":
            self.broker._process.send_signal(signal.SIGSTOP)
        else:
            getattr(self.proxy, kind)()

    def speak(self, kind: str) -> None:
        if kind == "broker":
            self.broker._process.send_signal(signal.SIGCONT)
        else:
            self.proxy.release()

    @contextmanager
    def second_depot(self, made: Made) -> Iterator[None]:
        """`amperage depot` on a copy of the library, for a while."""
        directory = self.site.directory / f"second-{made.version.version}"
        library = Library(directory)
        library.put_manifest(made.artifact, encode_document(made.manifest))
        library.path_of(made.artifact).write_bytes(made.pack)
        (directory / "depot.toml").write_text(
            f'directory = "{directory}"\nroot = "{self.site.topics.root}"\n'
            f'[broker]\nhost = "{self.broker.host}"\nport = {self.broker.port}\n'
        )
        command = [AMPERAGE, "depot", "--settings", str(directory / "depot.toml")]
        with (directory / "log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
            wait(lambda: "depot_started" in (directory / "log").read_text())
            yield
            process.kill()

    def restart_control_plane(self) -> None:
        self.site.stop(signal.SIGKILL)
        self.site.start()


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    directory = tmp_path_factory.mktemp("weather")
    topics, publisher = Topics("weather"), publisher_in(directory / "keys")
    broker = PrivateBroker(directory / "broker")
    broker.start()
    address = Broker(host=broker.host, port=broker.port, reconnect_max_s=0.5, keepalive_s=5)
    site = Site(directory, address, topics, publisher, deadline_s=600.0)
    site.start()
    (directory / "node").mkdir()
    with Toxics(broker.host, broker.port) as proxy:
        through = address.model_copy(update={"port": proxy.port})
        agent = Agent(directory / "node", through, topics, publisher, "bandwidth_limit_bytes_per_s = 2500000")
        agent.start()
        with Watch(address, topics, agent, proxy) as watch:
            scene = Scene(broker, proxy, site, agent, watch, publisher)
            yield scene
            agent.close()
            site.stop()
            scene.broker.stop()


@pytest.fixture(autouse=True)
def fine_day(scene: Scene) -> Iterator[None]:
    yield
    scene.proxy.weather = Weather()
    scene.proxy.release()
    scene.watch.held_s = 0.0


def test_slow_link_costs_time_only(scene: Scene) -> None:
    scene.proxy.weather = Weather(latency_s=0.1, jitter_s=0.1, bandwidth_bytes_per_s=2_000_000, slice_bytes=1400)
    fetched = scene.update()
    assert (fetched["duplicates"], fetched["refused"]) == (0, 0)


def test_links_that_are_reset_again_and_again(scene: Scene) -> None:
    scene.proxy.weather = Weather(reset_after_bytes=1_000_000)
    before = scene.proxy.links_made
    scene.update()
    assert scene.proxy.links_made >= before + 3, "the weather was too fine"


def test_half_open_links_are_noticed(scene: Scene) -> None:
    scene.see_committed(*scene.break_when_under_way(scene.proxy.half_open))


def test_broker_killed_and_restarted(scene: Scene) -> None:
    scene.see_committed(*scene.break_when_under_way(scene.restart_broker))


def test_control_plane_killed_and_restarted(scene: Scene) -> None:
    scene.see_committed(*scene.break_when_under_way(scene.restart_control_plane))


def test_one_of_two_depots_killed(scene: Scene) -> None:
    made = scene.make()
    with scene.second_depot(made):
        identity = scene.roll_out(made)
        wait(lambda: scene.watch.frames() >= 0.2 * made.manifest.frame_count)
    scene.see_committed(made, identity)


@pytest.mark.full
@pytest.mark.parametrize("pause_s", [3.0, 7.0, 20.0])
@pytest.mark.parametrize("silence", ["hold", "swallow", "broker"])
def test_silence_of_any_length(scene: Scene, silence: str, pause_s: float) -> None:
    scene.watch.held_s = pause_s
    made, identity = scene.break_when_under_way(lambda: scene.silence(silence))
    time.sleep(pause_s)
    scene.speak(silence)
    scene.see_committed(made, identity, 120.0)


@pytest.mark.full
@pytest.mark.parametrize("latency_s", [0.3, 1.5])
@pytest.mark.parametrize("bandwidth_bytes_per_s", [125_000, 1_250_000])
@pytest.mark.parametrize("slice_bytes", [0, 97])
def test_slow_links_of_every_kind(
    scene: Scene, latency_s: float, bandwidth_bytes_per_s: float, slice_bytes: int
) -> None:
    scene.proxy.weather = Weather(latency_s, latency_s, bandwidth_bytes_per_s, slice_bytes)
    fetched = scene.update(180.0)
    late = 2 * 2 * latency_s >= PATIENCE_FIRST_S  # a first frame that takes so long to be confirmed is taken for lost
    assert fetched["duplicates"] <= late
    assert fetched["refused"] == 0


@pytest.mark.full
@pytest.mark.parametrize("seed", range(6))
def test_everything_at_once(scene: Scene, seed: int) -> None:
    draw = random.Random(seed)
    proxy = scene.proxy
    blows: list[Callable[[], object]] = [
        proxy.half_open, proxy.reset, proxy.hold, proxy.swallow, scene.restart_broker, scene.restart_control_plane,
    ]  # fmt: skip
    scene.proxy.weather = Weather(draw.uniform(0, 0.3), draw.uniform(0, 0.5), 800_000, draw.choice([0, 900]))
    scene.watch.held_s = 6.0
    made = scene.make(10_000_000)
    identity = scene.roll_out(made)
    for _ in range(4):
        time.sleep(draw.uniform(0.5, 4.0))
        draw.choice(blows)()
        time.sleep(draw.uniform(0.5, 6.0))
        scene.proxy.release()
    scene.see_committed(made, identity, 180.0)
