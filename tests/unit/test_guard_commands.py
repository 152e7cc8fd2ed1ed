"""A command is acknowledged to the broker only when the journal has it: otherwise it would be lost with the process."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from agent_simulators import NODE, TOPICS, Node, Publisher

from wire.errors import Code, StoreError


def test_order_that_the_journal_could_not_take_is_not_acknowledged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = Node(tmp_path, Publisher())
    node.start()

    def full(generation: int, payload: bytes) -> None:
        raise StoreError(Code.NO_SPACE, "no room")

    monkeypatch.setattr(node.journal, "accept_desired", full)
    node.order(1, node.publisher.make("1.0"))
    with pytest.raises(StoreError):
        node.run_until(lambda: node.control.acked)
    assert node.control.acked == []


def test_order_that_is_journalled_or_refused_is_acknowledged(tmp_path: Path) -> None:
    node = Node(tmp_path, Publisher())
    node.start()
    node.order(1, None)
    node.run_until(lambda: node.control.acked)
    assert node.journal.desired()[0] == 1
    node.broker.put(TOPICS.desired(NODE), b"rubbish")
    node.run_until(lambda: len(node.control.acked) == 2)
    assert node.journal.desired()[0] == 1
