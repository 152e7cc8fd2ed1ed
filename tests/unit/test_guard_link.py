"""Subscriptions hold over a broken link, judged by a message that arrives."""

import os
import queue
import time
from typing import Any

from fleet.broker import PrivateBroker
from host.link import Broker, LinkDown, LinkUp, Received
from host.mqtt import Connection

WAIT_S = 10.0


def heard(inbox: "queue.Queue[Any]", sender: Connection, topic: str) -> bool:
    """Publish until one message comes back; False after WAIT_S."""
    deadline_s = time.monotonic() + WAIT_S
    while time.monotonic() < deadline_s:
        sender.publish(topic, b"hello", qos=1).wait(WAIT_S)
        try:
            if isinstance(inbox.get(timeout=0.2), Received):
                return True
        except queue.Empty:
            continue
    return False


def test_subscription_made_before_and_while_the_link_is_up_is_renewed_after_it_broke(broker: PrivateBroker) -> None:
    settings = Broker(host=broker.host, port=broker.port, reconnect_max_s=0.25)
    inbox: queue.Queue[Any] = queue.Queue(1000)
    early, late = (f"guard-link/{os.getpid()}/{name}" for name in ("early", "late"))
    receiver = Connection(settings, f"guard-link-{os.getpid()}-rx", inbox)
    sender = Connection(settings, f"guard-link-{os.getpid()}-tx", queue.Queue(1000))
    receiver.subscribe(early, qos=0)
    try:
        for link in (receiver, sender):
            link.start()
        assert isinstance(inbox.get(timeout=WAIT_S), LinkUp)
        receiver.subscribe(late, qos=0)
        assert heard(inbox, sender, early)
        assert heard(inbox, sender, late)
        receiver._client.socket().shutdown(2)
        event = inbox.get(timeout=WAIT_S)
        while not isinstance(event, LinkDown):
            event = inbox.get(timeout=WAIT_S)
        assert isinstance(inbox.get(timeout=WAIT_S), LinkUp)
        assert heard(inbox, sender, early)
        assert heard(inbox, sender, late)
    finally:
        receiver.stop()
        sender.stop()
