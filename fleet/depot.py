"""The depot: answers wants with frames. I/O around fleet/carousel.py; owns one connection and one thread.

Nothing is kept: after a restart the epoch is new, the nodes renew their wants, and their bitmaps say everything.
"""

import os
import queue
import secrets
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import structlog

from fleet.carousel import Carousel
from fleet.library import Library, read_frame
from host.link import Broker, Received
from host.mqtt import Connection
from wire.documents import parse_document
from wire.errors import AmperageError, ArtifactError, Code
from wire.manifest import Manifest
from wire.messages import FrameMessage, Status, Want
from wire.topics import Topics

log = structlog.get_logger()

INBOX_MESSAGES = 10_000
OUTGOING_BYTES = 1024 * 1024
"""Frames handed to the connection ahead of the socket: enough to keep it busy, little enough to stop at once."""
IDLE_S = 0.2
FLOW_S = 0.05
WANT_LIMIT_BYTES = 4 * 1024 * 1024 + 4096


@dataclass(slots=True)
class _Offer:
    """An artifact that somebody wants."""

    manifest: Manifest
    carousel: Carousel
    descriptor: int

    def close(self) -> None:
        os.close(self.descriptor)


@dataclass(slots=True)
class Depot:
    """Serves the packs of `library`."""

    broker: Broker
    topics: Topics
    library: Library
    epoch: int = field(default_factory=lambda: secrets.randbelow(2**32 - 1) + 1)
    refused: int = 0
    """Messages that were no wants."""
    published: int = 0
    _offers: dict[str, _Offer] = field(default_factory=dict)
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        """Connect and serve in a thread."""
        inbox: queue.Queue[Any] = queue.Queue(INBOX_MESSAGES)
        link = Connection(self.broker, f"depot-{self.epoch:08x}", inbox)
        link.subscribe(self.topics.every_node("want"), qos=0)
        link.subscribe(self.topics.every_node("status"), qos=1)
        link.start()
        self._thread = threading.Thread(target=self._serve, args=(link, inbox), name="depot", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop serving."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _serve(self, link: Connection, inbox: "queue.Queue[Any]") -> None:
        try:
            while not self._stop.is_set():
                busy = self._publish_round(link)
                self._take_all(inbox, 0.0 if busy else IDLE_S)
                if busy:
                    link.wait_outgoing_below(OUTGOING_BYTES, FLOW_S)
        finally:
            link.stop()
            for offer in self._offers.values():
                offer.close()

    def _publish_round(self, link: Connection) -> bool:
        """One frame of every artifact in turn while the connection takes them; True when anything went out."""
        sent = False
        now_s = time.monotonic()
        for artifact, offer in list(self._offers.items()):
            if link.outgoing_bytes() >= OUTGOING_BYTES:
                return True
            chosen = offer.carousel.next_frame(now_s)
            if chosen is None:
                if offer.carousel.is_idle(now_s):
                    self._offers.pop(artifact).close()
                continue
            seq, frame = chosen
            message = FrameMessage(self.epoch, seq, frame, read_frame(offer.descriptor, offer.manifest, frame))
            link.publish(self.topics.frames(artifact), message.encode(), qos=0)
            self.published += 1
            sent = True
        return sent

    def _take_all(self, inbox: "queue.Queue[Any]", timeout_s: float) -> None:
        try:
            message = inbox.get(timeout=timeout_s) if timeout_s else inbox.get_nowait()
            while True:
                if isinstance(message, Received):
                    self._take(message)
                    message.ack()
                message = inbox.get_nowait()
        except queue.Empty:
            return

    def _take(self, message: Received) -> None:
        """A hostile node can hurt only itself: the name comes from the topic, which the broker's ACL proves."""
        named = self.topics.node_of(message.topic)
        try:
            if named is not None and named[1] == "want":
                want = parse_document(Want, message.payload, limit_bytes=WANT_LIMIT_BYTES)
                if want.node != named[0]:
                    raise ArtifactError(Code.WRONG_NODE, f"it is in the name of {want.node}, on another node's topic")
                self._want(want)
            elif named is not None and not parse_document(Status, message.payload).online:
                for offer in self._offers.values():
                    offer.carousel.leave(named[0])
        except AmperageError as error:
            self.refused += 1
            log.warning("message_refused", topic=message.topic, code=str(error.code), reason=error.message)

    def _want(self, want: Want) -> None:
        offer = self._offers.get(want.artifact)
        if offer is None:
            path = self.library.pack_path(want.artifact)
            if path is None:
                log.warning("artifact_unknown", node=want.node, artifact=want.artifact)
                return
            manifest = self.library.manifest(want.artifact)
            carousel = Carousel(manifest.frame_count, self.epoch)
            offer = _Offer(manifest, carousel, os.open(path, os.O_RDONLY | os.O_CLOEXEC))
            self._offers[want.artifact] = offer
        offer.carousel.want(want, time.monotonic())
