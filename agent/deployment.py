"""Executes the lifecycle of one release: journal the intent, act, journal the outcome, report.

Runs on the engine's thread. Invariant: a state's work begins only after its row (and the event that tells of it) is
durable, and is idempotent, so that a kill at any instruction resumes by agent/lifecycle.py RESUME. What a state does is
in agent/stages.py; here is what all states share: transitions, deadlines, attempts, retries, cancellation, roll-back.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import structlog

from agent.decoding import Decoder
from agent.journal import Deployment, Journal
from agent.lifecycle import BOUNDS, RESUME, Outcome, Resume, is_end, serves_candidate, step
from agent.machine import Machine
from agent.mailbox import Mailbox, WorkDone, Workshop
from agent.pacer import Pacer
from agent.reporting import TEXT_LIMIT, Progress, Reporter
from agent.runtime_client import Runtime
from agent.settings import AgentSettings
from agent.store import Store
from agent.transfer import Link, Links
from agent.trust import Trust
from agent.unpack import Unpack
from host.clock import Clock
from host.pacing import Backoff
from wire.errors import AmperageError, Code, DeployError, Retry, StoreError
from wire.messages import State
from wire.serving import ServingModel
from wire.topics import Topics

if TYPE_CHECKING:
    from agent.stage import Stage

log = structlog.get_logger()

RETRY_FIRST_S = 0.5
RETRY_MOST_S = 15.0
UNDO_DEADLINE_S = 60.0
_CANCELLING = frozenset({Code.SUPERSEDED.value, Code.CANCELLED.value})

Data = Mapping[str, float | int | str | bool]


@dataclass(frozen=True, slots=True)
class Ports:
    """Everything that a deployment touches; tests pass simulators."""

    settings: AgentSettings
    topics: Topics
    journal: Journal
    store: Store
    trust: Trust
    runtime: Runtime
    decoder: Decoder
    links: Links
    control: Link
    clock: Clock
    machine: Machine
    mailbox: Mailbox
    pacer: Pacer
    workshop: Workshop
    reporter: Reporter


class Runner:
    """One release on its way to an end."""

    def __init__(self, ports: Ports, row: Deployment) -> None:
        self.ports = ports
        self.row = row
        self.expected_tokens_per_s: float | None = None
        self.repairs = 0
        self.unpack: Unpack | None = None
        """The decoding that the fetch began and hands over."""
        self._stage: Stage | None = None
        self._token = 0
        self._deadline_s = 0.0
        self._retry_at_s: float | None = None
        self._trouble: AmperageError | None = None
        self._backoff = Backoff(RETRY_FIRST_S, RETRY_MOST_S)

    @classmethod
    def begin(cls, ports: Ports, model: str, release: str, generation: int) -> "Runner":
        """Admit a release that was ordered."""
        row = Deployment(model, release, generation, attempts=1, entered_s=ports.clock.wall_s())
        with ports.journal.transaction():
            row = ports.journal.save_deployment(row)
            ports.reporter.add_event(None, row)
        log.info("release_admitted", model=model, release=release)
        runner = cls(ports, row)
        runner._enter()
        return runner

    @classmethod
    def resume(cls, ports: Ports, row: Deployment) -> "Runner":
        """Take up a release that an earlier agent left unfinished; the attempt counts."""
        runner = cls(ports, row)
        if RESUME[row.state] is Resume.KEEP:
            return runner
        runner.save(attempts=row.attempts + 1)
        log.info("release_resumed", model=row.model, release=row.release, state=row.state, attempt=row.attempts + 1)
        if row.attempts + 1 > BOUNDS[row.state].attempts and row.reason is None:
            message = (
                f"{row.attempts} attempts in state {row.state} ended without an outcome; look into the agent's log"
            )
            runner.fail(DeployError(Code.ATTEMPTS_EXHAUSTED, message))
        else:
            runner._enter()
        return runner

    @property
    def over(self) -> bool:
        """True at an end."""
        return is_end(self.row.state)

    @property
    def progress(self) -> Progress | None:
        """Of the fetch, while there is one."""
        return self._stage.progress() if self._stage else None

    # for stages

    def advance(self, outcome: Outcome, *, data: Data | None = None, **changes: Any) -> None:
        """Take the transition: row and event in one transaction, then the next state's work."""
        before = self.row.state
        after = step(before, outcome)
        row = replace(self.row, **{"attempts": 1, **changes}, state=after, entered_s=self.ports.clock.wall_s())
        self._leave()
        with self.ports.journal.transaction():
            self.ports.journal.save_deployment(row)
            self.ports.reporter.add_event(before, row, dict(data or {}))
            if after is State.COMMITTED and outcome is Outcome.SOAKED:
                previous = self.served_before()
                self.ports.journal.set_previous(row.model, previous.decoded if previous else None)
        self.row = row
        log.info(
            "release_advanced", model=row.model, version=row.version, before=before, after=after, reason=row.reason,
            detail=row.detail, **(data or {}),
        )  # fmt: skip
        self._enter()

    def save(self, **changes: Any) -> None:
        """Journal a change that is no transition."""
        row = replace(self.row, **changes)
        self.ports.journal.save_deployment(row)
        self.row = row

    def postpone(self, seconds: float) -> None:
        """Time in which the state may not work does not count against its deadline."""
        self._deadline_s += seconds

    def work(self, name: str, call: Callable[[], object]) -> None:
        """Run a blocking call; its end reaches the stage of now, or nobody."""
        self._token = self.ports.workshop.start(name, call)

    def served_before(self) -> ServingModel | None:
        """What served when activation was ordered."""
        return ServingModel.model_validate_json(self.row.serving_before) if self.row.serving_before else None

    def fail(self, error: AmperageError) -> None:
        """End as failed; when the candidate may serve already, put the old version back first."""
        detail = error.message[:TEXT_LIMIT]
        if serves_candidate(self.row.state):
            self._leave()
            self.save(reason=error.code.value, detail=detail, attempts=1)
            log.warning("release_rolling_back", model=self.row.model, reason=error.code.value, detail=detail)
            self._enter()
        else:
            self.advance(Outcome.FAILED, reason=error.code.value, detail=detail)

    def finish_undo(self) -> None:
        """The old version is back."""
        self.advance(Outcome.CANCELLED if self.row.reason in _CANCELLING else Outcome.FAILED)

    # for the engine

    def cancel(self, code: Code, detail: str) -> None:
        """The order changed; downloads stop at once, what serves already is put back."""
        if self.over or self.row.reason is not None:
            return
        if serves_candidate(self.row.state):
            self.fail(DeployError(code, detail))
        else:
            self.advance(Outcome.CANCELLED, reason=code.value, detail=detail)

    def suspend(self) -> None:
        """The agent ends: let go of links and files, change nothing; the journal resumes."""
        self._leave()

    def take_result(self, done: WorkDone) -> bool:
        """Hand a finished call to the stage; False when it is not ours (any more)."""
        if done.token != self._token or self._stage is None:
            return False
        self._token = 0
        stage, error = self._stage, done.error
        if error is None:
            self._guarded(lambda: stage.on_result(done.result))
        elif not stage.on_error(error):
            self._meet(error)
        return True

    def take_document(self, digest: str, payload: bytes) -> None:
        """A retained document arrived."""
        if self._stage is not None:
            stage = self._stage
            self._guarded(lambda: stage.on_document(digest, payload))

    def take_frame(self, message: object) -> None:
        """Something arrived on the bulk connection's port."""
        if self._stage is not None:
            stage = self._stage
            self._guarded(lambda: stage.on_frame(message))

    def tick(self) -> None:
        """Deadlines, retries and the stage's own timers."""
        if self._stage is None:
            return
        stage, now_s = self._stage, self.ports.clock.monotonic_s()
        if now_s >= self._deadline_s:
            self._guarded(lambda: stage.overdue(self._trouble))
        elif self._retry_at_s is None:
            self._guarded(stage.tick)
        elif now_s >= self._retry_at_s:
            self._retry_at_s = None
            self._guarded(stage.start)

    def _enter(self) -> None:
        from agent.stages import new_stage  # stages name the Runner, the Runner makes stages

        if self.over:
            self._clean_up()
            return
        undoing = self.row.reason is not None
        limit_s = UNDO_DEADLINE_S if undoing else self.ports.settings.deadline_s(self.row.state)
        self._deadline_s = self.ports.clock.monotonic_s() + limit_s
        self._trouble = None
        self._backoff.reset()
        self._stage = new_stage(self, undoing=undoing)
        self._guarded(self._stage.start)

    def _leave(self) -> None:
        stage, self._stage = self._stage, None
        self._token, self._retry_at_s = 0, None
        if stage is not None:
            stage.close()

    def _guarded(self, call: Callable[[], None]) -> None:
        try:
            call()
        except AmperageError as error:
            self._meet(error)

    def _meet(self, error: AmperageError) -> None:
        """Try again later what may succeed later, until the state's deadline; everything else ends the release.

        A roll-back is never given up.
        """
        if error.retry is Retry.LATER or self.row.reason is not None:
            self._trouble = error
            self._retry_at_s = self.ports.clock.monotonic_s() + self._backoff.next_s()
            log.info("release_waits", model=self.row.model, state=self.row.state, code=error.code, detail=error.message)
        else:
            self.fail(error)

    def _clean_up(self) -> None:
        """After an end: staging goes (journal row first), and versions that nothing refers to."""
        ports = self.ports
        try:
            if self.row.artifact:
                self.forget_staging(self.row.artifact)
            removed = ports.store.prune(ports.journal.previous())
        except StoreError as error:
            log.warning("clean_up_failed", code=error.code, detail=error.message)
        else:
            log.info("release_ended", model=self.row.model, version=self.row.version, state=self.row.state,
                     reason=self.row.reason, pruned=len(removed))  # fmt: skip

    def forget_staging(self, artifact: str) -> None:
        """Remove what was fetched; the row goes first, so that no bitmap stands for bytes that are gone."""
        self.ports.journal.forget_fetch(artifact)
        self.ports.store.drop_staging(artifact)
