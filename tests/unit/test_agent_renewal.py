"""Options and packed weights that no longer hold are proved again, and what serves is never worse off for it."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from agent_simulators import MODEL, Node, Publisher

from agent.renewal import AGAIN_S
from agent.telemetry import Stale
from wire.messages import State
from wire.serving import ExecutionOptions, ModelStats, ProbeVerdict, ServingModel

COMPLAINT = "options were chosen for x with onnxruntime 1, this is y with 2"


@pytest.fixture
def node(tmp_path: Path) -> Node:
    """A node on which one release serves."""
    node = Node(tmp_path, Publisher())
    node.start()
    made = node.publisher.make("1.0")
    node.broker.offer(made)
    node.order(1, made)
    node.run_until(lambda: node.journal.deployments() and node.row.state is State.COMMITTED)
    node.turn()
    node.runtime.probes.clear()
    node.runtime.loads.clear()
    return node


def served(node: Node) -> ServingModel:
    entry = node.store.served(MODEL)
    assert entry is not None
    return entry


def complain(node: Node, decoded: str | None = None, text: str = COMPLAINT) -> None:
    row = ModelStats(
        model=MODEL, version="1.0", decoded=decoded or served(node).decoded, stale=text, requests=0, failures=0,
        prompt_tokens=0, completion_tokens=0, busy_s=0.0, active=0,
    )  # fmt: skip
    node.mailbox.control.put(Stale((row,)))
    node.turn()


def settle(node: Node, turns: int = 20) -> None:
    """Give a call that must not happen the time to happen."""
    for _ in range(turns):
        node.turn()


def test_stale_options_are_proved_again_and_loaded(node: Node) -> None:
    before = served(node)
    node.runtime.options = ExecutionOptions(threads=7)
    complain(node)
    node.run_until(lambda: node.runtime.loads)
    after = served(node)
    assert node.runtime.probes[0].candidate == before.decoded
    assert node.runtime.probes[0].incumbent is None
    assert after.options.threads == 7
    assert (after.decoded, after.release, after.version) == (before.decoded, before.release, before.version)
    assert node.row.state is State.COMMITTED


def test_same_complaint_is_not_acted_on_again_and_again(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    complain(node)
    node.run_until(lambda: node.runtime.loads)
    settle(node)
    complain(node)
    settle(node)
    assert len(node.runtime.probes) == 1
    complain(node, text="the prepack cache cannot be used")
    node.run_until(lambda: len(node.runtime.loads) == 2)
    settle(node)
    real = node.clock.monotonic_s
    monkeypatch.setattr(node.clock, "monotonic_s", lambda: real() + AGAIN_S)
    complain(node)
    node.run_until(lambda: len(node.runtime.loads) == 3)


def test_what_serves_is_kept_when_the_probe_refuses_it(node: Node) -> None:
    before = node.store.serving_path.read_bytes()
    node.runtime.verdicts[served(node).decoded] = ProbeVerdict.GOLDEN_MISMATCH
    complain(node)
    node.run_until(lambda: node.runtime.probes)
    settle(node)
    assert node.store.serving_path.read_bytes() == before
    assert node.runtime.loads == []


def test_what_serves_is_kept_when_the_runtime_refuses_the_new_options(node: Node) -> None:
    before = served(node)
    node.runtime.options = ExecutionOptions(threads=7)
    node.runtime.refuses.add(before.decoded)
    complain(node)
    node.run_until(lambda: node.runtime.loads)
    settle(node)
    assert served(node) == before


def test_runtime_that_is_away_is_asked_again(node: Node) -> None:
    node.runtime.reachable = False
    complain(node)
    settle(node)
    assert node.runtime.loads == []
    node.runtime.reachable = True
    complain(node)
    node.run_until(lambda: node.runtime.loads)
    assert len(node.runtime.loads) == 1


def test_version_that_does_not_serve_any_more_is_left_alone(node: Node) -> None:
    complain(node, decoded="f" * 64)
    settle(node)
    assert node.runtime.probes == []


def test_release_that_came_meanwhile_is_not_written_over(node: Node) -> None:
    old = served(node)
    made = node.publisher.make("2.0")
    node.broker.offer(made)
    node.runtime.hold.clear()
    complain(node)
    node.run_until(lambda: node.runtime.probes)
    node.order(2, made)
    node.run_until(lambda: node.row.release == made.digest)
    node.runtime.hold.set()
    node.run_until(lambda: node.row.release == made.digest and node.row.state is State.COMMITTED)
    assert served(node).decoded == made.decoded != old.decoded
    assert old.decoded not in node.runtime.loads
