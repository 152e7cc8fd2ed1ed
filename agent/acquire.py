"""From an order to a whole version on the disk: admit, fetch, decode. On the engine's thread.

A crash leaves the staged manifest, the staged frames that the journal knows, and rubbish in work/; nothing that serves
is touched here.
"""

import structlog

from agent.admission import Choice, Fitness, check_manifest, check_room, choose, open_release
from agent.deployment import Runner
from agent.lifecycle import Outcome
from agent.pacer import Pace
from agent.reporting import Progress
from agent.stage import Stage
from agent.transfer import Transfer, recheck_pack
from agent.unpack import Unpack, is_time_to_unpack
from host.link import LinkUp, Received
from wire.bitmap import Bitmap
from wire.digest import verify_digest
from wire.documents import parse_document
from wire.errors import AmperageError, ArtifactError, Code, DeployError
from wire.manifest import Manifest
from wire.messages import State
from wire.release import Release
from wire.serving import MODEL_SESSIONS

log = structlog.get_logger()

REPAIRS_LIMIT = 3


class Admitting(Stage):
    """Get the release and the manifest, check both, choose; nothing but the manifest is written."""

    def __init__(self, runner: Runner) -> None:
        super().__init__(runner)
        self._asked: str | None = None
        self._release: Release | None = None
        self._choice: Choice | None = None
        self._damaged: ArtifactError | None = None

    def start(self) -> None:
        row = self.runner.row
        served = self.ports.store.served(row.model)
        if served is not None and served.release == row.release and self.ports.store.has_version(served.decoded):
            self.runner.advance(Outcome.SERVING, version=served.version, decoded=served.decoded)
            return
        self._release = self._choice = None
        self._ask(row.release)

    def on_document(self, digest: str, payload: bytes) -> None:
        if digest != self._asked:
            return
        try:
            verify_digest(payload, digest, "a document")
        except ArtifactError as error:  # anybody may publish rubbish there: the right one may still come
            self._damaged = error
            self.ports.reporter.reject(self.ports.topics.document(digest), error)
            return
        try:
            if self._release is None:
                self._admit(payload)
            else:
                self._clear(digest, payload)
        except ArtifactError as error:
            self.ports.reporter.reject(self.ports.topics.document(digest), error)
            raise

    def overdue(self, trouble: AmperageError | None) -> None:
        del trouble
        if self._damaged is not None:
            raise self._damaged
        what = "release" if self._release is None else "manifest"
        raise DeployError(
            Code.DOCUMENT_MISSING, f"the {what} {(self._asked or '')[:12]}… did not arrive; publish the release again"
        )

    def close(self) -> None:
        self._ask(None)

    def _admit(self, payload: bytes) -> None:
        row, store = self.runner.row, self.ports.store
        release = open_release(self.ports.trust, payload, row.model)
        self.runner.save(version=release.version)
        choice = choose(release, self._fitness())
        self._release, self._choice = release, choice
        decoded, name = choice.variant.decoded, choice.variant.name
        served = store.served(row.model)
        if served is not None and served.decoded == decoded and store.has_version(decoded):
            renamed = served.model_copy(update={"release": row.release, "version": release.version})
            store.serve(row.model, renamed)
            self.runner.advance(Outcome.SERVING, variant=name, decoded=decoded)
        elif store.has_version(decoded):
            self.runner.advance(Outcome.FOUND, variant=name, decoded=decoded)
        else:
            self._ask(choice.artifact.manifest)

    def _clear(self, digest: str, payload: bytes) -> None:
        if self._release is None or self._choice is None:
            return
        manifest = parse_document(Manifest, payload, code=Code.BAD_MANIFEST)
        check_manifest(manifest, self._release, self._choice)
        sessions = 0 if self.ports.settings.disk == "small" else MODEL_SESSIONS
        check_room(manifest, self._fitness(), self.ports.settings.disk_reserve_bytes, sessions)
        self.ports.store.stage_manifest(digest, payload)
        data = {"frames": manifest.frame_count, "wire_bytes": manifest.pack_size_bytes, "delta": bool(manifest.base)}
        self.runner.advance(
            Outcome.CLEARED, data=data, variant=self._choice.variant.name, artifact=digest, base=self._choice.base,
            decoded=manifest.decoded,
        )  # fmt: skip

    def _ask(self, digest: str | None) -> None:
        if self._asked is not None and self._asked != digest:
            self.ports.control.unsubscribe(self.ports.topics.document(self._asked))
        self._asked = digest
        if digest is not None:
            self.ports.control.subscribe(self.ports.topics.document(digest), qos=1)

    def _fitness(self) -> Fitness:
        available, _ = self.ports.machine.memory()
        return Fitness(
            available, self.ports.store.free_bytes(), self.ports.machine.cpu_features(), self.ports.store.versions()
        )


_NO_PACE = Pace(-1)
"""Unlike any that can hold."""


class Fetching(Stage):
    """Fetch what the journal does not call verified; decode what is there already, in time for the last frame."""

    _transfer: Transfer | None = None
    _counted = 0
    _whole = False
    _pace = _NO_PACE
    _ticked_s = 0.0

    def start(self) -> None:
        self.close()
        artifact = self.runner.row.artifact or ""
        manifest = self.ports.store.staged_manifest(artifact)
        transfer = Transfer(self.ports.settings.node, artifact, manifest)
        self._transfer, self._counted = transfer, 0
        self._decoded_bytes = sum(entry.size_bytes for entry in manifest.version.files)
        transfer.start(self.ports.store, self.ports.journal, self.ports.clock)
        if transfer.fetch.is_complete:
            self._finish(transfer)
            return
        self._began_s, self._had = self.ports.clock.monotonic_s(), transfer.fetch.frames_verified
        self._ticked_s = self._began_s
        self._obey(transfer)

    def on_frame(self, message: object) -> None:
        transfer = self._transfer
        if transfer is None:
            return
        if isinstance(message, Received):
            frame = transfer.take(message)
            self._count(transfer)
            if frame is not None:
                self._unpack(transfer, frame)
            if transfer.fetch.is_complete:
                self._finish(transfer)
            else:
                transfer.tick()
        elif isinstance(message, LinkUp):
            transfer.link_up()
            transfer.tick()

    def tick(self) -> None:
        now_s = self.ports.clock.monotonic_s()
        if self._transfer is not None:
            if self._pace.is_pause:
                self.runner.postpone(now_s - self._ticked_s)
            self._obey(self._transfer)
            self._transfer.tick()
        self._ticked_s = now_s

    def close(self) -> None:
        transfer, self._transfer = self._transfer, None
        self._pace = _NO_PACE
        if transfer is not None:
            transfer.close()
        if self.runner.unpack is not None and not self._whole:
            self.runner.unpack.discard()
            self.runner.unpack = None

    def progress(self) -> Progress | None:
        if self._transfer is None:
            return None
        fetch = self._transfer.fetch
        return Progress(self.runner.row.model, fetch.frames_verified, fetch.frames_total, self._pace.why)

    def _obey(self, transfer: Transfer) -> None:
        """Come at the pace that holds now: with another limit by another connection, in a pause by none."""
        before, self._pace = self._pace, self.ports.pacer.now()
        if self._pace == before:
            return
        self.ports.journal.note_pace(self._pace.why)
        if self._pace.limit_bytes_per_s == before.limit_bytes_per_s:
            return
        limit = self._pace.limit_bytes_per_s
        log.info("fetch_paced", artifact=transfer.artifact, limit_bytes_per_s=limit, why=self._pace.why)
        transfer.disconnect()
        if not self._pace.is_pause:
            link = self.ports.links.bulk(self.ports.mailbox.new_frames_port(), limit)
            transfer.connect(link, self.ports.topics, limit)

    def _unpack(self, transfer: Transfer, frame: int) -> None:
        """Tell the decoder of a new frame, or begin decoding when it is time."""
        fetch, runner = transfer.fetch, self.runner
        if runner.unpack is not None:
            runner.unpack.add([frame])
            return
        fetched, left = fetch.frames_verified - self._had, fetch.frames_total - fetch.frames_verified
        elapsed_s = self.ports.clock.monotonic_s() - self._began_s
        if fetch.has_index and is_time_to_unpack(fetched, left, elapsed_s, self._decoded_bytes):
            runner.unpack = Unpack(runner.row, self.ports.store, self.ports.decoder, early=True)
            runner.unpack.add(list(fetch.verified))

    def _count(self, transfer: Transfer) -> None:
        self.ports.reporter.frames_refused += transfer.refused - self._counted
        self._counted = transfer.refused

    def _finish(self, transfer: Transfer) -> None:
        data = {"frames": transfer.fetch.frames_total, "duplicates": transfer.fetch.duplicates,
                "refused": transfer.refused}  # fmt: skip
        self._whole = True
        self.runner.advance(Outcome.FETCHED, data=data)


class Decoding(Stage):
    """Decode in a child into work/, or what is left of that after the fetch; then give the directory its name."""

    _doubt: AmperageError | None = None
    _unpack: Unpack | None = None

    def start(self) -> None:
        row, store = self.runner.row, self.ports.store
        self._doubt = None
        self._unpack, self.runner.unpack = self.runner.unpack, None
        if store.has_version(row.decoded or ""):
            self._done()
            return
        if self._unpack is None:
            frames = store.staged_manifest(row.artifact or "").frame_count
            self._unpack = Unpack(row, store, self.ports.decoder, early=False)
            self._unpack.add(range(frames))
        unpack, deadline_s = self._unpack, self.ports.settings.deadline_s(State.DECODING)
        self.runner.work("decode", lambda: unpack.wait(deadline_s))

    def on_result(self, result: object) -> None:
        artifact = self.runner.row.artifact or ""
        if self._doubt is None and self._unpack is not None:
            self.ports.store.commit_version(self._unpack.directory, self.runner.row.decoded or "")
            self._unpack = None
            self._done()
        elif isinstance(result, Bitmap) and len(result) < result.length:
            self.ports.journal.save_verified(artifact, result)
            damaged = result.length - len(result)
            self.runner.advance(Outcome.DAMAGED, data={"frames_damaged": damaged}, attempts=self.runner.row.attempts)
        elif self._doubt is not None:
            raise self._doubt

    def on_error(self, error: AmperageError) -> bool:
        """Bytes that were right when they were fetched and do not decode: the disk or the artifact; find out which.

        A decoder that began early may have ended long before: what was wrong then may be right now.
        """
        if self._unpack is not None:
            early = self._unpack.early
            self._unpack.discard()
            self._unpack = None
            if early:
                self.start()
                return True
        if not isinstance(error, ArtifactError) or self._doubt is not None or self.runner.repairs >= REPAIRS_LIMIT:
            return False
        self._doubt = error
        self.runner.repairs += 1
        artifact = self.runner.row.artifact or ""
        manifest = self.ports.store.staged_manifest(artifact)
        path = self.ports.store.pack_path(artifact)
        self.runner.work("recheck", lambda: recheck_pack(manifest, path))
        return True

    def close(self) -> None:
        if self._unpack is not None:
            self._unpack.discard()
            self._unpack = None

    def _done(self) -> None:
        self.runner.advance(Outcome.DECODED)
        self.runner.forget_staging(self.runner.row.artifact or "")
