"""The rollout's gate, node by node."""

import pytest
from fleet_samples import BOOT, committed, failed

from fleet.rollout import (
    NodeOutcome,
    NodeProgress,
    Rollout,
    RolloutState,
    abort,
    expire,
    has_failed,
    observe,
    observe_events,
    ordered_back,
)
from wire.messages import Event, ModelReport, Reported, State

RELEASE, OTHER = "1" * 64, "2" * 64


def make_rollout(*names: str, max_failures: int = 0, stale: bool = False) -> Rollout:
    nodes = tuple(NodeProgress(node=name, generation=5, previous=OTHER, stale=stale) for name in names)
    return Rollout(
        release=RELEASE, model="tales", version="1.0", max_failures=max_failures, deadline_s=100, started_s=1000,
        nodes=nodes,
    )  # fmt: skip


def say(name: str, report: ModelReport, generation: int = 5) -> dict[str, Reported]:
    return {name: Reported(node=name, boot_id=BOOT, generation=generation, models=(report,))}


def outcomes(rollout: Rollout) -> list[NodeOutcome]:
    return [node.outcome for node in rollout.nodes]


def admitted(name: str, release: str = RELEASE) -> Event:
    return Event(
        node=name, boot_id=BOOT, seq=1, first=1, time_s=0, model="tales", release=release, version="1.0", before=None,
        after=State.ADMITTED,
    )  # fmt: skip


def test_rollout_succeeds_when_every_node_committed() -> None:
    rollout = observe(make_rollout("a", "b"), say("a", committed(RELEASE)))
    assert rollout.state is RolloutState.RUNNING
    rollout = observe(rollout, say("b", committed(RELEASE), generation=6))
    assert rollout.state is RolloutState.SUCCEEDED
    assert rollout.reason is None


@pytest.mark.parametrize(
    "reported",
    [
        say("a", committed(RELEASE), generation=4),
        say("a", committed(OTHER)),
        say("a", committed(RELEASE).model_copy(update={"model": "other"})),
        say("stranger", committed(RELEASE)),
        {"a": Reported(node="a", boot_id=BOOT, generation=5)},
    ],
)
def test_report_that_is_not_of_this_order_changes_nothing(reported: dict[str, Reported]) -> None:
    rollout = make_rollout("a")
    assert observe(rollout, reported) is rollout


def test_progress_is_kept_without_ending_the_node() -> None:
    rollout = observe(make_rollout("a"), say("a", committed(RELEASE).model_copy(update={"state": State.PROBING})))
    assert rollout.nodes[0].state == "probing"
    assert outcomes(rollout) == [NodeOutcome.TOLD]


@pytest.mark.parametrize("state", [State.FAILED, State.ROLLED_BACK, State.CANCELLED])
def test_one_failure_too_many_stops_and_names_node_and_reason(state: State) -> None:
    report = failed(RELEASE).model_copy(update={"state": state})
    rollout = observe(make_rollout("a", "b", "c", max_failures=1), say("a", report))
    assert rollout.state is RolloutState.RUNNING
    rollout = observe(rollout, say("b", report))
    assert rollout.state is RolloutState.STOPPED
    assert rollout.reason
    assert "2 of 3 nodes failed, 1 allowed: a: golden_mismatch: 0.9 is over 0.1" in rollout.reason
    assert [node.node for node in rollout.to_order_back()] == ["c"]
    assert outcomes(ordered_back(rollout)) == [NodeOutcome.FAILED, NodeOutcome.FAILED, NodeOutcome.ORDERED_BACK]


def test_deadline_counts_silent_nodes_as_failed_and_orders_them_back() -> None:
    rollout = observe(make_rollout("a", "b"), say("a", committed(RELEASE)))
    assert expire(rollout, 1099.9) is rollout
    late = expire(rollout, 1100)
    assert late.state is RolloutState.STOPPED
    assert outcomes(late) == [NodeOutcome.COMMITTED, NodeOutcome.EXPIRED]
    assert [node.node for node in late.to_order_back()] == ["b"]
    assert "b: deadline_passed" in str(late.reason)


def test_report_after_the_end_of_a_rollout_changes_nothing() -> None:
    for ended in (observe(make_rollout("a", "b"), say("a", failed(RELEASE))), abort(make_rollout("a", "b"), "by hand")):
        assert observe(ended, say("b", committed(RELEASE))) is ended
        assert expire(ended, 5000) is ended


def test_abort_orders_back_what_has_not_ended() -> None:
    rollout = abort(observe(make_rollout("a", "b"), say("a", committed(RELEASE))), "by hand")
    assert rollout.state is RolloutState.ABORTED
    assert [node.node for node in rollout.to_order_back()] == ["b"]


def test_failure_from_before_the_order_waits_for_a_new_attempt() -> None:
    rollout = make_rollout("a", stale=True)
    assert observe(rollout, say("a", failed(RELEASE))) is rollout
    assert observe_events(rollout, [admitted("b"), admitted("a", OTHER)]) is rollout
    begun = observe_events(rollout, [admitted("a")])
    assert observe(begun, say("a", failed(RELEASE))).state is RolloutState.STOPPED
    fetching = observe(rollout, say("a", failed(RELEASE).model_copy(update={"state": State.FETCHING})))
    assert observe(fetching, say("a", failed(RELEASE))).state is RolloutState.STOPPED
    assert observe(rollout, say("a", committed(RELEASE))).state is RolloutState.SUCCEEDED


def test_last_failure_of_a_node_is_recognised() -> None:
    assert has_failed(RELEASE, "tales", say("a", failed(RELEASE))["a"])
    assert not has_failed(OTHER, "tales", say("a", failed(RELEASE))["a"])
    assert not has_failed(RELEASE, "tales", say("a", committed(RELEASE))["a"])
    assert not has_failed(RELEASE, "tales", None)


def test_stored_form_is_read_back_unchanged() -> None:
    rollout = observe(make_rollout("a", "b", max_failures=1), say("a", failed(RELEASE)))
    assert Rollout.model_validate_json(rollout.model_dump_json()) == rollout
