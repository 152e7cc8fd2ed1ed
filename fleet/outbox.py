"""What the controller still has to publish: one message per topic, handed over as the connection takes it.

Invariant: a newer message for a topic replaces the one that waits, so what waits is bounded by the number of nodes, and
nobody who publishes blocks or fails because the broker is slow or away. Nothing here survives a crash: retained state
is built again from the database whenever the link comes up.
"""

import threading

from host.mqtt import Connection
from wire.errors import TransferError

AHEAD_BYTES = 1024 * 1024
"""Bytes that may wait in the connection; far below its limit, so that acknowledgements never queue behind a rollout."""


class Outbox:
    """Messages for one connection, QoS 1; callable from any thread."""

    def __init__(self, link: Connection) -> None:
        self._link = link
        self._lock = threading.Lock()
        self._waiting: dict[str, tuple[bytes, bool]] = {}

    def put(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Publish as soon as the connection takes it."""
        with self._lock:
            self._waiting[topic] = (payload, retain)

    def pump(self) -> bool:
        """Hand over what the connection takes now; True when it is up and something still waits."""
        with self._lock:
            while self._waiting and self._link.is_up() and self._link.outgoing_bytes() < AHEAD_BYTES:
                topic = next(iter(self._waiting))
                payload, retain = self._waiting[topic]
                try:
                    self._link.publish(topic, payload, qos=1, retain=retain)
                except TransferError:
                    break
                del self._waiting[topic]
            return bool(self._waiting) and self._link.is_up()
