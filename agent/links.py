"""The node's two connections to the broker, and what they counted together."""

import threading
from collections.abc import Callable

from agent.mailbox import Port
from agent.settings import AgentSettings
from agent.transfer import Link
from host.link import Will
from host.mqtt import Connection

BULK_SUFFIX = "-bulk"
BULK_KEEPALIVE_S = 30
"""A fetch should notice a dead link sooner than an idle node has to, and lasts too short for its pings to count."""


class BrokerLinks:
    """Makes `control` once and `bulk` for every fetch, on the engine's thread; any thread may read `totals`."""

    def __init__(self, settings: AgentSettings) -> None:
        self._settings = settings
        keepalive_s = min(settings.broker.keepalive_s, BULK_KEEPALIVE_S)
        self._bulk_broker = settings.broker.model_copy(update={"keepalive_s": keepalive_s})
        self._lock = threading.Lock()
        self._control: Link | None = None
        self._bulk: Link | None = None
        self._ended_rx_bytes = self._ended_tx_bytes = 0

    def control(self, inbox: Port, will: Callable[[int], Will]) -> Link:
        """The connection for orders and reports; its client id is the node's name."""
        self._control = Connection(self._settings.broker, self._settings.node, inbox, will=will)
        return self._control

    def bulk(self, inbox: Port, limit_bytes_per_s: int | None) -> Link:
        """A new connection for frames that reads no faster than the limit; None is none."""
        link = Connection(
            self._bulk_broker,
            self._settings.node + BULK_SUFFIX,
            inbox,
            rate_limit_bytes_per_s=limit_bytes_per_s,
        )
        with self._lock:
            if self._bulk is not None:
                figures = self._bulk.figures()
                self._ended_rx_bytes += figures.rx_bytes
                self._ended_tx_bytes += figures.tx_bytes
            self._bulk = link
        return link

    def totals(self) -> tuple[int, int, int]:
        """(bytes received, bytes sent, connects of `control`) since the start; never goes back."""
        with self._lock:
            figures = [link.figures() for link in (self._control, self._bulk) if link is not None]
            received = self._ended_rx_bytes + sum(figure.rx_bytes for figure in figures)
            sent = self._ended_tx_bytes + sum(figure.tx_bytes for figure in figures)
        return received, sent, figures[0].connects if figures else 0
