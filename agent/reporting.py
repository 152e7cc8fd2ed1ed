"""What this node tells the fleet: status, reported state, events and telemetry until they are acknowledged.

Runs on the engine's thread. Invariant: an event or a window is in the journal before it is published and leaves it only
by an acknowledgement (or as a declared gap); the retained report is always built from journal and serving.json, never
from memory, so that a restarted agent says the same. A crash repeats at most some messages; (boot_id, seq) tells.
"""

import json
from collections import deque
from dataclasses import dataclass

import structlog

from agent.journal import Deployment, Journal
from agent.lifecycle import is_end
from agent.store import Store
from agent.transfer import Link
from host.clock import Clock
from wire.documents import encode_document, parse_document
from wire.errors import AmperageError, TransferError
from wire.messages import Ack, Event, ModelReport, Numbered, Rejection, Reported, State, Status, Telemetry
from wire.serving import ServingModel
from wire.topics import Topics

log = structlog.get_logger()

REJECTIONS_KEPT = 16
TEXT_LIMIT = 2000
BATCH_REPORTS = 64
RESEND_FIRST_S = 15.0
RESEND_MOST_S = 300.0
READER_S = 5.0
PROGRESS_SHARE = 0.05
PROGRESS_S = 10.0


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the running fetch of a model is."""

    model: str
    frames_verified: int
    frames_total: int
    note: str = ""
    """What holds it back, for people."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Who reports: the node, and this start of its agent."""

    node: str
    boot_id: str
    topics: Topics


class Reporter:
    """Builds and publishes reports; silent until `attach`."""

    def __init__(self, identity: Identity, journal: Journal, store: Store, clock: Clock, outbox_limit: int) -> None:
        self._identity = identity
        self._journal = journal
        self._store = store
        self._clock = clock
        self._outbox_limit = outbox_limit
        self._link: Link | None = None
        self._rejections: deque[Rejection] = deque(maxlen=REJECTIONS_KEPT)
        self._dirty = True
        self._told: Progress | None = None
        self._told_s = 0.0
        self._sent_up_to = (0, 0)
        self._more = True
        self._resend_s = RESEND_FIRST_S
        self._resend_due_s = 0.0
        self.frames_refused = 0

    def attach(self, link: Link) -> None:
        """The control connection to publish on."""
        self._link = link

    def status(self, session: int, *, online: bool) -> bytes:
        """The status document of a session; offline for the will and for an orderly end."""
        return encode_document(
            Status(node=self._identity.node, online=online, boot_id=self._identity.boot_id, session=session)
        )

    def link_up(self, session: int) -> None:
        """Tell everything anew: the broker may have forgotten it, the fleet may have missed it."""
        self._publish(self._identity.topics.status(self._identity.node), self.status(session, online=True), retain=True)
        self._dirty = True
        self.offer_again()

    def say_offline(self, session: int) -> None:
        """The agent ends on purpose."""
        self._publish(
            self._identity.topics.status(self._identity.node), self.status(session, online=False), retain=True
        )

    def changed(self) -> None:
        """The retained report is out of date."""
        self._dirty = True

    def reject(self, topic: str, error: AmperageError) -> None:
        """Refuse a command loudly; the same refusal is told once."""
        rejection = Rejection(topic=topic, code=error.code.value, detail=error.message[:TEXT_LIMIT])
        if rejection not in self._rejections:
            self._rejections.append(rejection)
            self._dirty = True
            log.warning("command_rejected", topic=topic, code=error.code.value, detail=error.message)

    def add_event(
        self, before: State | None, row: Deployment, data: dict[str, float | int | str | bool] | None = None
    ) -> None:
        """Journal a transition as an event; call inside the transaction that journals the transition itself."""
        event = Event(
            node=self._identity.node, boot_id=self._identity.boot_id, seq=1, first=1, time_s=self._clock.wall_s(),
            model=row.model, release=row.release, version=row.version, before=before, after=row.state,
            reason=row.reason, detail=row.detail, data=data or {},
        )  # fmt: skip
        self._keep("event", event)
        self._dirty = True

    def add_telemetry(self, window: Telemetry) -> None:
        """Journal a window; its seq and first are given here."""
        self._keep("telemetry", window)

    def acknowledge(self, payload: bytes) -> None:
        """Forget what the fleet has committed; raises ArtifactError on anything but an Ack."""
        dropped = self._journal.acknowledge(dict(parse_document(Ack, payload).acks))
        if dropped:
            self._resend_s = RESEND_FIRST_S
            self._resend_due_s = self._clock.monotonic_s() + self._resend_s

    def offer_again(self) -> None:
        """Somebody who takes reports may have come: offer all of them again."""
        self._sent_up_to = (0, 0)
        self._more = True
        self._resend_s = RESEND_FIRST_S
        self._resend_due_s = self._clock.monotonic_s() + self._resend_s

    def expect_reader(self) -> None:
        """The fleet has just spoken: what stays unacknowledged for a moment longer it has missed."""
        self._resend_s = RESEND_FIRST_S
        self._resend_due_s = min(self._resend_due_s, self._clock.monotonic_s() + READER_S)

    def tick(self, progress: Progress | None) -> None:
        """Publish what is due; does nothing while the link is down."""
        if self._link is None or not self._link.is_up():
            return
        now_s = self._clock.monotonic_s()
        if self._dirty or self._progress_due(progress, now_s):
            self._dirty = not self._publish_reported(progress)
            self._told, self._told_s = progress, now_s
        self._pump(now_s)

    def reported(self, progress: Progress | None) -> Reported:
        """The report as of now."""
        served = {entry.model: entry for entry in self._store.serving().models}
        rows = {row.model: row for row in self._journal.deployments()}
        models = [_model_report(rows.get(name), served.get(name), progress) for name in sorted(rows | served)]
        return Reported(
            node=self._identity.node,
            boot_id=self._identity.boot_id,
            generation=self._journal.desired()[0],
            models=tuple(model for model in models if model is not None),
            rejections=tuple(self._rejections),
            frames_refused=self.frames_refused,
        )

    def _progress_due(self, progress: Progress | None, now_s: float) -> bool:
        if progress is None or progress == self._told:
            return False
        if self._told is None or self._told.model != progress.model:
            return True
        step = progress.frames_verified - self._told.frames_verified
        return step >= PROGRESS_SHARE * progress.frames_total or now_s - self._told_s >= PROGRESS_S

    def _publish_reported(self, progress: Progress | None) -> bool:
        topic = self._identity.topics.reported(self._identity.node)
        return self._publish(topic, encode_document(self.reported(progress)), retain=True)

    def _keep(self, kind: str, report: Numbered) -> None:
        body = json.loads(encode_document(report))
        del body["first"], body["seq"], body["boot_id"]
        self._journal.add_report(kind, body, self._outbox_limit)
        self._more = True

    def _pump(self, now_s: float) -> None:
        """Publish new rows at once and all that stay unacknowledged again, ever more rarely while nobody answers."""
        if now_s >= self._resend_due_s:
            self._resend_s = min(2 * self._resend_s, RESEND_MOST_S)
            self._resend_due_s = now_s + self._resend_s
            self._sent_up_to, self._more = (0, 0), True
        if not self._more:
            return
        rows = self._journal.reports(BATCH_REPORTS, self._sent_up_to)
        for place, row in rows:
            topics, node = self._identity.topics, self._identity.node
            topic = topics.event(node) if row.kind == "event" else topics.telemetry(node)
            payload = json.dumps({**row.body, "first": row.first}, separators=(",", ":")).encode()
            if not self._publish(topic, payload):
                return
            self._sent_up_to = place
        self._more = len(rows) == BATCH_REPORTS

    def _publish(self, topic: str, payload: bytes, *, retain: bool = False) -> bool:
        if self._link is None:
            return False
        try:
            self._link.publish(topic, payload, qos=1, retain=retain)
        except TransferError:
            return False  # too much waits already; what matters is kept in the journal and offered again
        return True


def _model_report(row: Deployment | None, served: ServingModel | None, progress: Progress | None) -> ModelReport | None:
    serving = served.decoded if served else None
    serving_version = served.version if served else None
    if row is None:
        if served is None:
            return None
        return ModelReport(
            model=served.model, release=served.release, version=served.version, state=State.COMMITTED,
            serving=serving, serving_version=serving_version,
        )  # fmt: skip
    ended = is_end(row.state)
    fetching = progress if progress is not None and progress.model == row.model else None
    return ModelReport(
        model=row.model,
        release=row.release,
        version=row.version,
        state=row.state,
        reason=row.reason if ended else None,
        detail=row.detail if ended else (fetching.note or None if fetching else None),
        variant=row.variant,
        artifact=row.artifact,
        delta=row.base is not None if row.artifact else None,
        frames_verified=fetching.frames_verified if fetching else None,
        frames_total=fetching.frames_total if fetching else None,
        serving=serving,
        serving_version=serving_version,
    )
