"""The connection against a real broker: order, back-pressure, acknowledgement, cap, reconnect."""

import os
import queue
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from host.link import Broker, LinkDown, LinkUp, Received, Will
from host.mqtt import OUTGOING_LIMIT_BYTES, Connection
from wire.errors import ConfigError, TransferError

TIMEOUT_S = 10.0
New = Callable[..., tuple[Connection, "queue.Queue[object]"]]


@pytest.fixture
def new(broker, request: pytest.FixtureRequest) -> Iterator[New]:
    """Makes started connections, each with its inbox, that are up."""
    made: list[Connection] = []

    def make(name: str, *topics: str, size: int = 64, **more: object) -> tuple[Connection, "queue.Queue[object]"]:
        inbox: queue.Queue[object] = queue.Queue(size)
        settings = Broker(host=broker.host, port=broker.port, reconnect_max_s=0.25)
        connection = Connection(settings, f"{os.getpid()}-{request.node.name[:40]}-{name}", inbox, **more)
        for topic in topics:
            connection.subscribe(topic, qos=1)
        made.append(connection)
        connection.start()
        assert isinstance(inbox.get(timeout=TIMEOUT_S), LinkUp)
        return connection, inbox

    yield make
    for connection in made:
        connection.stop()


@pytest.fixture
def topic(request: pytest.FixtureRequest) -> str:
    return f"mqtt-test/{os.getpid()}/{request.node.name}"


def subscribed(sender: Connection, inbox: "queue.Queue[object]", topic: str) -> None:
    """Wait until a subscription is in force: publish until something comes back, then empty the inbox."""
    deadline, heard = time.monotonic() + TIMEOUT_S, False
    while time.monotonic() < deadline:
        sender.publish(topic, b"probe", qos=1).wait(TIMEOUT_S)
        try:
            while True:
                message = inbox.get(timeout=0.2)
                if isinstance(message, Received):
                    heard = True
                    message.ack()
        except queue.Empty:
            if heard:
                return
    raise AssertionError("no subscription")


def test_messages_arrive_in_order_and_publications_settle(new, topic):
    receiver, inbox = new("rx", topic)
    sender, _ = new("tx")
    subscribed(sender, inbox, topic)
    sent = [sender.publish(topic, b"%d" % i, qos=i % 2) for i in range(30)]
    got = [inbox.get(timeout=TIMEOUT_S) for _ in range(30)]
    for message in got:
        message.ack()
    assert sorted(int(message.payload) for message in got) == list(range(30))
    assert [int(m.payload) for m in got if m.qos == 1] == list(range(1, 30, 2))
    assert all(publication.wait(TIMEOUT_S) for publication in sent)
    assert sender.outgoing_bytes() == 0
    assert receiver.figures().rx_bytes > 0
    assert receiver.figures().silence_s < TIMEOUT_S


def test_full_inbox_stops_the_reader_and_loses_nothing(new, topic):
    _, inbox = new("rx", topic, size=2)
    sender, _ = new("tx")
    subscribed(sender, inbox, topic)
    payload = b"x" * 50_000
    for i in range(40):
        sender.publish(topic, b"%02d" % i + payload)
    assert sender.wait_outgoing_below(1, TIMEOUT_S)
    assert inbox.qsize() <= 2
    assert [int(inbox.get(timeout=TIMEOUT_S).payload[:2]) for _ in range(40)] == list(range(40))


def test_command_that_is_not_acknowledged_is_held_by_the_broker(new, topic):
    _, inbox = new("rx", topic)
    sender, _ = new("tx")
    subscribed(sender, inbox, topic)
    publications = [sender.publish(topic, b"%d" % i, qos=1) for i in range(30)]
    assert all(publication.wait(TIMEOUT_S) for publication in publications)
    first = [inbox.get(timeout=TIMEOUT_S) for _ in range(20)]
    with pytest.raises(queue.Empty):
        inbox.get(timeout=0.3)
    for message in first:
        message.ack()
    assert int(inbox.get(timeout=TIMEOUT_S).payload) == 20


def test_cap_slows_the_reader_to_its_rate(new, topic):
    _, inbox = new("rx", topic, rate_limit_bytes_per_s=400_000)
    sender, _ = new("tx")
    subscribed(sender, inbox, topic)
    started_s = time.monotonic()
    for _ in range(10):
        sender.publish(topic, b"x" * 100_000)
    for _ in range(10):
        assert isinstance(inbox.get(timeout=TIMEOUT_S), Received)
    # 1 MB at 0.4 MB/s, less the burst and the last packet, which is read in one piece: never faster than this.
    assert time.monotonic() - started_s >= 1.5


def test_will_with_the_coming_session_is_published_when_the_link_breaks(new, topic):
    _, inbox = new("rx", topic)
    victim, _ = new("victim", will=lambda session: Will(topic, b"gone %d" % session, retain=False))
    subscribed(victim, inbox, topic)
    victim._client.socket().shutdown(2)
    message = inbox.get(timeout=TIMEOUT_S)
    assert message.payload == b"gone 1"


def test_broken_link_is_told_and_mended_with_subscriptions(new, topic):
    receiver, inbox = new("rx", topic)
    sender, _ = new("tx")
    subscribed(sender, inbox, topic)
    receiver._client.socket().shutdown(2)
    assert isinstance(inbox.get(timeout=TIMEOUT_S), LinkDown)
    up = inbox.get(timeout=TIMEOUT_S)
    assert isinstance(up, LinkUp)
    assert up.session == 2
    subscribed(sender, inbox, topic)


def test_orderly_stop_publishes_no_will_and_ends_the_thread(new, topic):
    _, inbox = new("rx", topic)
    victim, _ = new("victim", will=Will(topic, b"gone", retain=False))
    subscribed(victim, inbox, topic)
    last = victim.publish(topic, b"last", qos=0)
    victim.stop()
    assert last.is_published()
    assert inbox.get(timeout=TIMEOUT_S).payload == b"last"
    with pytest.raises(queue.Empty):
        inbox.get(timeout=0.3)
    assert not any(thread.name == f"mqtt-{victim.client_id}" for thread in threading.enumerate())
    assert not victim.publish(topic, b"late").wait(0.0)


def test_broker_that_is_away_is_told_once_and_qos_1_waits_for_it(unused_port):
    inbox: queue.Queue[object] = queue.Queue(8)
    connection = Connection(Broker(host="127.0.0.1", port=unused_port, reconnect_max_s=0.25), "lonely", inbox)
    connection.start()
    assert isinstance(inbox.get(timeout=TIMEOUT_S), LinkDown)
    with pytest.raises(queue.Empty):
        inbox.get(timeout=0.8)
    assert not connection.publish("a", b"lost").wait(0.0)
    waiting = connection.publish("a", b"waits", qos=1)
    assert not waiting.is_over()
    while connection.outgoing_bytes() + 100_000 < OUTGOING_LIMIT_BYTES:
        connection.publish("a", b"x" * 99_000, qos=1)
    with pytest.raises(TransferError):
        connection.publish("a", b"x" * 200_000, qos=1)
    connection.stop()
    assert waiting.is_over()
    assert not waiting.is_published()


def test_certificate_that_is_missing_is_a_config_error(tmp_path):
    broker = Broker(host="127.0.0.1", ca_file=tmp_path / "no-ca.pem")
    with pytest.raises(ConfigError, match="ca_file"):
        Connection(broker, "a", queue.Queue())


@pytest.fixture
def unused_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
