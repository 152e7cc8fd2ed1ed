"""Outbox and inquiry on a real connection: nothing is lost while the broker is away, lost reports are asked for."""

import queue
from pathlib import Path

import pytest
from fleet_samples import wait

from fleet.broker import PrivateBroker
from fleet.inquiry import ASK_EVERY_S, ASK_NODES, Inquiry
from fleet.outbox import Outbox
from host.link import Broker, Received
from host.mqtt import Connection
from wire.topics import Topics

pytestmark = pytest.mark.e2e


def _received(inbox: "queue.Queue[object]", count: int) -> list[Received]:
    found: list[Received] = []
    while len(found) < count:
        message = inbox.get(timeout=10)
        if isinstance(message, Received):
            message.ack()
            found.append(message)
    return found


def test_what_is_put_while_the_broker_is_away_goes_out_later_the_newest_only(tmp_path: Path) -> None:
    private = PrivateBroker(tmp_path / "broker")
    private.start()
    port = private.port
    private.stop()
    inbox: queue.Queue[object] = queue.Queue(1000)
    link = Connection(Broker(host="127.0.0.1", port=port, reconnect_max_s=0.25), "outbox-test", inbox)
    link.subscribe("out/#", qos=1)
    link.start()
    outbox = Outbox(link)
    for i in range(100):
        outbox.put(f"out/{i % 50}", f"{i}".encode(), retain=True)
    assert outbox.pump() is False, "nothing to do while the link is down"
    with PrivateBroker(tmp_path / "second", port=port):
        wait(link.is_up)
        wait(lambda: not outbox.pump())
        messages = _received(inbox, 50)
        assert sorted(int(message.payload) for message in messages) == list(range(50, 100))
    link.stop()


def test_more_than_the_connection_takes_at_once_waits_for_its_turn(broker: PrivateBroker) -> None:
    inbox: queue.Queue[object] = queue.Queue(1000)
    link = Connection(Broker(host=broker.host, port=broker.port), "outbox-big", inbox)
    link.start()
    wait(link.is_up)
    outbox = Outbox(link)
    for i in range(300):
        outbox.put(f"big/{i}", bytes(60_000))
    assert outbox.pump() is True
    assert link.outgoing_bytes() < 2 * 1024 * 1024
    wait(lambda: not outbox.pump())
    wait(lambda: link.outgoing_bytes() == 0)
    link.stop()


def test_lost_reports_are_asked_for_in_turns(broker: PrivateBroker) -> None:
    topics = Topics("inquiry")
    inbox: queue.Queue[object] = queue.Queue(10_000)
    link = Connection(Broker(host=broker.host, port=broker.port), "inquiry-test", inbox)
    link.start()
    wait(link.is_up)
    nodes = [f"n{i:03}" for i in range(ASK_NODES + 50)]
    for node in nodes:
        link.publish(topics.reported(node), node.encode(), qos=1, retain=True)
    wait(lambda: link.outgoing_bytes() == 0)
    inquiry = Inquiry(link, topics)
    inquiry.ask(nodes, now_s=100.0)
    inquiry.ask(nodes, now_s=100.0 + ASK_EVERY_S / 2)
    first = _received(inbox, ASK_NODES)
    assert all(message.retained for message in first)
    assert {message.payload.decode() for message in first} == set(nodes[:ASK_NODES])
    inquiry.ask(nodes, now_s=100.0 + ASK_EVERY_S)
    second = {message.payload.decode() for message in _received(inbox, ASK_NODES)}
    assert set(nodes[ASK_NODES:]) <= second
    inquiry.ask([], now_s=100.0 + 2 * ASK_EVERY_S)
    link.publish(topics.reported(nodes[0]), b"", qos=1, retain=True)
    link.subscribe("inquiry/end", qos=1)
    link.publish("inquiry/end", b"end", qos=1)
    assert _received(inbox, 1)[0].payload == b"end", "nobody is asked any more"
    link.stop()
