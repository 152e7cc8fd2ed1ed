"""The agent as a real process: real Mosquitto, real decoder child, a depot and a runtime of the test's own."""

import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "unit"))

from agent_process import Agent, wait
from agent_simulators import MODEL, NODE, Made, Publisher

from fleet.broker import PrivateBroker
from host.link import Broker, LinkUp, Received
from host.mqtt import Connection
from wire.digest import digest_of
from wire.documents import encode_document, parse_document
from wire.messages import Ack, Event, FrameMessage, Reported, State, Status, Telemetry, Want
from wire.topics import Topics

pytestmark = pytest.mark.e2e


class Fleet:
    """The other side of the broker: depot, observer and orders, on one connection and one thread."""

    def __init__(self, broker: Broker, topics: Topics) -> None:
        self.topics = topics
        self.packs: dict[str, Made] = {}
        self.sent: list[tuple[str, int]] = []
        self.events: list[Event] = []
        self.telemetry: list[Telemetry] = []
        self.reported: list[Reported] = []
        self.statuses: list[Status] = []
        self._pass: dict[str, set[int]] = {}
        self._seq = 0
        self._inbox: queue.Queue[object] = queue.Queue(4096)
        self._link = Connection(broker, "fleet", self._inbox)
        for kind in ("want", "event", "telemetry", "reported", "status"):
            self._link.subscribe(topics.every_node(kind), qos=1)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fleet")

    def __enter__(self) -> Self:
        self._link.start()
        self._thread.start()
        wait(self._link.is_up)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._link.stop()

    def offer(self, made: Made) -> None:
        self.packs[made.artifact] = made
        self.put(self.topics.document(made.digest), made.release)
        self.put(self.topics.document(made.artifact), encode_document(made.manifest))

    def put(self, topic: str, payload: bytes) -> None:
        assert self._link.publish(topic, payload, qos=1, retain=True).wait(5)

    def order(self, generation: int, publisher: Publisher, made: Made) -> None:
        self.put(self.topics.desired(NODE), publisher.desired(generation, made))

    def states(self, made: Made) -> list[State]:
        seen = {(event.boot_id, event.seq): event for event in self.events if event.release == made.digest}
        return [event.after for event in seen.values()]

    def forget_pass(self) -> None:
        """The depot starts anew."""
        self._pass.clear()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                message = self._inbox.get(timeout=0.1)
            except queue.Empty:
                continue
            if isinstance(message, LinkUp):
                self.forget_pass()
            elif isinstance(message, Received):
                self._take(message)
                message.ack()

    def _take(self, message: Received) -> None:
        kind = (self.topics.node_of(message.topic) or ("", ""))[1]
        if kind == "want":
            self._serve(parse_document(Want, message.payload, limit_bytes=1 << 23))
        elif kind == "event":
            event = parse_document(Event, message.payload)
            self.events.append(event)
            self._acknowledge(event.boot_id, event.seq)
        elif kind == "telemetry":
            window = parse_document(Telemetry, message.payload)
            self.telemetry.append(window)
            self._acknowledge(window.boot_id, window.seq)
        elif kind == "reported":
            self.reported.append(parse_document(Reported, message.payload))
        elif kind == "status":
            self.statuses.append(parse_document(Status, message.payload))

    def _acknowledge(self, boot_id: str, seq: int) -> None:
        self._link.publish(self.topics.ack(NODE), encode_document(Ack(acks={boot_id: seq})), qos=1)

    def _serve(self, want: Want) -> None:
        made, passed = self.packs[want.artifact], self._pass.setdefault(want.artifact, set())
        missing = want.missing_frames()
        if not len(missing):
            passed.clear()
        for frame in missing:
            if frame not in passed and self._seq - want.seen_seq < want.credit + (0 if want.seen_epoch else self._seq):
                self._seq += 1
                passed.add(frame)
                self.sent.append((want.artifact, frame))
                payload = FrameMessage(7, self._seq, frame, made.frame(frame)).encode()
                self._link.wait_outgoing_below(1 << 20, 10)
                self._link.publish(self.topics.frames(want.artifact), payload)


@pytest.fixture
def publisher() -> Publisher:
    return Publisher()


@pytest.fixture
def topics(request: pytest.FixtureRequest) -> Topics:
    return Topics(f"agent-test/{os.getpid()}/{request.node.name.replace('[', '-').strip(']')}")


@pytest.fixture
def fleet(broker, topics: Topics) -> Iterator[Fleet]:
    with Fleet(Broker(host=broker.host, port=broker.port), topics) as fleet:
        yield fleet


@pytest.fixture
def new_agent(tmp_path: Path, broker, topics: Topics, publisher: Publisher) -> Iterator[Callable[..., Agent]]:
    agents: list[Agent] = []

    def make(extra: str = "") -> Agent:
        agent = Agent(tmp_path, Broker(host=broker.host, port=broker.port), topics, publisher, extra)
        agents.append(agent)
        return agent

    yield make
    for agent in agents:
        agent.close()


def test_release_over_a_real_broker_is_decoded_by_the_child_and_serves(fleet, new_agent, publisher):
    agent = new_agent()
    agent.start()
    made = publisher.make("1.0", weights_bytes=3_000_000)
    fleet.offer(made)
    fleet.order(1, publisher, made)
    wait(lambda: State.COMMITTED in fleet.states(made))
    assert fleet.states(made) == [
        State.ADMITTED, State.FETCHING, State.DECODING, State.PROBING, State.STAGED, State.ACTIVATING, State.SOAKING,
        State.COMMITTED,
    ]  # fmt: skip
    assert agent.store.served(MODEL).decoded == made.decoded
    version = agent.store.version_path(made.decoded)
    assert {path.name: digest_of(path.read_bytes()) for path in version.iterdir() if path.name in made.files} == {
        name: digest_of(content) for name, content in made.files.items()
    }
    assert sorted(frame for _, frame in fleet.sent) == list(range(made.manifest.frame_count))
    wait(lambda: fleet.reported and fleet.reported[-1].models and fleet.reported[-1].models[0].serving == made.decoded)
    wait(lambda: fleet.telemetry)
    window = fleet.telemetry[-1]
    assert window.energy is not None
    assert window.energy.source
    assert window.health.cpu_busy is not None


def test_agent_killed_mid_fetch_resumes_without_a_verified_frame(fleet, new_agent, publisher):
    agent = new_agent("bandwidth_limit_bytes_per_s = 1500000")
    agent.start()
    made = publisher.make("1.0", weights_bytes=5_000_000)
    fleet.offer(made)
    fleet.order(1, publisher, made)
    wait(lambda: len(agent.journalled(made) or ()) >= 8)
    agent.kill()
    verified = agent.journalled(made)
    assert len(verified.complement()) >= 5
    wait(lambda: fleet.statuses and not fleet.statuses[-1].online)
    fleet.forget_pass()
    mark = len(fleet.sent)
    agent.start()
    wait(lambda: State.COMMITTED in fleet.states(made))
    assert sorted(frame for _, frame in fleet.sent[mark:]) == list(verified.complement())
    assert agent.store.served(MODEL).decoded == made.decoded


def test_broker_that_restarts_mid_fetch_costs_no_verified_frame(tmp_path, topics, publisher):
    with PrivateBroker(tmp_path / "broker") as own:
        settings = Broker(host=own.host, port=own.port, reconnect_max_s=0.25)
        node = tmp_path / "node"
        node.mkdir()
        with Fleet(settings, topics) as fleet:
            agent = Agent(node, settings, topics, publisher, "bandwidth_limit_bytes_per_s = 2500000")
            try:
                agent.start()
                made = publisher.make("1.0", weights_bytes=6_000_000)
                fleet.offer(made)
                fleet.order(1, publisher, made)
                wait(lambda: len(agent.journalled(made) or ()) >= 8)
                own.stop()
                verified = agent.journalled(made)
                again = PrivateBroker(tmp_path / "again", own.port)
                mark = len(fleet.sent)
                with again:
                    wait(lambda: State.COMMITTED in fleet.states(made), 40)
                    assert [frame for _, frame in fleet.sent[mark:] if frame in verified] == []
                    assert agent.store.served(MODEL).decoded == made.decoded
                    agent.close()
            finally:
                agent.kill()


def test_agent_that_ends_orderly_says_offline_and_leaves_by_status_0(fleet, new_agent):
    agent = new_agent()
    agent.start()
    wait(lambda: fleet.statuses and fleet.statuses[-1].online)
    agent.process.send_signal(signal.SIGTERM)
    assert agent.process.wait(10) == 0
    wait(lambda: not fleet.statuses[-1].online)


def test_second_agent_on_the_same_store_is_refused(fleet, new_agent):
    agent = new_agent()
    agent.start()
    wait(lambda: fleet.statuses and fleet.statuses[-1].online)
    command = [sys.executable, "-m", "agent.main", "run", "--settings", str(agent.directory / "agent.toml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 1
    assert "another process works in" in done.stderr
