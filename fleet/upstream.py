"""Packs from an upstream depot, for a gateway: whatever a site wants is fetched once, by the protocol of a node.

Owns one thread and, while something is fetched, one bulk connection. Invariants: every frame is verified before it is
kept or served; only artifacts whose manifest is in the library are fetched; a fetch lives as long as somebody at the
site renews a want for it. A crash leaves partial packs, which are hashed again and taken up.
"""

import math
import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import structlog

from fleet.library import Library
from fleet.partial import Partial
from fleet.settings import UpstreamSettings
from host.link import LinkUp, Received
from host.mqtt import Connection
from wire.documents import encode_document
from wire.errors import AmperageError, ArtifactError, Retry, StoreError
from wire.fetch import Fetch, Judgement, credit_for
from wire.messages import WANT_VOID_S, FrameMessage, Want
from wire.topics import Topics

log = structlog.get_logger()

INBOX_MESSAGES = 16
"""About 2 MiB: the bulk connection reads ahead that far while frames are written."""
TURN_S = 0.2
LEAVE_S = 1.0
RETRY_S = 30.0
"""After a disk that refused nothing is tried for this long; an artifact that is wrong stays so."""
PROGRESS_S = 10.0
PROGRESS_SHARE = 0.05


@dataclass(slots=True)
class _Download:
    """One artifact on its way."""

    partial: Partial
    fetch: Fetch
    told_s: float
    told_frames: int


class Upstream:
    """Fetches into `library`, a node like others to the upstream broker; `on_death` is called when its thread dies."""

    def __init__(
        self, settings: UpstreamSettings, topics: Topics, library: Library, on_death: Callable[[], None] = lambda: None
    ) -> None:
        self.received = 0
        """Frame messages that arrived from upstream."""
        self._settings, self._name, self._topics, self._library = settings, settings.name, topics, library
        self._on_death = on_death
        self._inbox: queue.Queue[Any] = queue.Queue(INBOX_MESSAGES)
        self._link: Connection | None = None
        self._limit: int | None = None
        """Of the connection, in bytes per second."""
        self._lock = threading.Lock()
        self._wanted: dict[str, float] = {}
        """Artifact, and when a node of the site last asked for it."""
        self._downloads: dict[str, _Download] = {}
        self._refused: dict[str, float] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="upstream")

    def start(self) -> None:
        """Work in a thread; a connection is made when something is wanted."""
        self._thread.start()

    def stop(self) -> None:
        """Leave the upstream broker and keep what was fetched; idempotent."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()

    def partial(self, artifact: str) -> Partial | None:
        """Somebody wants `artifact`: what is there of it, or None until its fetch has begun. From any thread."""
        with self._lock:
            self._wanted[artifact] = time.monotonic()
            download = self._downloads.get(artifact)
        return download.partial if download else None

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self._turn()
        except BaseException:
            log.exception("upstream_died")
            self._on_death()
            raise
        finally:
            for artifact in list(self._downloads):
                self._end(artifact)
            self._leave()

    def _turn(self) -> None:
        self._begin_and_end()
        self._hold_link()
        with suppress(queue.Empty):
            message = self._inbox.get(timeout=TURN_S)
            if isinstance(message, LinkUp):
                for download in self._downloads.values():
                    download.fetch.begin_session()
            elif isinstance(message, Received):
                self._take(message)
        for artifact, download in list(self._downloads.items()):
            want = download.fetch.want(time.monotonic()) if self._link is not None and self._link.is_up() else None
            if want is not None:
                self._say(want)
            self._tell(artifact, download)

    def _begin_and_end(self) -> None:
        now_s = time.monotonic()
        with self._lock:
            self._wanted = {name: at_s for name, at_s in self._wanted.items() if now_s - at_s < WANT_VOID_S}
            wanted = set(self._wanted)
        self._refused = {name: until_s for name, until_s in self._refused.items() if now_s < until_s}
        for artifact in set(self._downloads) - wanted:
            log.info("download_suspended", artifact=artifact, frames=self._downloads[artifact].fetch.frames_verified)
            self._end(artifact)
        for artifact in wanted - set(self._downloads) - set(self._refused):
            if self._library.pack_path(artifact) is None and self._library.document(artifact) is not None:
                self._guarded(artifact, partial(self._begin, artifact))

    def _hold_link(self) -> None:
        """A connection while something is fetched, as fast as may be now; none in a pause."""
        limit = self._settings.bandwidth.limit_at(time.time(), self._settings.bandwidth_limit_bytes_per_s)
        if limit != self._limit:
            log.info("download_paced", limit_bytes_per_s=limit)
        if not self._downloads or limit != self._limit:
            self._leave()
        self._limit = limit
        if self._link is None and self._downloads and limit != 0:
            self._inbox = queue.Queue(INBOX_MESSAGES)
            self._link = Connection(
                self._settings.broker, f"{self._name}-bulk", self._inbox, rate_limit_bytes_per_s=limit
            )
            for artifact, download in self._downloads.items():
                download.fetch.set_credit(credit_for(limit or 0))
                self._link.subscribe(self._topics.frames(artifact))
            self._link.start()

    def _begin(self, artifact: str) -> None:
        manifest = self._library.manifest(artifact)
        pack = self._library.open_partial(artifact, manifest)
        fetch = Fetch(self._name, artifact, manifest, pack.verified, credit_for(self._limit or 0))
        log.info("download_started", artifact=artifact, frames=fetch.frames_total, verified=fetch.frames_verified)
        with self._lock:
            self._downloads[artifact] = _Download(pack, fetch, time.monotonic(), fetch.frames_verified)
        self._advance(artifact)
        if self._link is not None and artifact in self._downloads:
            self._link.subscribe(self._topics.frames(artifact))

    def _take(self, message: Received) -> None:
        artifact = message.topic.rpartition("/")[2]
        download = self._downloads.get(artifact)
        if download is None:
            return
        self.received += 1
        try:
            frame = FrameMessage.parse(message.payload)
        except ArtifactError:
            return
        if download.fetch.judge(frame) is Judgement.NEW:
            self._guarded(artifact, lambda: self._keep(artifact, download, frame))

    def _keep(self, artifact: str, download: _Download, frame: FrameMessage) -> None:
        download.partial.write(frame.frame, frame.data)
        download.fetch.wrote(frame.frame, time.monotonic())
        self._advance(artifact)

    def _advance(self, artifact: str) -> None:
        download = self._downloads[artifact]
        if download.fetch.needs_index:
            download.fetch.open_index(download.partial.index())
        if download.fetch.is_complete:
            download.partial.commit(self._library.path_of(artifact))
            log.info("download_complete", artifact=artifact, frames=download.fetch.frames_total,
                     duplicates=download.fetch.duplicates, refused=download.fetch.refused)  # fmt: skip
            self._end(artifact)

    def _guarded(self, artifact: str, act: Callable[[], None]) -> None:
        """A disk that refuses ends this one fetch for a while, an artifact that is wrong for good."""
        try:
            act()
        except (StoreError, ArtifactError) as error:
            log.warning("download_failed", artifact=artifact, code=str(error.code), reason=error.message)
            self._refused[artifact] = time.monotonic() + (math.inf if error.retry is Retry.NEVER else RETRY_S)
            self._end(artifact)

    def _end(self, artifact: str) -> None:
        with self._lock:
            download = self._downloads.pop(artifact, None)
        if download is None:
            return
        if self._link is not None:
            self._link.unsubscribe(self._topics.frames(artifact))
            if self._link.is_up():
                self._say(download.fetch.farewell())
        download.partial.close()

    def _leave(self) -> None:
        if self._link is not None:
            self._link.stop(LEAVE_S)
            self._link = None

    def _say(self, want: Want) -> None:
        if self._link is not None:
            with suppress(AmperageError):
                self._link.publish(self._topics.want(self._name), encode_document(want))

    def _tell(self, artifact: str, download: _Download) -> None:
        """Progress for whoever reads the log: every 5 % or 10 s, when there is some."""
        now_s, frames = time.monotonic(), download.fetch.frames_verified
        step = frames - download.told_frames
        if step >= PROGRESS_SHARE * download.fetch.frames_total or (step and now_s - download.told_s >= PROGRESS_S):
            download.told_s, download.told_frames = now_s, frames
            log.info("download_progress", artifact=artifact, frames=download.fetch.frames_total, verified=frames)
