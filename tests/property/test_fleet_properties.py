"""Acknowledgements and rollouts under any history."""

import tempfile
from pathlib import Path

from fleet_samples import BOOT
from hypothesis import given, settings
from hypothesis import strategies as st

from fleet.database import Database, ReportKey
from fleet.rollout import NodeOutcome, NodeProgress, Rollout, RolloutState, expire, observe
from wire.messages import ModelReport, Reported, State

RELEASES = ("1" * 64, "2" * 64)
NODES = ("a", "b", "c")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), max_size=40))
def test_acknowledged_reports_are_stored_or_declared_lost(history: list[tuple[int, int]]) -> None:
    """Each (seq, first); `first` only counts when it is honest, that is not above seq."""
    with tempfile.TemporaryDirectory() as directory:
        database = Database(Path(directory) / "f.sqlite")
        stored: set[int] = set()
        dropped = before = 0
        for seq, first in history:
            reached = database.save_report(ReportKey("n", BOOT, seq, first), "event", "{}")
            stored |= {seq} if seq > before else set()
            dropped = max(dropped, min(first, seq) - 1)
            assert reached >= before, "an acknowledgement is never taken back"
            assert all(i in stored or i <= dropped for i in range(1, reached + 1))
            assert reached + 1 not in stored, "everything contiguous is acknowledged"
            before = reached
        assert len(database.reports("event", None, None, 100)) == len(stored)
        database.close()


reports = st.builds(
    lambda name, generation, release, state: Reported(
        node=name, boot_id=BOOT, generation=generation,
        models=(ModelReport(model="tales", release=release, version="1", state=state),),
    ),
    st.sampled_from(NODES), st.integers(3, 6), st.sampled_from(RELEASES), st.sampled_from(list(State)),
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(st.lists(reports, max_size=40), st.integers(0, 3), st.booleans())
def test_ends_of_nodes_and_rollouts_are_final_and_the_reaper_ends_everything(
    history: list[Reported], max_failures: int, stale: bool
) -> None:
    rollout = Rollout(
        release=RELEASES[0], model="tales", version="1", max_failures=max_failures, deadline_s=10, started_s=0,
        nodes=tuple(NodeProgress(node=name, generation=5, previous=None, stale=stale) for name in NODES),
    )  # fmt: skip
    for reported in history:
        after = observe(rollout, {reported.node: reported})
        for old, new in zip(rollout.nodes, after.nodes, strict=True):
            assert old.outcome in (NodeOutcome.TOLD, new.outcome)
        if rollout.state is not RolloutState.RUNNING:
            assert after is rollout
        rollout = after
        assert (len(rollout.failed()) > max_failures) == (rollout.state is RolloutState.STOPPED)
    ended = expire(rollout, 10)
    assert ended.state is not RolloutState.RUNNING
    assert not ended.unfinished() or ended.state is RolloutState.STOPPED
