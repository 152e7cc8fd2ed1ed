"""A rollout: one release to named nodes, one wave, one gate. Pure; the controller carries out what it decides.

A node has ended when it reports an end of this release under the generation that ordered it, or a later one. When more
than `max_failures` nodes failed, the rollout stops: nodes that have not ended are ordered back to what they ran.
Invariant: an end is final; no report moves a node or a rollout out of it.
"""

from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Annotated

from pydantic import Field

from wire.digest import Digest
from wire.documents import Command
from wire.errors import Code
from wire.manifest import Name
from wire.messages import Event, ModelReport, Reported, State

FAILED_STATES = frozenset({State.FAILED, State.ROLLED_BACK, State.CANCELLED})
REASONS_TOLD = 5
REASON_LIMIT = 2000


class RolloutState(StrEnum):
    """Where a rollout is."""

    RUNNING = "running"
    SUCCEEDED = "succeeded"
    STOPPED = "stopped"
    ABORTED = "aborted"


class NodeOutcome(StrEnum):
    """Where one node of a rollout is."""

    TOLD = "told"
    COMMITTED = "committed"
    FAILED = "failed"
    EXPIRED = "expired"
    """Reported no end within the deadline: counted as a failure, and it may still be at work."""
    ORDERED_BACK = "ordered_back"


class NodeProgress(Command):
    """One node of a rollout."""

    node: Name
    generation: Annotated[int, Field(ge=1)]
    """Of the order that named the release."""
    previous: Digest | None
    """The release of this model that the node was ordered to run before."""
    stale: bool = False
    """Its last report, when it was told, was of a failure of this very release: wait until it begins anew."""
    outcome: NodeOutcome = NodeOutcome.TOLD
    state: str = ""
    """Last state that the node reported for the release."""
    reason: str | None = None


class Rollout(Command):
    """The whole state of a rollout, as it is stored."""

    release: Digest
    model: Name
    version: str
    max_failures: Annotated[int, Field(ge=0)]
    deadline_s: Annotated[float, Field(gt=0)]
    started_s: float
    state: RolloutState = RolloutState.RUNNING
    reason: str | None = None
    nodes: Annotated[tuple[NodeProgress, ...], Field(min_length=1, max_length=100_000)]

    def unfinished(self) -> list[NodeProgress]:
        """Nodes that were told, have not ended, and still have time."""
        return [node for node in self.nodes if node.outcome is NodeOutcome.TOLD]

    def failed(self) -> list[NodeProgress]:
        """Nodes that count against `max_failures`."""
        return [node for node in self.nodes if node.outcome in (NodeOutcome.FAILED, NodeOutcome.EXPIRED)]

    def to_order_back(self) -> list[NodeProgress]:
        """Nodes that may still be at work on the release when the rollout ends early."""
        return [node for node in self.nodes if node.outcome in (NodeOutcome.TOLD, NodeOutcome.EXPIRED)]


def has_failed(release: str, model: str, reported: Reported | None) -> bool:
    """True when the last thing that a node says of `model` is that `release` failed."""
    report = _report_of(model, reported) if reported else None
    return report is not None and report.release == release and report.state in FAILED_STATES


def observe(rollout: Rollout, reported: Mapping[str, Reported]) -> Rollout:
    """The rollout after reports by node name; the same object when they change nothing."""
    if rollout.state is not RolloutState.RUNNING:
        return rollout
    nodes = tuple(
        _progress(node, rollout, reported[node.node]) if node.node in reported else node for node in rollout.nodes
    )
    return judge(rollout.model_copy(update={"nodes": nodes})) if nodes != rollout.nodes else rollout


def observe_events(rollout: Rollout, events: Iterable[Event]) -> Rollout:
    """The rollout after lifecycle events: a node that admits the release begins anew, whatever it said before."""
    begun = {event.node for event in events if event.release == rollout.release and event.after is State.ADMITTED}
    if not begun or rollout.state is not RolloutState.RUNNING:
        return rollout
    nodes = tuple(
        node.model_copy(update={"stale": False}) if node.stale and node.node in begun else node
        for node in rollout.nodes
    )
    return rollout.model_copy(update={"nodes": nodes}) if nodes != rollout.nodes else rollout


def expire(rollout: Rollout, now_s: float) -> Rollout:
    """Count nodes that have not ended by the deadline as failed: a dead node cannot report its own end."""
    if rollout.state is not RolloutState.RUNNING or now_s - rollout.started_s < rollout.deadline_s:
        return rollout
    late = f"{Code.DEADLINE_PASSED}: no end reported within {rollout.deadline_s:g} s"
    nodes = tuple(
        node.model_copy(update={"outcome": NodeOutcome.EXPIRED, "reason": late})
        if node.outcome is NodeOutcome.TOLD
        else node
        for node in rollout.nodes
    )
    return judge(rollout.model_copy(update={"nodes": nodes}))


def judge(rollout: Rollout) -> Rollout:
    """The gate: stop at one failure too many, succeed when every node has ended."""
    failed = rollout.failed()
    told = "; ".join(f"{node.node}: {node.reason}" for node in failed[:REASONS_TOLD])
    if len(failed) > rollout.max_failures:
        reason = f"{len(failed)} of {len(rollout.nodes)} nodes failed, {rollout.max_failures} allowed: {told}"
        return rollout.model_copy(update={"state": RolloutState.STOPPED, "reason": reason[:REASON_LIMIT]})
    if not rollout.unfinished():
        reason = f"{len(failed)} of {len(rollout.nodes)} nodes failed, as allowed: {told}"[:REASON_LIMIT]
        return rollout.model_copy(update={"state": RolloutState.SUCCEEDED, "reason": reason if failed else None})
    return rollout


def abort(rollout: Rollout, reason: str) -> Rollout:
    """End it by hand."""
    return rollout.model_copy(update={"state": RolloutState.ABORTED, "reason": reason[:REASON_LIMIT]})


def ordered_back(rollout: Rollout) -> Rollout:
    """After an early end, once the nodes that had not ended were ordered back; what expired stays told as such."""
    nodes = tuple(
        node.model_copy(update={"outcome": NodeOutcome.ORDERED_BACK}) if node.outcome is NodeOutcome.TOLD else node
        for node in rollout.nodes
    )
    return rollout.model_copy(update={"nodes": nodes})


def _progress(node: NodeProgress, rollout: Rollout, reported: Reported) -> NodeProgress:
    if node.outcome is not NodeOutcome.TOLD or reported.generation < node.generation:
        return node
    report = _report_of(rollout.model, reported)
    if report is None or report.release != rollout.release:
        return node
    if node.stale and report.state in FAILED_STATES:
        return node
    return node.model_copy(update=_outcome(report))


def _report_of(model: str, reported: Reported) -> ModelReport | None:
    return next((entry for entry in reported.models if entry.model == model), None)


def _outcome(report: ModelReport) -> dict[str, object]:
    if report.state is State.COMMITTED:
        return {"state": report.state.value, "outcome": NodeOutcome.COMMITTED, "stale": False}
    if report.state in FAILED_STATES:
        reason = f"{report.reason or report.state}: {report.detail or 'no detail'}"
        return {"state": report.state.value, "outcome": NodeOutcome.FAILED, "reason": reason[:500]}
    return {"state": report.state.value, "stale": False}
