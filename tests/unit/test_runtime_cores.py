"""Lists of cores, what groups they make, and that threads stay in theirs."""

import os
import threading
from pathlib import Path

import pytest

from runtime.cores import confined, core_groups, parse_cores
from wire.errors import ConfigError

ALLOWED = frozenset(range(8))


@pytest.mark.parametrize(
    ("text", "cores"), [("0", {0}), ("0-3,8", {0, 1, 2, 3, 8}), (" 5 , 7\n", {5, 7}), ("", set()), ("3-1", set())]
)
def test_list_of_cores_is_the_kernels(text: str, cores: set[int]) -> None:
    assert parse_cores(text) == cores


@pytest.mark.parametrize("text", ["a", "1-", "1--2", "0x1", "1;2", "9" * 9])
def test_what_is_no_list_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="no list of cores"):
        parse_cores(text)


def test_without_a_setting_all_cores_are_one_group() -> None:
    assert core_groups((), ALLOWED) == [ALLOWED]


def test_groups_hold_only_cores_that_are_allowed() -> None:
    assert core_groups(("0-1", "7-9"), ALLOWED) == [{0, 1}, {7}]


def test_group_without_an_allowed_core_is_refused() -> None:
    with pytest.raises(ConfigError, match="none of the cores"):
        core_groups(("0-1", "8-9"), ALLOWED)


def test_core_in_two_groups_is_refused() -> None:
    with pytest.raises(ConfigError, match="shares cores"):
        core_groups(("0-3", "3-4"), ALLOWED)


def test_word_that_means_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="'numa'"):
        core_groups("sockets", ALLOWED)


def test_numa_makes_a_group_of_every_node_that_has_allowed_cores(tmp_path: Path) -> None:
    for node, text in (("node0", "0-3\n"), ("node1", "4-11\n"), ("node2", "12-15\n"), ("node3", "\n")):
        home = tmp_path / "sys/devices/system/node" / node
        home.mkdir(parents=True)
        (home / "cpulist").write_text(text)
    assert core_groups("numa", ALLOWED, tmp_path) == [{0, 1, 2, 3}, {4, 5, 6, 7}]
    assert core_groups("numa", ALLOWED, tmp_path / "nothing") == [ALLOWED]


def test_threads_made_meanwhile_stay_and_the_maker_comes_back() -> None:
    before = os.sched_getaffinity(0)
    core = frozenset([min(before)])
    seen: list[set[int]] = []
    go = threading.Event()
    with confined(core):
        thread = threading.Thread(target=lambda: (go.wait(10), seen.append(os.sched_getaffinity(0))))
        thread.start()
    assert os.sched_getaffinity(0) == before
    go.set()
    thread.join()
    assert seen == [core]
