"""The demo's own witness: an MQTT client that no part of the system knows of.

It records every frame on the bulk topics, every retained report and every lifecycle event, so that the demo can judge
by what crossed the wire and not by what an agent says it did.
"""

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from host.mqtt import Broker, Connection, Received
from wire.documents import parse_document
from wire.errors import ArtifactError
from wire.messages import Event, FrameMessage, Reported
from wire.topics import Topics

INBOX_FRAMES = 4096


@dataclass(frozen=True, slots=True)
class SeenFrame:
    """One frame message as it crossed the wire; `sha256_ok` is left to whoever has the pack."""

    artifact: str
    epoch: int
    seq: int
    frame: int
    size_bytes: int


@dataclass(slots=True)
class Observer:
    """Records what crosses the broker. `on_event` and `on_reported` are called on the observer's thread."""

    broker: Broker
    topics: Topics
    on_event: Callable[[Event], None]
    on_reported: Callable[[Reported], None]
    frames: list[SeenFrame] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    reported: dict[str, Reported] = field(default_factory=dict)
    _seen_events: set[tuple[str, str, int]] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _connection: Connection | None = None
    _stop: threading.Event = field(default_factory=threading.Event)

    def start(self) -> None:
        """Connect and start recording."""
        inbox: queue.Queue[object] = queue.Queue(INBOX_FRAMES)
        self._connection = Connection(self.broker, "observer", inbox)
        for kind in ("reported", "event"):
            self._connection.subscribe(self.topics.every_node(kind), qos=1)
        self._connection.subscribe(self.topics.frames("+"), qos=0)
        self._connection.start()
        threading.Thread(target=self._record, args=(inbox,), name="observer", daemon=True).start()

    def stop(self) -> None:
        """Disconnect."""
        self._stop.set()
        if self._connection is not None:
            self._connection.stop()

    def publish(self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False) -> None:
        """Publish as anybody with access to the broker could: the demo's attacks go through here."""
        if self._connection is not None:
            self._connection.publish(topic, payload, qos=qos, retain=retain)

    def report_of(self, node: str) -> Reported | None:
        """The latest retained report of `node`."""
        with self._lock:
            return self.reported.get(node)

    def frame_count(self) -> int:
        """How many frame messages were seen so far; a mark for frames_since."""
        with self._lock:
            return len(self.frames)

    def frames_since(self, mark: int, artifact: str) -> list[SeenFrame]:
        """Frame messages of `artifact` after `mark`."""
        with self._lock:
            return [frame for frame in self.frames[mark:] if frame.artifact == artifact]

    def events_of(self, node: str) -> list[Event]:
        """Lifecycle events of `node`, in the order of arrival."""
        with self._lock:
            return [event for event in self.events if event.node == node]

    def _record(self, inbox: "queue.Queue[object]") -> None:
        while not self._stop.is_set():
            try:
                message = inbox.get(timeout=0.2)
            except queue.Empty:
                continue
            if isinstance(message, Received):
                self._take(message)
                message.ack()

    def _take_event(self, event: Event) -> None:
        """An event that is not acknowledged in time comes again: (node, boot_id, seq) tells."""
        key = (event.node, event.boot_id, event.seq)
        with self._lock:
            if key in self._seen_events:
                return
            self._seen_events.add(key)
            self.events.append(event)
        self.on_event(event)

    def _take(self, message: Received) -> None:
        artifact = message.topic.removeprefix(self.topics.frames(""))
        try:
            if artifact != message.topic:
                parsed = FrameMessage.parse(message.payload)
                with self._lock:
                    self.frames.append(SeenFrame(artifact, parsed.epoch, parsed.seq, parsed.frame, len(parsed.data)))
            elif message.topic.endswith("/event"):
                self._take_event(parse_document(Event, message.payload))
            elif message.topic.endswith("/reported"):
                reported = parse_document(Reported, message.payload)
                with self._lock:
                    self.reported[reported.node] = reported
                self.on_reported(reported)
        except ArtifactError:
            return  # the demo publishes broken messages itself; the nodes' counters judge them
