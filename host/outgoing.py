"""The queue of messages on their way out of a connection: bounded, and exact about what the socket has not taken yet.

Invariant: every message that was offered ends in exactly one `settle` of its Publication; `waiting_bytes` counts those
that have not. Any thread may offer and wait; only the connection's thread takes and settles.
"""

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from host.link import Publication
from wire.errors import Code, TransferError

Receipt = TypeVar("Receipt")

OUTGOING_LIMIT_BYTES = 8 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Message:
    """One message and its fate."""

    topic: str
    payload: bytes
    qos: int
    retain: bool
    publication: Publication


@dataclass(slots=True)
class Outgoing(Generic[Receipt]):
    """Messages not yet handed to the MQTT library, and those handed over (with its receipt) that are not over."""

    handed: list[tuple[Receipt, Message]] = field(default_factory=list)
    waiting_bytes: int = 0
    _waiting: deque[Message] = field(default_factory=deque)
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def __len__(self) -> int:
        """Messages not yet handed over."""
        return len(self._waiting)

    def offer(self, message: Message) -> None:
        """Queue `message`; raises TransferError(broker_unreachable) over the limit, but always takes a first one."""
        size = message.publication.size_bytes
        with self._changed:
            if self._waiting and self.waiting_bytes + size > OUTGOING_LIMIT_BYTES:
                raise TransferError(
                    Code.BROKER_UNREACHABLE,
                    f"{self.waiting_bytes} bytes wait for the broker already; wait for outgoing_bytes to fall",
                )
            self._waiting.append(message)
            self.waiting_bytes += size

    def wait_below(self, limit_bytes: int, timeout_s: float) -> bool:
        """Wait until less than `limit_bytes` wait; False after `timeout_s`."""
        with self._changed:
            return self._changed.wait_for(lambda: self.waiting_bytes < limit_bytes, timeout_s)

    def take(self) -> Message:
        """The oldest message not yet handed over; IndexError when there is none."""
        return self._waiting.popleft()

    def settle(self, fate: Callable[[Receipt], bool | None]) -> None:
        """Ask `fate` of every message handed over: sent, lost, or None for still on its way."""
        kept = []
        for receipt, message in self.handed:
            sent = fate(receipt)
            if sent is None:
                kept.append((receipt, message))
            else:
                self._finish(message, sent)
        self.handed = kept

    def drop(self, *, everything: bool) -> None:
        """The link is gone: QoS 0 is lost with it, QoS 1 stays unless `everything` goes."""
        with self._changed:
            waiting, handed = list(self._waiting), self.handed
            self._waiting = deque(message for message in waiting if message.qos and not everything)
            self.handed = [(receipt, message) for receipt, message in handed if message.qos and not everything]
        for message in (*(message for _, message in handed), *waiting):
            if everything or not message.qos:
                self._finish(message, sent=False)

    def _finish(self, message: Message, sent: bool) -> None:
        with self._changed:
            self.waiting_bytes -= message.publication.size_bytes
            self._changed.notify_all()
        message.publication.settle(sent)
