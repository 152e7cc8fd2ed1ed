"""What a connection takes and gives: its settings, its messages, and the fate of a publication. No paho here."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated

from pydantic import Field

from host.settings import FilePath, Settings


class Broker(Settings):
    """Where the broker is and how to prove who we are; `ca_file` switches TLS on."""

    host: Annotated[str, Field(min_length=1)]
    port: Annotated[int, Field(ge=1, le=65535)] = 1883
    keepalive_s: Annotated[int, Field(ge=5, le=3600)] = 60
    reconnect_max_s: Annotated[float, Field(ge=0.25, le=3600)] = 30.0
    ca_file: FilePath | None = None
    certificate_file: FilePath | None = None
    key_file: FilePath | None = None
    username: str | None = None
    password_file: FilePath | None = None


@dataclass(frozen=True, slots=True)
class Will:
    """What the broker publishes for us when the link breaks."""

    topic: str
    payload: bytes
    qos: int = 1
    retain: bool = True


class LinkState(StrEnum):
    """Where a connection is."""

    DOWN = "down"
    UP = "up"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class LinkUp:
    """The broker accepted us; `session` counts the connects of this Connection from 1."""

    client_id: str
    session: int


@dataclass(frozen=True, slots=True)
class LinkDown:
    """The link is gone or was refused; the connection tries again by itself."""

    client_id: str
    session: int
    reason: str


@dataclass(frozen=True, slots=True)
class Received:
    """One message. QoS 1 is redelivered by the broker, on the next connect, unless `ack` was called."""

    topic: str
    payload: bytes
    qos: int
    retained: bool
    session: int
    _mid: int = field(repr=False)
    _ack: Callable[[int, int], None] = field(repr=False, compare=False)

    def ack(self) -> None:
        """Acknowledge; callable from any thread, does nothing for QoS 0 or when the link has changed since."""
        if self.qos:
            self._ack(self.session, self._mid)


class Publication:
    """A message on its way out: done when the socket took it (QoS 0) or the broker acknowledged it (QoS 1)."""

    __slots__ = ("_event", "_sent", "size_bytes")

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self._event = threading.Event()
        self._sent = False

    def is_published(self) -> bool:
        """True when it is done and was not lost."""
        return self._sent

    def is_over(self) -> bool:
        """True when it is done or lost."""
        return self._event.is_set()

    def wait(self, timeout_s: float) -> bool:
        """Wait until it is done or lost; the value of `is_published`."""
        self._event.wait(timeout_s)
        return self._sent

    def settle(self, sent: bool) -> None:
        """For the connection only: it is over."""
        self._sent = sent
        self._event.set()


@dataclass(frozen=True, slots=True)
class LinkFigures:
    """Counters since the start of a connection; `silence_s` is the age of the last packet, None before the first."""

    rx_bytes: int
    tx_bytes: int
    connects: int
    silence_s: float | None
