"""The depot: answers wants with frames. I/O around fleet/carousel.py; owns one connection and one thread.

Invariant: at most OUTGOING_BYTES of frames wait for the socket, so a node that goes away stops costing at once, and
several artifacts take turns frame by frame. Nothing is kept: after a restart the epoch is new, the nodes renew their
wants, and their bitmaps say everything.
"""

import os
import queue
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import structlog

from fleet.carousel import Carousel
from fleet.library import Library, read_frame
from fleet.partial import Partial
from fleet.presence import Presence, after_status
from fleet.refusals import Refusals, check_speaker
from host.link import Broker, Received
from host.mqtt import Connection
from wire.documents import parse_document
from wire.errors import AmperageError, ArtifactError, Code, StoreError, TransferError
from wire.manifest import Manifest
from wire.messages import FrameMessage, Status, Want
from wire.topics import Topics

log = structlog.get_logger()

INBOX_MESSAGES = 1024
MESSAGES_PER_TURN = 256
OUTGOING_BYTES = 1024 * 1024
"""Frames handed to the connection ahead of the socket: enough to keep it busy, little enough to stop at once."""
IDLE_S = 0.2
WAITING_S = 0.02
"""Between looks while readers wait for the pass to begin or for their credit."""
FLOW_S = 0.05
WANT_LIMIT_BYTES = 4 * 1024 * 1024 + 4096


@dataclass(slots=True)
class _Offer:
    """An artifact that somebody wants."""

    manifest: Manifest
    carousel: Carousel
    descriptor: int
    partial: Partial | None = None
    """Absent for a pack that is whole."""

    def close(self) -> None:
        os.close(self.descriptor)


class Source(Protocol):
    """Where packs come from that are not in the library (fleet/upstream.py)."""

    def partial(self, artifact: str) -> Partial | None:
        """What is there of a pack that somebody wants, None until its fetch has begun."""
        ...


class Depot:
    """Serves the packs of `library` and what `source` is fetching; `on_death` is called when its thread dies."""

    def __init__(
        self,
        broker: Broker,
        topics: Topics,
        library: Library,
        on_death: Callable[[], None] = lambda: None,
        source: Source | None = None,
    ) -> None:
        self.epoch = secrets.randbelow(2**32 - 1) + 1
        self.published = 0
        self.refusals = Refusals()
        self._topics = topics
        self._library = library
        self._on_death = on_death
        self._source = source
        self._inbox: queue.Queue[Any] = queue.Queue(INBOX_MESSAGES)
        self._link = Connection(broker, f"fleet:depot:{self.epoch:08x}", self._inbox)
        self._link.subscribe(topics.every_node("status"), qos=1)
        self._link.subscribe(topics.every_node("want"), qos=0)
        self._offers: dict[str, _Offer] = {}
        self._presence: dict[str, Presence] = {}
        self._online: set[str] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="depot")

    def start(self) -> None:
        """Connect and serve in a thread."""
        self._link.start()
        self._thread.start()

    def stop(self) -> None:
        """Stop serving; idempotent."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()
        self._link.stop()

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self._turn()
        except BaseException:
            log.exception("depot_died")
            self._on_death()
            raise
        finally:
            for offer in self._offers.values():
                offer.close()

    def _turn(self) -> None:
        sent = self._link.is_up() and self._publish_round()
        self._close_idle()
        if sent:
            self._take_waiting(0.0)
            self._link.wait_outgoing_below(OUTGOING_BYTES, FLOW_S)
        else:
            self._take_waiting(WAITING_S if any(offer.carousel.readers for offer in self._offers.values()) else IDLE_S)

    def _publish_round(self) -> bool:
        """One frame of every artifact in turn, as the connection takes them; True when anything went out."""
        sent = False
        now_s = time.monotonic()
        for artifact in list(self._offers):
            if self._link.outgoing_bytes() >= OUTGOING_BYTES:
                return True
            offer = self._offers.pop(artifact)
            self._offers[artifact] = offer  # to the end of the queue: the next round begins with another one
            if offer.partial is not None:
                offer.carousel.available = offer.partial.bits
            found = offer.carousel.next_frame(now_s)
            if found is not None:
                self._publish(artifact, offer, *found)
                sent = True
        return sent

    def _publish(self, artifact: str, offer: _Offer, frame: int, seq: int) -> None:
        try:
            data = read_frame(offer.descriptor, offer.manifest, frame)
        except StoreError as error:
            log.warning("pack_unreadable", artifact=artifact, code=str(error.code), reason=error.message)
            self._offers.pop(artifact).close()  # the nodes ask again, and then it is opened anew
            return
        message = FrameMessage(self.epoch, seq, frame, data)
        try:
            self._link.publish(self._topics.frames(artifact), message.encode(), qos=0)
        except TransferError:
            return  # lost on its way, as any frame may be: `seen` will pass it
        self.published += 1

    def _close_idle(self) -> None:
        for artifact in [name for name, offer in self._offers.items() if offer.carousel.is_idle]:
            self._offers.pop(artifact).close()

    def _take_waiting(self, timeout_s: float) -> None:
        try:
            message = self._inbox.get(timeout=timeout_s) if timeout_s else self._inbox.get_nowait()
            for _ in range(MESSAGES_PER_TURN):
                if isinstance(message, Received):
                    self._take(message)
                    message.ack()
                message = self._inbox.get_nowait()
        except queue.Empty:
            return

    def _take(self, message: Received) -> None:
        """A hostile node can hurt only itself: the name comes from the topic, which the broker's ACL proves."""
        node, kind = self._topics.node_of(message.topic) or ("", "")
        try:
            if kind == "want":
                want = parse_document(Want, message.payload, limit_bytes=WANT_LIMIT_BYTES)
                check_speaker(node, want.node)
                self._want(want)
            elif kind == "status":
                status = parse_document(Status, message.payload)
                check_speaker(node, status.node)
                self._status(status, retained=message.retained)
        except AmperageError as error:
            self.refusals.add(message.topic, error)

    def _status(self, status: Status, *, retained: bool) -> None:
        """Offline or a new life: what the old one wanted is void at once."""
        before = self._presence.get(status.node)
        after = after_status(before, status, retained=retained)
        if after is None:
            return
        self._presence[status.node] = after
        (self._online.add if after.online else self._online.discard)(status.node)
        if not after.online or (before is not None and before.boot_id != after.boot_id):
            for offer in self._offers.values():
                offer.carousel.drop(status.node)

    def _want(self, want: Want) -> None:
        offer = self._offer(want.artifact)
        if offer is None:
            return  # its fetch has just been asked for; the want is renewed in a moment
        if want.frames != offer.carousel.frames:
            raise ArtifactError(Code.BAD_DOCUMENT, f"want of {want.frames} frames for {offer.carousel.frames}")
        offer.carousel.company = len(self._online)
        seen = want.seen_by(self.epoch)
        offer.carousel.on_want(want.node, want.missing_frames(), seen, want.credit, time.monotonic())

    def _offer(self, artifact: str) -> _Offer | None:
        """What is offered of `artifact`; None while its source has not begun. Every want keeps a fetch alive."""
        offer, path = self._offers.get(artifact), self._library.pack_path(artifact)
        if path is None and self._source is not None:
            manifest = self._library.manifest(artifact)
            partial = self._source.partial(artifact)
            if partial is not None:
                offer = offer or self._open(artifact, manifest, partial.path)
                offer.partial = partial
            return offer
        if offer is not None:
            return offer
        if path is None:
            raise ArtifactError(
                Code.DOCUMENT_MISSING, f"artifact {artifact[:12]}… is wanted and was never published here"
            )
        return self._open(artifact, self._library.manifest(artifact), path)

    def _open(self, artifact: str, manifest: Manifest, path: Path) -> _Offer:
        carousel = Carousel(manifest.frame_count, len(manifest.index_frames), self.epoch)
        offer = _Offer(manifest, carousel, _open_pack(path))
        self._offers[artifact] = offer
        return offer


def _open_pack(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise StoreError(Code.IO_ERROR, f"{path} cannot be opened ({error}); check the control plane's disk") from error
