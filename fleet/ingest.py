"""Reports of nodes become rows: parse, check, store. Runs inside the controller's transaction and thread.

Invariant: whatever a node sends, it is stored or refused, never fatal, and touches only rows of that node. An
acknowledgement is handed out only by `acks`, which the controller publishes after its transaction is durable.
"""

from dataclasses import dataclass, field

from fleet.database import Database, ReportKey
from fleet.presence import after_status
from fleet.refusals import Refusals, check_counters, check_speaker
from host.link import Received
from wire.documents import encode_document, parse_document
from wire.errors import AmperageError, ArtifactError, Code, StoreError
from wire.messages import Event, Numbered, Reported, Status, Telemetry
from wire.topics import Topics

REPORT_LIMIT_BYTES = 256 * 1024
ACKS_PER_MESSAGE = 64
"""Of wire/messages.py Ack."""
NUMBERED: dict[str, type[Numbered]] = {"event": Event, "telemetry": Telemetry}
KINDS = ("status", "reported", *NUMBERED)


@dataclass(slots=True)
class Batch:
    """What the messages of one transaction said that others have to know."""

    reported: dict[str, Reported] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    acks: dict[str, dict[str, int]] = field(default_factory=dict)
    """By node and boot, the seq up to which all is stored."""
    remembered: set[str] = field(default_factory=set)
    """Nodes whose report was what the broker remembered, not news."""


class Ingest:
    """Files messages of nodes into the database."""

    def __init__(self, topics: Topics, database: Database) -> None:
        self.refusals = Refusals()
        self._topics = topics
        self._database = database
        self._presence = database.presences()

    def take(self, message: Received, batch: Batch) -> None:
        """File one message; what cannot be used is counted. Raises StoreError only."""
        node, kind = self._topics.node_of(message.topic) or ("", "")
        if kind not in KINDS or not message.payload:
            return  # an empty retained message clears a topic: somebody removed a node
        try:
            if kind == "status":
                self._status(node, message)
            elif kind == "reported":
                self._reported(node, message, batch)
            else:
                self._numbered(node, kind, message.payload, batch)
        except StoreError:
            raise
        except AmperageError as error:
            self.refusals.add(message.topic, error)

    def _status(self, node: str, message: Received) -> None:
        status = parse_document(Status, message.payload, limit_bytes=REPORT_LIMIT_BYTES)
        check_speaker(node, status.node)
        check_counters(status.session)
        presence = after_status(self._presence.get(node), status, retained=message.retained)
        if presence is not None:
            self._presence[node] = presence
            self._database.save_presence(node, presence)

    def _reported(self, node: str, message: Received, batch: Batch) -> None:
        reported = parse_document(Reported, message.payload, limit_bytes=REPORT_LIMIT_BYTES)
        check_speaker(node, reported.node)
        check_counters(reported.generation)
        self._database.save_reported(node, _encode(reported))
        batch.reported[node] = reported
        if message.retained:
            batch.remembered.add(node)

    def _numbered(self, node: str, kind: str, payload: bytes, batch: Batch) -> None:
        report = parse_document(NUMBERED[kind], payload, limit_bytes=REPORT_LIMIT_BYTES)
        check_speaker(node, report.node)
        check_counters(report.seq, report.first)
        key = ReportKey(node, report.boot_id, report.seq, report.first)
        acks = batch.acks.setdefault(node, {})
        reached = self._database.save_report(key, kind, _encode(report))
        if report.boot_id in acks or len(acks) < ACKS_PER_MESSAGE:
            acks[report.boot_id] = reached
        if isinstance(report, Event):
            batch.events.append(report)


def _encode(report: Reported | Numbered) -> str:
    """Canonical JSON; refuses what JSON cannot say, such as a figure that is not a number."""
    try:
        return encode_document(report).decode()
    except ValueError as error:
        raise ArtifactError(Code.BAD_DOCUMENT, f"report refused: {error}; upgrade the node's agent") from error
