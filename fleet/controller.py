"""The controller: signs desired state, drives rollouts, takes reports and acknowledges them.

Owns one connection and one thread, the only writer of rollouts. What is sent is in the database first, so a restart
sends the same again; desired state is republished whenever the link comes up.
"""

import queue
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import structlog

from fleet.database import Database, DesiredRow
from fleet.library import Library
from fleet.rollout import NodeProgress, Rollout, RolloutState, expire, observe, ordered_back
from host.keys import Signer
from host.link import Broker, LinkUp, Received
from host.mqtt import Connection
from wire.digest import digest_of
from wire.documents import encode_document, parse_document
from wire.errors import AmperageError, ArtifactError, Code, ConfigError
from wire.messages import Ack, Desired, DesiredModel, Event, Numbered, Reported, Status, Telemetry
from wire.release import Release
from wire.signing import Role, TrustPolicy, open_envelope
from wire.topics import Topics

log = structlog.get_logger()

INBOX_MESSAGES = 50_000
REPORT_LIMIT_BYTES = 256 * 1024
TICK_S = 0.25
NUMBERED: dict[str, type[Numbered]] = {"event": Event, "telemetry": Telemetry}


@dataclass(slots=True)
class Controller:
    """Everything but the depot and the API."""

    broker: Broker
    topics: Topics
    database: Database
    library: Library
    signer: Signer
    trust: TrustPolicy
    default_deadline_s: float
    refused: int = 0
    """Reports that were not readable."""
    _reported: dict[str, Reported] = field(default_factory=dict)
    _orders: threading.Lock = field(default_factory=threading.Lock)
    _stop: threading.Event = field(default_factory=threading.Event)
    _link: Connection | None = None
    _thread: threading.Thread | None = None

    def start(self) -> None:
        """Connect and work in a thread."""
        inbox: queue.Queue[Any] = queue.Queue(INBOX_MESSAGES)
        self._link = Connection(self.broker, f"controller-{self.signer.public.keyid[:8]}", inbox)
        for kind in ("status", "reported", *NUMBERED):
            self._link.subscribe(self.topics.every_node(kind), qos=1)
        self._link.start()
        self._thread = threading.Thread(target=self._work, args=(inbox,), name="controller", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop working and disconnect."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        if self._link is not None:
            self._link.stop()

    def add_release(self, envelope: bytes) -> tuple[str, Release]:
        """Verify and keep a release whose documents and packs are in the library, and publish its documents.

        Raises ArtifactError: signature faults, bad_manifest when something of it was not uploaded.
        """
        release = parse_document(Release, open_envelope(envelope, Role.RELEASE, self.trust))
        digest = digest_of(envelope)
        for variant in release.variants:
            for reference in (variant.full, *variant.deltas):
                manifest = self.library.manifest(reference.manifest)
                if manifest.decoded != variant.decoded or self.library.pack_path(reference.manifest) is None:
                    raise ArtifactError(
                        Code.BAD_MANIFEST, f"artifact {reference.manifest[:12]}… is incomplete; upload its pack first"
                    )
        self.database.save_release(digest, (release.model, release.version, release.sequence), envelope)
        self._publish_documents(digest, envelope, release)
        return digest, release

    def start_rollout(self, release: str, nodes: list[str], max_failures: int, deadline_s: float | None) -> int:
        """Order `nodes` to run `release`; returns the rollout's number. Raises ConfigError when it is not here."""
        envelope = self.database.release_envelope(release)
        if envelope is None:
            raise ConfigError(f"release {release[:12]}… is not here; publish it first", Code.DOCUMENT_MISSING)
        parsed = parse_document(Release, open_envelope(envelope, Role.RELEASE, self.trust))
        with self._orders:
            told = tuple(self._order(node, parsed.model, release) for node in nodes)
            rollout = Rollout(
                release=release, model=parsed.model, version=parsed.version, max_failures=max_failures,
                deadline_s=deadline_s or self.default_deadline_s, started_s=time.time(), nodes=told,
            )  # fmt: skip
            identity = self.database.add_rollout(rollout.state, rollout.model_dump_json())
        log.info("rollout_started", rollout=identity, release=release, version=parsed.version, nodes=len(nodes))
        return identity

    def abort(self, identity: int, reason: str) -> None:
        """Stop a rollout by hand; unfinished nodes are ordered back. Raises ConfigError when it does not run."""
        with self._orders:
            rollout = self._running().get(identity)
            if rollout is None:
                raise ConfigError(f"rollout {identity} does not run; list them with `amperage fleet rollouts`")
            self._close(identity, rollout.model_copy(update={"state": RolloutState.ABORTED, "reason": reason}))

    def _order(self, node: str, model: str, release: str | None) -> NodeProgress:
        """Sign, keep and send a node's next desired state, with `model` at `release` or without it."""
        before = self.database.desired(node)
        models = dict(before.models) if before else {}
        previous = models.get(model)
        if release is None:
            models.pop(model, None)
        else:
            models[model] = release
        reported = self._reported.get(node)
        generation = max(before.generation if before else 0, reported.generation if reported else 0) + 1
        wanted = tuple(DesiredModel(model=name, release=digest) for name, digest in sorted(models.items()))
        desired = Desired(node=node, generation=generation, models=wanted)
        envelope = self.signer.sign(Role.DESIRED, encode_document(desired))
        row = DesiredRow(node, generation, envelope, models)
        self.database.save_desired(row)
        self._send_desired(row)
        return NodeProgress(node=node, generation=generation, previous=previous)

    def _running(self) -> dict[int, Rollout]:
        return {
            identity: Rollout.model_validate_json(body)
            for identity, body in self.database.rollouts(RolloutState.RUNNING)
        }

    def _advance(self, identity: int, before: Rollout, after: Rollout) -> None:
        if after is before:
            return
        if after.state in (RolloutState.STOPPED, RolloutState.ABORTED):
            self._close(identity, after)
            return
        self.database.save_rollout(identity, after.state, after.model_dump_json())
        if after.state is RolloutState.SUCCEEDED:
            log.info("rollout_succeeded", rollout=identity, version=after.version)

    def _close(self, identity: int, rollout: Rollout) -> None:
        """Order unfinished nodes back, then keep the end: a crash in between does it again."""
        for node in rollout.unfinished():
            self._order(node.node, rollout.model, node.previous)
        ended = ordered_back(rollout)
        self.database.save_rollout(identity, ended.state, ended.model_dump_json())
        log.warning("rollout_ended_early", rollout=identity, state=ended.state, reason=ended.reason)

    def _work(self, inbox: "queue.Queue[Any]") -> None:
        ticked_s = 0.0
        while not self._stop.is_set():
            try:
                message = inbox.get(timeout=TICK_S)
            except queue.Empty:
                message = None
            if isinstance(message, LinkUp):
                self._republish()
            elif isinstance(message, Received):
                self._take(message)
                message.ack()
            if time.monotonic() - ticked_s >= TICK_S:
                ticked_s = time.monotonic()
                self._tick()

    def _tick(self) -> None:
        with self._orders:
            for identity, rollout in self._running().items():
                seen = rollout
                for node in rollout.unfinished():
                    reported = self._reported.get(node.node)
                    if reported is not None:
                        seen = observe(seen, reported)
                self._advance(identity, rollout, expire(seen, time.time()))

    def _take(self, message: Received) -> None:
        """One report; what cannot be read is counted and dropped, never fatal."""
        named = self.topics.node_of(message.topic)
        if named is None:
            return
        try:
            self._file(named[0], named[1], message.payload)
        except AmperageError as error:
            self.refused += 1
            log.warning("report_refused", topic=message.topic, code=str(error.code), reason=error.message)

    def _file(self, node: str, kind: str, payload: bytes) -> None:
        if kind == "status":
            status = parse_document(Status, payload, limit_bytes=REPORT_LIMIT_BYTES)
            _check_name(node, status.node)
            self.database.save_status(node, online=status.online, boot_id=status.boot_id, session=status.session)
        elif kind == "reported":
            reported = parse_document(Reported, payload, limit_bytes=REPORT_LIMIT_BYTES)
            _check_name(node, reported.node)
            self._reported[node] = reported
            self.database.save_reported(node, encode_document(reported).decode())
        elif kind in NUMBERED:
            report = parse_document(NUMBERED[kind], payload, limit_bytes=REPORT_LIMIT_BYTES)
            _check_name(node, report.node)
            key = (node, report.boot_id, report.seq)
            body = encode_document(report).decode()
            reached = self.database.save_report(key, report.first, kind, report.time_s, body)
            self._publish(self.topics.ack(node), encode_document(Ack(acks={report.boot_id: reached})))

    def _republish(self) -> None:
        """Everything retained that is ours: a broker without persistence has forgotten it."""
        for row in self.database.releases():
            envelope = self.database.release_envelope(row["release"])
            if envelope is not None:
                release = parse_document(Release, open_envelope(envelope, Role.RELEASE, self.trust))
                self._publish_documents(row["release"], envelope, release)
        for desired in self.database.all_desired():
            self._send_desired(desired)

    def _publish_documents(self, digest: str, envelope: bytes, release: Release) -> None:
        self._publish(self.topics.document(digest), envelope, retain=True)
        for variant in release.variants:
            for reference in (variant.full, *variant.deltas):
                manifest = self.library.document(reference.manifest)
                if manifest is not None:
                    self._publish(self.topics.document(reference.manifest), manifest, retain=True)

    def _send_desired(self, row: DesiredRow) -> None:
        self._publish(self.topics.desired(row.node), row.envelope, retain=True)

    def _publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        if self._link is not None:
            self._link.publish(topic, payload, qos=1, retain=retain)


def _check_name(node: str, claimed: str) -> None:
    """A node speaks for itself only: the topic, which the broker's ACL proves, must agree with the payload."""
    if node != claimed:
        raise ArtifactError(Code.WRONG_NODE, f"report in the name of {claimed} came on {node}'s topic")
