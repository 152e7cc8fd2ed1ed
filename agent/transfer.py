"""The I/O of a fetch: the bulk connection, the staging file, and the journal rows that make progress durable.

Runs on the engine's thread. Invariant: fdatasync of the staging file comes before the journal row that calls its frames
verified; so a crash costs at most the window of wire/fetch.py and no journalled frame is ever fetched again.
"""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from agent.journal import Journal
from agent.mailbox import Port
from agent.store import Store
from host import files
from host.clock import Clock
from host.link import LinkFigures, Publication, Received, Will
from wire.bitmap import Bitmap
from wire.documents import encode_document
from wire.errors import ArtifactError, StoreError
from wire.fetch import Fetch, Judgement, credit_for, recheck
from wire.manifest import Manifest
from wire.messages import FrameMessage, Want
from wire.topics import Topics

STOP_TIMEOUT_S = 1.0


class Link(Protocol):
    """A connection to the broker (host/mqtt.py Connection)."""

    def start(self) -> None: ...
    def stop(self, timeout_s: float = ...) -> None: ...
    def publish(self, topic: str, payload: bytes, *, qos: int = ..., retain: bool = ...) -> Publication: ...
    def subscribe(self, topic: str, *, qos: int = ...) -> None: ...
    def unsubscribe(self, topic: str) -> None: ...
    def is_up(self) -> bool: ...
    def figures(self) -> LinkFigures: ...


class Links(Protocol):
    """Makes the node's two connections."""

    def control(self, inbox: Port, will: Callable[[int], Will]) -> Link:
        """The one that is always there."""
        ...

    def bulk(self, inbox: Port, limit_bytes_per_s: int | None) -> Link:
        """The one for frames, which reads no faster than the limit; None is none."""
        ...


class Transfer:
    """One artifact being fetched, from `start` to `close`."""

    def __init__(self, node: str, artifact: str, manifest: Manifest) -> None:
        self.artifact = artifact
        self._node = node
        self._manifest = manifest
        self._link: Link | None = None
        self._descriptor = -1
        self.refused = 0

    def start(self, store: Store, journal: Journal, clock: Clock) -> None:
        """Open the staging file and take up the journal's bitmap; raises StoreError (no_space)."""
        self._journal, self._clock = journal, clock
        size = self._manifest.pack_size_bytes
        verified = journal.verified(self.artifact)
        if verified is None or verified.length != self._manifest.frame_count or not store.has_pack(self.artifact, size):
            # No bitmap without the bytes it stands for: the row comes after the file.
            verified = Bitmap(self._manifest.frame_count)
            files.preallocate(store.pack_path(self.artifact), size)
            journal.save_verified(self.artifact, verified)
        self._descriptor = os.open(store.pack_path(self.artifact), os.O_RDWR | os.O_CLOEXEC)
        self.fetch = Fetch(self._node, self.artifact, self._manifest, verified, credit_for(0))
        self._open_index()

    def connect(self, link: Link, topics: Topics, limit_bytes_per_s: int | None) -> None:
        """Subscribe to the frames, which come no faster than the limit; the want follows when the link is up."""
        self._link, self._topics = link, topics
        self.fetch.set_credit(credit_for(limit_bytes_per_s or 0))
        link.subscribe(topics.frames(self.artifact), qos=0)
        link.start()

    def link_up(self) -> None:
        """The bulk link is new: ask anew."""
        self.fetch.begin_session()

    def take(self, message: Received) -> int | None:
        """Judge a message of the frames topic, and write, flush and journal as due; the frame's number if it is new."""
        if self.fetch.is_complete:
            return None
        try:
            frame = FrameMessage.parse(message.payload)
        except ArtifactError:
            self.refused += 1
            return None
        judgement = self.fetch.judge(frame)
        if judgement is Judgement.REFUSED:
            self.refused += 1
        elif judgement is Judgement.NEW:
            files.write_at(self._descriptor, frame.data, self.fetch.offset(frame.frame))
            self.fetch.wrote(frame.frame, self._clock.monotonic_s())
            self._open_index()
            self._flush_if_due()
            return frame.frame
        return None

    def tick(self) -> None:
        """Flush what waits too long, ask for what is missing."""
        self._flush_if_due()
        if self._link is None or not self._link.is_up() or self.fetch.is_complete:
            return
        want = self.fetch.want(self._clock.monotonic_s())
        if want is not None:
            self._publish(want)

    def disconnect(self) -> None:
        """End the bulk connection, telling the depot that nothing is wanted now; what came is kept. Idempotent."""
        if self._link is not None:
            with suppress(StoreError):  # what is not journalled is fetched again
                if self.fetch.due(float("inf")):
                    self._flush()
            if self._link.is_up():
                self._publish(self.fetch.farewell())
            self._link.stop(STOP_TIMEOUT_S)
            self._link = None

    def close(self) -> None:
        """Disconnect and let go of the file; idempotent."""
        self.disconnect()
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def figures(self) -> LinkFigures | None:
        """Counters of the bulk link while there is one."""
        return self._link.figures() if self._link else None

    def _publish(self, want: Want) -> None:
        if self._link is not None:
            self._link.publish(self._topics.want(self._node), encode_document(want), qos=0)

    def _open_index(self) -> None:
        if self.fetch.needs_index:
            self.fetch.open_index(os.pread(self._descriptor, self._manifest.index_size_bytes, 0))

    def _flush_if_due(self) -> None:
        if self.fetch.due(self._clock.monotonic_s()):
            self._flush()

    def _flush(self) -> None:
        files.sync_data(self._descriptor)
        self._journal.save_verified(self.artifact, self.fetch.verified)
        self.fetch.journalled()


def recheck_pack(manifest: Manifest, path: Path) -> Bitmap:
    """wire/fetch.py `recheck` of a staged pack. Blocks; for a work thread."""
    with path.open("rb") as pack:
        return recheck(manifest, lambda start, end: os.pread(pack.fileno(), end - start, start))
