"""Asks the broker again what nodes last reported, in case the report was lost on its way to us.

A broker drops QoS 1 messages for a client whose queue is full, as after a burst from a large fleet, and a node does not
repeat a report that has not changed. But the report is retained: a fresh subscription brings it again. Events need
nothing of the kind, because nodes keep them until they are acknowledged.
"""

from collections.abc import Iterable

from host.mqtt import Connection
from wire.topics import Topics

ASK_EVERY_S = 15.0
ASK_NODES = 200
"""Per round, so that the answers cannot fill the queue again (mosquitto.conf(5): 1000 messages)."""


class Inquiry:
    """Rounds of questions over one connection; the answers arrive in its inbox, marked as retained."""

    def __init__(self, link: Connection, topics: Topics) -> None:
        self._link = link
        self._topics = topics
        self._asked: list[str] = []
        self._last = ""
        self._due_s = 0.0

    def ask(self, nodes: Iterable[str], now_s: float) -> None:
        """Ask for some of `nodes`, taking turns; does nothing until ASK_EVERY_S after the last round."""
        if now_s < self._due_s:
            return
        self._due_s = now_s + ASK_EVERY_S
        for node in self._asked:
            self._link.unsubscribe(self._topics.reported(node))
        named = sorted(set(nodes))
        later = [node for node in named if node > self._last]
        self._asked = (later + named[: len(named) - len(later)])[:ASK_NODES]
        self._last = self._asked[-1] if self._asked else ""
        for node in self._asked:
            self._link.subscribe(self._topics.reported(node), qos=1)
