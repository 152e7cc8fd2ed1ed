"""The agent's engine: one thread that takes every message, runs every lifecycle and writes every byte of state.

Invariant: nobody else writes journal or store. A command is acknowledged to the broker only after the journal has it,
so a crash makes the broker deliver it again. Errors of our tree end a release or become a rejection; anything else is a
defect, ends the process, and the journal resumes.
"""

import structlog

from agent.deployment import Ports, Runner
from agent.lifecycle import is_end
from agent.mailbox import Crashed, WorkDone
from agent.orders import Accepted, judge_desired, needs_work
from agent.renewal import Renewal
from agent.telemetry import Stale, Window
from host import notify
from host.link import LinkDown, LinkUp, Received
from wire.errors import AmperageError, Code, StoreError
from wire.messages import DesiredModel, State

log = structlog.get_logger()

BUSY_TURN_S = 0.1
IDLE_TURN_S = 0.5
DOCUMENT_MARK = "/doc/"
_NEEDS_STAGING = frozenset({State.FETCHING, State.DECODING})


class Stop:
    """Put into the control port to end the engine."""


class Engine:
    """Owns the mailbox, the running deployment and the order of things."""

    def __init__(self, ports: Ports) -> None:
        self._ports = ports
        self._runner: Runner | None = None
        self._renewal = Renewal(ports)
        self._accepted = Accepted(0, None)
        self._session = 0
        self._stopping = False
        self._order_changed = True

    def run(self) -> None:
        """Resume, then serve the mailbox until a Stop; letting go of everything at the end."""
        self.start()
        try:
            while not self._stopping:
                self.turn()
        finally:
            self.finish()

    def start(self) -> None:
        """Make the store whole, resume what was unfinished, connect."""
        ports = self._ports
        rows = ports.journal.deployments()
        staged = frozenset(row.artifact for row in rows if row.state in _NEEDS_STAGING and row.artifact)
        for artifact in set(ports.journal.fetches()) - staged:
            ports.journal.forget_fetch(artifact)
        adopted = ports.store.adopt(staged)
        log.info("store_adopted", versions=len(adopted.versions), removed=list(adopted.removed))
        self._accepted = Accepted(*ports.journal.desired())
        ports.reporter.attach(ports.control)
        for topic in (ports.topics.desired(ports.settings.node), ports.topics.ack(ports.settings.node)):
            ports.control.subscribe(topic, qos=1)
        unfinished = next((row for row in rows if not is_end(row.state)), None)
        if unfinished is not None:
            self._runner = Runner.resume(ports, unfinished)
        self._reconcile()
        ports.control.start()
        notify.notify_ready("waiting for orders")

    def turn(self) -> None:
        """Wait for something, take all commands and some frames, then let timers act."""
        ports = self._ports
        ports.mailbox.wait(BUSY_TURN_S if self._runner else IDLE_TURN_S)
        for message in ports.mailbox.take_control():
            self._take(message)
        for frame in ports.mailbox.take_frames():
            if self._runner is not None:
                self._runner.take_frame(frame)
        if self._runner is not None:
            self._runner.tick()
        self._reconcile()
        ports.reporter.tick(self._runner.progress if self._runner else None)
        notify.notify_watchdog()

    def finish(self) -> None:
        """An orderly end: suspend, say offline, disconnect."""
        notify.notify_stopping()
        if self._runner is not None:
            self._runner.suspend()
        self._ports.reporter.say_offline(self._session)
        self._ports.control.stop()

    def _take(self, message: object) -> None:
        match message:
            case Received():
                self._receive(message)
            case WorkDone():
                self._work_done(message)
            case LinkUp():
                self._session = message.session
                log.info("link_up", client=message.client_id, session=message.session)
                self._ports.reporter.link_up(message.session)
            case LinkDown():
                log.warning("link_down", client=message.client_id, reason=message.reason)
            case Window():
                self._ports.reporter.add_telemetry(message.telemetry(self._ports.settings.node, self._ports.clock))
            case Stale():
                if self._runner is None:
                    self._renewal.consider(message.rows)
            case Crashed():
                raise message.error
            case Stop():
                self._stopping = True
            case _:
                raise TypeError(f"no message of the engine: {message!r}")

    def _work_done(self, message: WorkDone) -> None:
        if self._runner is not None and self._runner.take_result(message):
            return
        if self._renewal.take_result(message, may_write=self._runner is None):
            return
        if message.error is not None:
            log.info("work_ended_unwanted", code=message.error.code, detail=message.error.message)

    def _receive(self, message: Received) -> None:
        topics, node = self._ports.topics, self._ports.settings.node
        try:
            if message.topic == topics.desired(node):
                self._order(message.payload)
            elif message.topic == topics.ack(node):
                self._ports.reporter.acknowledge(message.payload)
            elif message.topic.startswith(topics.document("")):
                self._document(message)
        except StoreError:
            raise
        except AmperageError as error:
            self._ports.reporter.reject(message.topic, error)
        message.ack()

    def _document(self, message: Received) -> None:
        if self._runner is not None and message.payload:
            digest = message.topic.removeprefix(self._ports.topics.document(""))
            self._runner.take_document(digest, message.payload)

    def _order(self, envelope: bytes) -> None:
        if not envelope:
            return  # a cleared retained message orders nothing
        self._ports.reporter.expect_reader()
        payload = judge_desired(envelope, self._ports.trust, self._ports.settings.node, self._accepted)
        if payload is None:
            return
        accepted = Accepted(0, payload)
        generation = accepted.desired.generation if accepted.desired else 0
        self._ports.journal.accept_desired(generation, payload)
        self._accepted = Accepted(generation, payload)
        self._order_changed = True
        self._ports.reporter.changed()
        log.info("desired_accepted", generation=generation)

    def _reconcile(self) -> None:
        """Cancel what is no longer wanted, start what is; one release at a time."""
        if self._runner is not None and self._runner.over:
            self._runner, self._order_changed = None, True
        if not self._order_changed:
            return
        self._order_changed = False
        desired = self._accepted.desired
        if desired is None:
            return
        wanted = {entry.model: entry for entry in desired.models}
        if self._runner is not None:
            self._cancel_unwanted(self._runner, wanted)
            return
        rows = {row.model: row for row in self._ports.journal.deployments()}
        served = {entry.model: entry for entry in self._ports.store.serving().models}
        for model in sorted((rows.keys() | served.keys()) - wanted.keys()):
            self._unload(model)
        unfinished = next((row for row in rows.values() if row.model in wanted and not is_end(row.state)), None)
        if unfinished is not None:
            self._runner = Runner.resume(self._ports, unfinished)
            return
        for entry in desired.models:
            if needs_work(entry, desired.generation, rows.get(entry.model), served.get(entry.model)):
                self._runner = Runner.begin(self._ports, entry.model, entry.release, desired.generation)
                return

    def _cancel_unwanted(self, runner: Runner, wanted: dict[str, DesiredModel]) -> None:
        entry = wanted.get(runner.row.model)
        if entry is None:
            runner.cancel(Code.CANCELLED, "the model is no longer wanted on this node")
        elif entry.release != runner.row.release:
            runner.cancel(Code.SUPERSEDED, f"generation {self._accepted.generation} wants another release")

    def _unload(self, model: str) -> None:
        """The file first: should the nudge be lost, the runtime forgets the model at its next start."""
        self._ports.store.serve(model, None)
        self._ports.journal.forget_model(model)
        self._ports.store.prune(self._ports.journal.previous())
        self._ports.workshop.start("unload", lambda: self._ports.runtime.unload(model))
        self._ports.reporter.changed()
        log.info("model_unloaded", model=model)
