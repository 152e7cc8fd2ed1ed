"""The controller: takes reports, drives rollouts, publishes desired state and documents.

Owns one connection and one thread, the only writer of rollouts' progress. Invariants: a report is acknowledged after
the transaction that holds it; an order is in the database, together with the rollout that gave it, before it is
published; everything retained is published again whenever the link comes up. A crash leaves what the database holds.
"""

import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import structlog

from fleet import rollout as rules
from fleet.database import Database, DesiredRow
from fleet.ingest import KINDS, REPORT_LIMIT_BYTES, Batch, Ingest
from fleet.inquiry import ASK_EVERY_S, Inquiry
from fleet.orders import Orders
from fleet.outbox import Outbox
from fleet.releases import Releases, Stores
from fleet.rollout import NodeOutcome, NodeProgress, Rollout, RolloutState
from host.keys import Signer
from host.link import Broker, LinkUp, Received
from host.mqtt import Connection
from wire.documents import encode_document, parse_document
from wire.errors import ArtifactError, Code, ConfigError, DeployError
from wire.messages import Ack, Reported
from wire.release import Release
from wire.signing import TrustPolicy
from wire.topics import Topics

log = structlog.get_logger()

INBOX_MESSAGES = 10_000
BATCH_MESSAGES = 256
"""Reports per transaction: one fsync for all of them."""
TICK_S = 0.25
PUMP_S = 0.02
FORGET_EVERY_S = 600.0


@dataclass(frozen=True, slots=True)
class Policy:
    """Who signs, who is believed, and the operator's choices."""

    signer: Signer
    trust: TrustPolicy
    rollout_deadline_s: float
    keep_reports_s: float


class Controller:
    """Everything but the depot and the API; `on_death` is called when its thread ends by a fault."""

    def __init__(
        self,
        broker: Broker,
        topics: Topics,
        stores: Stores,
        policy: Policy,
        on_death: Callable[[], None] = lambda: None,
    ) -> None:
        database = stores.database
        self.ingest = Ingest(topics, database)
        self._topics = topics
        self._database = database
        self._orders = Orders(database, policy.signer)
        self._policy = policy
        self._on_death = on_death
        self._inbox: queue.Queue[Any] = queue.Queue(INBOX_MESSAGES)
        self._link = Connection(broker, f"fleet:controller:{policy.signer.public.keyid[:8]}", self._inbox)
        for kind in KINDS:
            self._link.subscribe(topics.every_node(kind), qos=1)
        self._outbox = Outbox(self._link)
        self._inquiry = Inquiry(self._link, topics)
        self._releases = Releases(stores, policy.trust, topics, self._outbox)
        self._lock = threading.RLock()
        self._reported = _stored_reports(database)
        self._changed: set[str] = set()
        self._running = {
            identity: Rollout.model_validate_json(body) for identity, body in database.rollouts(RolloutState.RUNNING)
        }
        self._forget_due_s = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="controller")

    def start(self) -> None:
        """Connect and work in a thread."""
        self._changed.update(self._reported)
        self._link.start()
        self._thread.start()

    def stop(self) -> None:
        """Stop working and disconnect; idempotent."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()
        self._link.stop()

    def is_up(self) -> bool:
        """True while the broker is reached."""
        return self._link.is_up()

    # for the API, from any thread

    def add_release(self, envelope: bytes) -> tuple[str, Release]:
        """See Releases.add; the documents go out at once."""
        added = self._releases.add(envelope)
        self._wake()
        return added

    def start_rollout(self, release: str, nodes: list[str], max_failures: int, deadline_s: float | None) -> int:
        """Order `nodes` to run `release`; returns the rollout's number.

        Raises ConfigError(document_missing) when the release is not here, DeployError(superseded) when a node is at
        work for another rollout of the model.
        """
        parsed = self._releases.find(release)
        with self._lock:
            self._check_free(parsed.model, nodes)
            with self._database.transaction():
                rows = self._orders.change(parsed.model, dict.fromkeys(nodes, release), self._reported)
                told = tuple(self._told(row, previous, parsed.model, release) for row, previous in rows)
                rollout = Rollout(
                    release=release, model=parsed.model, version=parsed.version, max_failures=max_failures,
                    deadline_s=deadline_s or self._policy.rollout_deadline_s, started_s=time.time(), nodes=told,
                )  # fmt: skip
                identity = self._database.add_rollout(rollout.state, rollout.model_dump_json())
            self._running[identity] = rollout
            self._changed.update(nodes)
            for row, _ in rows:
                self._send(row)
        self._wake()
        log.info("rollout_started", rollout=identity, release=release, version=parsed.version, nodes=len(nodes))
        return identity

    def abort(self, identity: int, reason: str) -> None:
        """End a rollout by hand; nodes that have not ended are ordered back. Raises ConfigError when it is over."""
        with self._lock:
            running = self._running.get(identity)
            if running is None:
                raise ConfigError(
                    f"rollout {identity} does not run; list them with `amperage fleet rollouts`", Code.DOCUMENT_MISSING
                )
            self._keep(identity, rules.abort(running, reason))
        self._wake()

    def _wake(self) -> None:
        with suppress(queue.Full):
            self._inbox.put_nowait(None)

    def _check_free(self, model: str, nodes: list[str]) -> None:
        for identity, running in self._running.items():
            busy = {node.node for node in running.unfinished()} & set(nodes) if running.model == model else set()
            if busy:
                raise DeployError(
                    Code.SUPERSEDED, f"{min(busy)} is at work for rollout {identity}; wait for its end, or abort it"
                )

    def _told(self, row: DesiredRow, previous: str | None, model: str, release: str) -> NodeProgress:
        stale = rules.has_failed(release, model, self._reported.get(row.node))
        return NodeProgress(node=row.node, generation=row.generation, previous=previous, stale=stale)

    # everything below runs on the controller's thread, or under its lock

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self._turn()
        except BaseException:
            log.exception("controller_died")
            self._on_death()
            raise

    def _turn(self) -> None:
        messages = self._collect(PUMP_S if self._outbox.pump() else TICK_S)
        if any(isinstance(message, LinkUp) for message in messages):
            self._publish_everything()
        received = [message for message in messages if isinstance(message, Received)]
        batch = Batch()
        with self._lock:
            if received:
                with self._database.transaction():
                    for message in received:
                        self.ingest.take(message, batch)
            self._learn(batch)
            self._advance_all(batch)
            self._ask_the_late()
        for message in received:
            message.ack()
        if time.monotonic() >= self._forget_due_s:
            self._forget_due_s = time.monotonic() + FORGET_EVERY_S
            self._database.forget_reports(time.time() - self._policy.keep_reports_s)

    def _collect(self, timeout_s: float) -> list[Any]:
        messages: list[Any] = []
        with suppress(queue.Empty):
            messages.append(self._inbox.get(timeout=timeout_s))
            while len(messages) < BATCH_MESSAGES:
                messages.append(self._inbox.get_nowait())
        return messages

    def _learn(self, batch: Batch) -> None:
        """What is durable now may be answered and acted on."""
        self._reported.update(batch.reported)
        self._changed.update(batch.reported)
        for node, acks in batch.acks.items():
            self._outbox.put(self._topics.ack(node), encode_document(Ack(acks=acks)))
        for node in batch.remembered:
            row = self._orders.assert_again(node, batch.reported[node])
            if row is not None:
                log.warning("desired_asserted_again", node=node, generation=row.generation)
                self._send(row)

    def _advance_all(self, batch: Batch) -> None:
        changed = {node: self._reported[node] for node in self._changed if node in self._reported}
        self._changed = {event.node for event in batch.events}  # an event may make an earlier report count
        for identity, before in list(self._running.items()):
            after = rules.observe(rules.observe_events(before, batch.events), changed)
            after = rules.expire(after, time.time())
            if after is not before:
                self._keep(identity, after)

    def _ask_the_late(self) -> None:
        """Nodes that were told a while ago and have not ended may have said so without our hearing it."""
        asked_before_s = time.time() - ASK_EVERY_S
        late = (
            node.node
            for rollout in self._running.values()
            if rollout.started_s < asked_before_s
            for node in rollout.unfinished()
        )
        self._inquiry.ask(late, time.monotonic())

    def _keep(self, identity: int, rollout: Rollout) -> None:
        """Store what became of a rollout; at an early end order back in the same transaction."""
        rows: list[DesiredRow] = []
        with self._database.transaction():
            if rollout.state in (RolloutState.STOPPED, RolloutState.ABORTED):
                back = {node.node: node.previous for node in rollout.to_order_back()}
                rows = [row for row, _ in self._orders.change(rollout.model, back, self._reported)]
                rollout = rules.ordered_back(rollout)
            if rollout.state is not RolloutState.RUNNING:
                failed = [node for node in rollout.nodes if node.outcome is NodeOutcome.FAILED]
                self._orders.forget_failed(
                    rollout.model, [(node.node, rollout.release, node.previous) for node in failed]
                )
            self._database.save_rollout(identity, rollout.state, rollout.model_dump_json())
        if rollout.state is RolloutState.RUNNING:
            self._running[identity] = rollout
            return
        self._running.pop(identity, None)
        for row in rows:
            self._send(row)
        log.info("rollout_ended", rollout=identity, state=rollout.state, reason=rollout.reason)

    def _publish_everything(self) -> None:
        """All that is retained and ours."""
        self._releases.announce_all()
        for desired in self._database.all_desired():
            self._send(desired)

    def _send(self, row: DesiredRow) -> None:
        self._outbox.put(self._topics.desired(row.node), row.envelope, retain=True)


def _stored_reports(database: Database) -> dict[str, Reported]:
    """The last report of every node: generations must not fall behind them after a restart."""
    reports = {}
    for node, body in database.reported().items():
        with suppress(ArtifactError):  # stored by a newer version: the node will report again
            reports[node] = parse_document(Reported, body.encode(), limit_bytes=REPORT_LIMIT_BYTES)
    return reports
