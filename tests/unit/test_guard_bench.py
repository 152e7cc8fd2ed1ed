"""The benchmark harness: turns, medians, absent peers and missed targets."""

import json
from dataclasses import fields
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest

from benchmarks import harness
from benchmarks.harness import (
    PeerAbsent,
    Row,
    Samples,
    at_least,
    at_most,
    exact,
    measure,
    row,
    rows_against,
    save,
)


@pytest.fixture(autouse=True)
def without_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody spins here."""
    monkeypatch.setattr(harness, "REST_S", 0.0)


def test_subjects_are_measured_in_turns_after_one_warm_up() -> None:
    order: list[str] = []

    def subject(name: str, figure: float) -> float:
        order.append(name)
        return figure

    measured = measure({"ours": lambda: subject("ours", 1.0), "peer": lambda: subject("peer", 2.0)})
    assert order[:6] == ["ours", "peer", "ours", "peer", "peer", "ours"]
    assert [samples.values for samples in measured.values() if samples] == [(1.0,) * 5, (2.0,) * 5]


def test_none_of_several_subjects_runs_twice_in_a_row_or_always_after_the_same_one() -> None:
    order: list[str] = []

    def subject(name: str) -> float:
        order.append(name)
        return 1.0

    measure({name: partial(subject, name) for name in "abcd"}, rounds=50)
    measured = order[4:]
    assert all(sorted(measured[i : i + 4]) == list("abcd") for i in range(0, len(measured), 4))
    follows = {name: {after for before, after in pairwise(measured) if before == name} for name in "abcd"}
    assert all(after == set("abcd") - {name} for name, after in follows.items())


def test_fewer_than_five_rounds_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 5"):
        measure({"ours": lambda: 1.0}, rounds=4)


def test_median_and_spread_are_told() -> None:
    told = row("time", "s", Samples((1.0, 9.0, 2.0, 2.0, 3.0)))
    assert (told.value, told.spread, told.met) == (2.0, 4.0, True)


def test_absent_peer_is_not_met_even_when_the_value_would_be() -> None:
    def absent() -> float:
        raise PeerAbsent("not installed")

    measured = measure({"ours": lambda: 1.0, "peer": absent})
    (told,) = rows_against("time", "s", "ours", measured, at_most(2.0))
    assert (told.peer, told.peer_value, told.ratio, told.met) == ("peer", None, None, False)


@pytest.mark.parametrize(("bound", "met"), [(0.5, True), (0.49, False)])
def test_ratio_target_judges_ours_over_theirs(bound: float, met: bool) -> None:
    told = row("size", "bytes", exact(5), at_most(bound, ratio=True), ("zip", exact(10)))
    assert (told.ratio, told.met) == (0.5, met)


def test_missed_lower_bound_is_not_met() -> None:
    assert not row("rate", "1/s", exact(9), at_least(10)).met
    assert row("rate", "1/s", exact(10), at_least(10)).met


def test_saved_rows_have_exactly_the_agreed_fields(tmp_path: Path) -> None:
    save([row("size", "bytes", exact(5))], tmp_path / "out.json")
    (saved,) = json.loads((tmp_path / "out.json").read_text())
    expected = ["metric", "value", "unit", "spread", "peer", "peer_value", "ratio", "target", "met"]
    assert list(saved) == expected == [field.name for field in fields(Row)]
