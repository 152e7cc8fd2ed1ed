"""A connection to an MQTT 3.1.1 broker, and the only use of paho in this project.

Every call of paho happens on the connection's own thread (`mqtt-<client id>`), which also reads and writes the socket;
other threads leave their wishes in a bounded queue. Callbacks only append to a list and cannot raise: an exception in
one would kill the thread while paho still calls itself connected.

Invariants: the inbox is never written beyond its bound, the thread stops reading the socket instead, so TCP and the
broker feel a slow reader; nothing is kept over a crash (sessions are clean, subscriptions are renewed on every
connect); a QoS 1 message is acknowledged only by `Received.ack`, after whoever took it has made it durable.
"""

import contextlib
import os
import queue
import select
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from paho.mqtt.client import Client, ConnectFlags, MQTTMessage, MQTTMessageInfo
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from host.files import read_bounded
from host.link import Broker, LinkDown, LinkFigures, LinkState, LinkUp, Publication, Received, Will
from host.outgoing import OUTGOING_LIMIT_BYTES, Message, Outgoing
from host.pacing import Backoff, TokenBucket
from wire.errors import ConfigError

CONNACK_TIMEOUT_S = 10.0
RECONNECT_FIRST_S = 0.25
IN_FLIGHT_MESSAGES = 20
"""Own messages between write and PUBACK: what brokers allow by default (mosquitto.conf(5), max_inflight_messages)."""
CAPPED_RECEIVE_BUFFER_BYTES = 256 * 1024
"""With a cap, what the kernel holds unread is time that a pause or a ping response waits: keep it small."""
PACKET_OVERHEAD_BYTES = 9
"""Fixed header, topic length and packet identifier of a PUBLISH, for the byte counters."""
FULL_INBOX_POLL_S = 0.005
IDLE_TURN_S = 0.5
CAP_BURST_S = 0.25


class Connection:
    """One client identity at the broker; owns a thread and a socket from `start` to `stop`.

    `inbox` gets Received, LinkUp and LinkDown; it should be bounded. `will` may depend on the session to come.
    `rate_limit_bytes_per_s` caps reading; 0 or None means no cap.
    """

    def __init__(
        self,
        broker: Broker,
        client_id: str,
        inbox: "queue.Queue[Any]",
        *,
        will: Will | Callable[[int], Will] | None = None,
        rate_limit_bytes_per_s: int | None = None,
    ) -> None:
        self.client_id = client_id
        self._broker = broker
        self._inbox = inbox
        self._will = will
        self._bucket = _bucket(rate_limit_bytes_per_s)
        self._lock = threading.RLock()
        self._outgoing: Outgoing[MQTTMessageInfo] = Outgoing()
        self._chores: deque[Callable[[], None]] = deque()
        self._subscriptions: dict[str, int] = {}
        self._arrived: deque[Received | LinkUp | LinkDown] = deque()
        self._state = LinkState.DOWN
        self._session = 0
        self._refusal = self._told = ""
        self._rx_bytes = self._tx_bytes = 0
        self._last_packet_s: float | None = None
        self._stopping = threading.Event()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._client = self._new_client()
        self._thread = threading.Thread(target=self._run, name=f"mqtt-{client_id}", daemon=True)

    def start(self) -> None:
        """Connect, and reconnect for ever with a jittered, capped delay, until `stop`."""
        self._thread.start()

    def stop(self, timeout_s: float = 5.0) -> None:
        """Disconnect orderly (no will is published) and end the thread; idempotent.

        What was published before is written first, as far as the socket takes it within a second.
        """
        self._stopping.set()
        self._nudge()
        if self._thread.ident is None:
            self._end()
        elif threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)

    def publish(self, topic: str, payload: bytes, *, qos: int = 0, retain: bool = False) -> Publication:
        """Queue a message; never blocks.

        QoS 1 survives a broken link, QoS 0 is lost with it. Raises TransferError(broker_unreachable) when more than
        the limit waits already: the caller holds what must not be lost and offers it again after LinkUp.
        """
        publication = Publication(len(payload) + len(topic) + PACKET_OVERHEAD_BYTES)
        with self._lock:
            if self._state is LinkState.STOPPED or (qos == 0 and self._state is LinkState.DOWN):
                publication.settle(sent=False)
                return publication
            self._outgoing.offer(Message(topic, payload, qos, retain, publication))
        self._nudge()
        return publication

    def subscribe(self, topic: str, *, qos: int = 0) -> None:
        """Subscribe now and after every connect."""
        with self._lock:
            self._subscriptions[topic] = qos
        self._do(lambda: self._client.subscribe(topic, qos))

    def unsubscribe(self, topic: str) -> None:
        """Undo `subscribe`; messages that are on their way still arrive."""
        with self._lock:
            self._subscriptions.pop(topic, None)
        self._do(lambda: self._client.unsubscribe(topic))

    def is_up(self) -> bool:
        """True between LinkUp and LinkDown; for liveness judge by `figures().silence_s`."""
        return self._state is LinkState.UP

    def outgoing_bytes(self) -> int:
        """Bytes accepted by `publish` whose Publication is not over."""
        return self._outgoing.waiting_bytes

    def wait_outgoing_below(self, limit_bytes: int, timeout_s: float) -> bool:
        """Wait until `outgoing_bytes` is below `limit_bytes`; False after `timeout_s`."""
        return self._outgoing.wait_below(limit_bytes, timeout_s)

    def figures(self) -> LinkFigures:
        """Counters of messages (payload, topic and header) and liveness."""
        last = self._last_packet_s
        silence_s = None if last is None else time.monotonic() - last
        return LinkFigures(self._rx_bytes, self._tx_bytes, self._session, silence_s)

    # Everything below runs on the connection's thread, except _do, _nudge and _acknowledge.

    def _do(self, chore: Callable[[], object]) -> None:
        if self._state is LinkState.UP:
            self._chores.append(lambda: (chore(), None)[1])
            self._nudge()

    def _nudge(self) -> None:
        with self._lock:
            if self._state is not LinkState.STOPPED:
                with contextlib.suppress(BlockingIOError):  # a full counter has woken the thread already
                    os.eventfd_write(self._wake, 1)

    def _acknowledge(self, session: int, mid: int) -> None:
        if session == self._session:
            self._do(lambda: self._client.ack(mid, 1) if session == self._session else None)

    def _new_client(self) -> Client:
        client = Client(
            CallbackAPIVersion.VERSION2, self.client_id, clean_session=True, protocol=MQTTProtocolVersion.MQTTv311,
            reconnect_on_failure=False, manual_ack=True,
        )  # fmt: skip
        client.max_inflight_messages_set(IN_FLIGHT_MESSAGES)
        client.on_connect = self._on_connect
        client.on_message = self._on_message
        client.on_socket_open = self._on_socket_open
        broker = self._broker
        try:
            if broker.username is not None:
                password = read_bounded(broker.password_file, 4096).decode().strip() if broker.password_file else None
                client.username_pw_set(broker.username, password)
            if broker.ca_file is not None:
                client.tls_set(
                    str(broker.ca_file),
                    certfile=str(broker.certificate_file) if broker.certificate_file else None,
                    keyfile=str(broker.key_file) if broker.key_file else None,
                    tls_version=ssl.PROTOCOL_TLS_CLIENT,
                )
        except (OSError, ValueError) as error:
            raise ConfigError(f"broker: {error}; check ca_file, certificate_file, key_file, password_file") from error
        client.connect_async(broker.host, broker.port, broker.keepalive_s)
        return client

    def _on_connect(
        self, _client: Client, _data: object, _flags: ConnectFlags, reason: ReasonCode, _properties: Properties | None
    ) -> None:
        if reason.is_failure:
            self._refusal = f"broker refused the connection: {reason}"
            return
        self._session += 1
        self._arrived.append(LinkUp(self.client_id, self._session))

    def _on_message(self, _client: Client, _data: object, message: MQTTMessage) -> None:
        try:
            topic = message.topic
        except UnicodeDecodeError:
            return
        size = len(message.payload) + len(topic) + PACKET_OVERHEAD_BYTES
        self._rx_bytes += size
        if self._bucket is not None:
            self._bucket.take(size)
        self._arrived.append(
            Received(topic, bytes(message.payload), message.qos, message.retain, self._session, message.mid,
                     self._acknowledge)
        )  # fmt: skip

    def _on_socket_open(self, _client: Client, _data: object, opened: Any) -> None:
        with contextlib.suppress(OSError):
            opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._bucket is not None:
                opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, CAPPED_RECEIVE_BUFFER_BYTES)

    def _run(self) -> None:
        backoff = Backoff(RECONNECT_FIRST_S, self._broker.reconnect_max_s)
        while not self._stopping.is_set():
            before = self._session
            try:
                reason = self._live()
            except Exception as error:  # noqa: BLE001  whatever a broker's bytes make paho raise ends the link only
                reason = f"{self._broker.host}:{self._broker.port}: {error}"
            self._go_down(reason)
            if self._session > before:
                backoff.reset()
            self._stopping.wait(backoff.next_s())
        self._end()

    def _end(self) -> None:
        with self._lock:
            if self._state is not LinkState.STOPPED:
                self._state = LinkState.STOPPED
                os.close(self._wake)
        self._outgoing.drop(everything=True)

    def _live(self) -> str:
        """One link from connect to its end; the reason why it ended."""
        self._refusal = ""
        session = self._session
        will = self._will(session + 1) if callable(self._will) else self._will
        if will is not None:
            self._client.will_set(will.topic, will.payload, will.qos, will.retain)
        self._client.reconnect()
        connack_due_s = time.monotonic() + CONNACK_TIMEOUT_S
        while not self._stopping.is_set():
            code = self._turn()
            if self._session > session and self._state is not LinkState.UP:
                self._go_up()
            if code != MQTTErrorCode.MQTT_ERR_SUCCESS or self._client.socket() is None:
                return self._refusal or f"link to the broker broke ({code.name})"
            if self._session == session and time.monotonic() > connack_due_s:
                return f"broker did not answer within {CONNACK_TIMEOUT_S:g} s"
        self._leave()
        return "stopped"

    def _go_up(self) -> None:
        with self._lock:
            subscriptions = list(self._subscriptions.items())
            self._chores.clear()
            self._state = LinkState.UP
        if subscriptions:
            self._client.subscribe(subscriptions)

    def _turn(self) -> MQTTErrorCode:
        """Write what waits, then wait for the socket and read at most one burst of packets."""
        self._write_waiting()
        link: Any = self._client.socket()
        if link is None:
            return MQTTErrorCode.MQTT_ERR_CONN_LOST
        self._deliver()
        pause_s = self._pause_s()
        decrypted = pause_s == 0 and isinstance(link, ssl.SSLSocket) and link.pending() > 0
        readable, writable = self._wait(link, 0.0 if decrypted else pause_s or IDLE_TURN_S, read=pause_s == 0)
        if readable or decrypted:
            self._last_packet_s = time.monotonic()
            code = self._client.loop_read()
            if code != MQTTErrorCode.MQTT_ERR_SUCCESS:
                return code
        if writable:
            code = self._client.loop_write()
            if code != MQTTErrorCode.MQTT_ERR_SUCCESS:
                return code
        self._outgoing.settle(_fate)
        return self._client.loop_misc()

    def _wait(self, link: Any, timeout_s: float, *, read: bool) -> tuple[bool, bool]:
        """(readable, writable) after at most `timeout_s`; a wish of another thread ends the wait."""
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        write = self._client.want_write()
        if read or write:
            poll.register(link, (select.POLLIN if read else 0) | (select.POLLOUT if write else 0))
        events = dict(poll.poll(timeout_s * 1000))
        if self._wake in events:
            os.eventfd_read(self._wake)
        seen = events.get(link.fileno(), 0)
        broken = seen & (select.POLLERR | select.POLLHUP)
        return bool((read and seen & select.POLLIN) or broken), bool(seen & select.POLLOUT)

    def _pause_s(self) -> float:
        """Seconds for which the socket is not read: the inbox is full or the cap is reached; 0.0 means read now."""
        if self._arrived:
            return FULL_INBOX_POLL_S
        delay_s = self._bucket.delay_s(time.monotonic()) if self._bucket is not None else 0.0
        return min(delay_s, IDLE_TURN_S)

    def _deliver(self) -> None:
        while self._arrived:
            try:
                self._inbox.put_nowait(self._arrived[0])
            except queue.Full:
                return
            self._arrived.popleft()

    def _write_waiting(self) -> None:
        """Hand over one message after the other, each only when the socket took the one before."""
        while self._state is LinkState.UP and not self._client.want_write():
            if self._chores:
                self._chores.popleft()()
                continue
            if not len(self._outgoing) or len(self._outgoing.handed) >= IN_FLIGHT_MESSAGES:
                return
            message = self._outgoing.take()
            info = self._client.publish(message.topic, message.payload, message.qos, message.retain)
            self._tx_bytes += message.publication.size_bytes
            self._outgoing.handed.append((info, message))
            self._outgoing.settle(_fate)

    def _go_down(self, reason: str) -> None:
        with self._lock:
            was_up = self._state is LinkState.UP
            self._state = LinkState.DOWN
            self._chores.clear()
        if not self._stopping.is_set() and (was_up or reason != self._told):
            # a broker that stays away is told once, not at every attempt
            self._told = reason
            self._arrived.append(LinkDown(self.client_id, self._session, reason))
        self._deliver()
        self._outgoing.drop(everything=False)

    def _leave(self) -> None:
        """Write what waits for up to a second, then say DISCONNECT, so that the broker keeps the will to itself."""
        until_s = time.monotonic() + 1.0
        while self._state is LinkState.UP and time.monotonic() < until_s:
            self._write_waiting()
            if not len(self._outgoing) and not self._client.want_write():
                break
            link: Any = self._client.socket()
            if link is None or self._client.loop_write() != MQTTErrorCode.MQTT_ERR_SUCCESS:
                return
            self._wait(link, 0.1, read=False)
        self._client.disconnect()
        self._client.loop_write()


def _fate(info: MQTTMessageInfo) -> bool | None:
    try:
        return True if info.is_published() else None
    except (RuntimeError, ValueError):
        return False


def _bucket(rate_limit_bytes_per_s: int | None) -> TokenBucket | None:
    if not rate_limit_bytes_per_s:
        return None
    return TokenBucket(rate_limit_bytes_per_s, rate_limit_bytes_per_s * CAP_BURST_S)


__all__ = [
    "OUTGOING_LIMIT_BYTES",
    "Broker",
    "Connection",
    "LinkDown",
    "LinkFigures",
    "LinkState",
    "LinkUp",
    "Publication",
    "Received",
    "Will",
]
