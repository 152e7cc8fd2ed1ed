"""A rollout: one release to named nodes, one wave, one gate. Pure; the controller carries out what it decides.

A node counts as ended when it reports an end of this release under the generation that ordered it, or later. When more
than `max_failures` nodes failed, the rollout stops: nodes that have not ended are ordered back to what they ran.
"""

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from wire.digest import Digest
from wire.documents import Command
from wire.errors import Code
from wire.manifest import Name
from wire.messages import ModelReport, Reported, State

FAILED = frozenset({State.FAILED, State.ROLLED_BACK, State.CANCELLED})


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
    ORDERED_BACK = "ordered_back"


class NodeProgress(Command):
    """One node of a rollout."""

    node: Name
    generation: Annotated[int, Field(ge=1)]
    """Of the order that named the release."""
    previous: Digest | None
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
        """Nodes that were told and have not ended."""
        return [node for node in self.nodes if node.outcome is NodeOutcome.TOLD]


def observe(rollout: Rollout, reported: Reported) -> Rollout:
    """The rollout after a node's report; the same object when the report changes nothing."""
    if rollout.state is not RolloutState.RUNNING:
        return rollout
    nodes = tuple(_progress(node, rollout, reported) for node in rollout.nodes)
    return judge(rollout.model_copy(update={"nodes": nodes})) if nodes != rollout.nodes else rollout


def expire(rollout: Rollout, now_s: float) -> Rollout:
    """Count nodes that have not ended by the deadline as failed: a dead node cannot report its own end."""
    if rollout.state is not RolloutState.RUNNING or now_s - rollout.started_s < rollout.deadline_s:
        return rollout
    late = f"{Code.DEADLINE_PASSED}: no end reported within {rollout.deadline_s:g} s"
    nodes = tuple(
        node.model_copy(update={"outcome": NodeOutcome.FAILED, "reason": late})
        if node.outcome is NodeOutcome.TOLD
        else node
        for node in rollout.nodes
    )
    return judge(rollout.model_copy(update={"nodes": nodes}))


def judge(rollout: Rollout) -> Rollout:
    """Apply the gate, then see whether all nodes ended."""
    failed = [node for node in rollout.nodes if node.outcome is NodeOutcome.FAILED]
    if len(failed) > rollout.max_failures:
        why = "; ".join(f"{node.node}: {node.reason}" for node in failed[:5])
        reason = f"{len(failed)} of {len(rollout.nodes)} nodes failed, {rollout.max_failures} allowed: {why}"
        return rollout.model_copy(update={"state": RolloutState.STOPPED, "reason": reason[:2000]})
    if not rollout.unfinished():
        return rollout.model_copy(update={"state": RolloutState.SUCCEEDED})
    return rollout


def ordered_back(rollout: Rollout) -> Rollout:
    """After a stop or an abort, once the unfinished nodes were ordered back."""
    nodes = tuple(
        node.model_copy(update={"outcome": NodeOutcome.ORDERED_BACK}) if node.outcome is NodeOutcome.TOLD else node
        for node in rollout.nodes
    )
    return rollout.model_copy(update={"nodes": nodes})


def _progress(node: NodeProgress, rollout: Rollout, reported: Reported) -> NodeProgress:
    if node.node != reported.node or node.outcome is not NodeOutcome.TOLD or reported.generation < node.generation:
        return node
    report = next((entry for entry in reported.models if entry.model == rollout.model), None)
    if report is None or report.release != rollout.release:
        return node
    return node.model_copy(update=_outcome(report))


def _outcome(report: ModelReport) -> dict[str, object]:
    if report.state is State.COMMITTED:
        return {"state": report.state.value, "outcome": NodeOutcome.COMMITTED}
    if report.state in FAILED:
        reason = f"{report.reason or report.state}: {report.detail or 'no detail'}"
        return {"state": report.state.value, "outcome": NodeOutcome.FAILED, "reason": reason[:500]}
    return {"state": report.state.value}
