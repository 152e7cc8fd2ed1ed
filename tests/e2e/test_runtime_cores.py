"""A real runtime with two groups of one core: its threads stay there, and both work."""

import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from runtime_fixtures import MODEL, Node, base_version, running

CORES = sorted(os.sched_getaffinity(0))[:2]
SAY: Any = [{"role": "user", "content": "It was late in the evening when the"}]

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(len(CORES) < 2, reason="two groups need two cores"),
]


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    groups = f'core_groups = ["{CORES[0]}", "{CORES[1]}"]'
    with running(tmp_path, base_version(), extra=groups) as node:
        yield node


def ticks_by_core(node: Node) -> dict[int, int]:
    """Processor time of the threads that may run on one core alone, by that core."""
    assert node.process is not None
    found: dict[int, int] = {}
    for task in Path(f"/proc/{node.process.pid}/task").iterdir():
        cores = next(
            line.split()[1]
            for line in (task / "status").read_text().splitlines()
            if line.startswith("Cpus_allowed_list:")
        )
        if cores.isdigit():
            times = (task / "stat").read_text().rpartition(")")[2].split()
            found[int(cores)] = found.get(int(cores), 0) + int(times[11]) + int(times[12])
    return found


def answer(node: Node, number: int) -> str | None:
    with node.client() as client:
        reply = client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": f"{number}. {SAY[0]['content']}"}], max_tokens=200,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        return reply.choices[0].finish_reason


def test_replicas_stay_on_their_cores_and_share_the_work(node: Node) -> None:
    before = ticks_by_core(node)
    assert set(before) == set(CORES)
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(lambda number: answer(node, number), range(4))) == {"length"}
    after = ticks_by_core(node)
    for core in CORES:
        assert after[core] - before[core] > 2, f"core {core} did nothing"


def test_groups_that_cannot_be_made_end_the_process_with_the_remedy(tmp_path: Path) -> None:
    node = Node(tmp_path, f'core_groups = ["{CORES[0]}", "{CORES[0]}-{CORES[1]}"]')
    with pytest.raises(AssertionError, match="shares cores with another group"):
        node.start()
    assert node.process is not None
    assert node.process.wait(10) == 78
