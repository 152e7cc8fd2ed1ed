"""Rows of figures: measuring ours and the peers in turns, judging against a target, showing and saving.

Subjects are measured in turns (ours, peer, ours, peer, ...) and not one after the other, so that a machine that
becomes slower half-way is slow for all. A figure is the median of at least five rounds. A peer that is not installed
is no excuse: its row says `"met": false`, as a missed target does.
"""

import json
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cli.terminal import console as standard_console

ROUNDS = 5
"""Fewest rounds whose median is worth telling."""

Subject = Callable[[], float]
"""Does the work once and returns its figure in the row's unit."""


class PeerAbsent(Exception):  # noqa: N818  it is a finding, not an error
    """A peer cannot run on this machine; the message says why."""


@dataclass(frozen=True, slots=True)
class Samples:
    """Figures of one subject, in the order of the rounds."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The figure to tell."""
        return statistics.median(self.values)

    @property
    def spread(self) -> float:
        """(largest - smallest) / median: 0.1 means that the rounds differ by a tenth of the median."""
        return (max(self.values) - min(self.values)) / abs(self.median) if self.median else 0.0


class Relation(StrEnum):
    """How a figure has to stand to its bound."""

    AT_MOST = "<="
    AT_LEAST = ">="


@dataclass(frozen=True, slots=True)
class Target:
    """A bound on the row's value or, with `of_ratio`, on value / peer_value."""

    relation: Relation
    bound: float
    of_ratio: bool = False

    def __str__(self) -> str:
        return f"{'ratio' if self.of_ratio else 'value'} {self.relation} {self.bound:g}"

    def is_met(self, value: float, ratio: float | None) -> bool:
        """True when the figure is there and within the bound."""
        figure = ratio if self.of_ratio else value
        if figure is None or math.isnan(figure):
            return False
        return figure <= self.bound if self.relation is Relation.AT_MOST else figure >= self.bound


def at_most(bound: float, *, ratio: bool = False) -> Target:
    """The value, or its ratio to the peer, may be `bound` and no more."""
    return Target(Relation.AT_MOST, bound, ratio)


def at_least(bound: float, *, ratio: bool = False) -> Target:
    """The value, or its ratio to the peer, must be `bound` or more."""
    return Target(Relation.AT_LEAST, bound, ratio)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a result, and exactly the fields of its JSON object. `ratio` is value / peer_value."""

    metric: str
    value: float
    unit: str
    spread: float
    peer: str | None
    peer_value: float | None
    ratio: float | None
    target: str | None
    met: bool
    """False when the target is missed or the named peer is absent."""


REST_S = 0.1
"""onnxruntime's threads spin for tens of milliseconds when nobody bounds it: a 5 M model of ours had 0.63 to 0.74 of
the speed of onnxruntime-genai's when it was measured right after that, 1.0 to 1.2 after a pause."""


def measure(subjects: Mapping[str, Subject], rounds: int = ROUNDS) -> dict[str, Samples | None]:
    """Run every subject once to warm up, then `rounds` times in turns; None for one that raised PeerAbsent.

    The order is another one each round, so that nobody always runs after the same neighbour, and none of several runs
    twice in a row, its data still in the cache. Two take turns in both orders alike. Each begins when the threads of
    the one before it have had time to stop spinning.
    """
    if rounds < ROUNDS:
        raise ValueError(f"a median of {rounds} rounds tells nothing; use at least {ROUNDS}")
    present = {name: subject for name, subject in subjects.items() if _runs(name, subject)}
    values: dict[str, list[float]] = {name: [] for name in present}
    for names in _orders(list(present), rounds):
        for name in names:
            time.sleep(REST_S)
            values[name].append(present[name]())
    return {name: Samples(tuple(values[name])) if name in values else None for name in subjects}


def _orders(names: list[str], rounds: int) -> Iterator[list[str]]:
    chance, order = random.Random(0), names
    for number in range(rounds):
        if len(names) <= 2:
            order = names if number % 2 == 0 else names[::-1]
        elif number:
            first = chance.choice([name for name in names if name != order[-1]])
            rest = [name for name in names if name != first]
            order = [first, *chance.sample(rest, len(rest))]
        yield order


def seconds_of(work: Callable[[], object]) -> Subject:
    """A subject whose figure is the wall-clock seconds that `work` takes."""

    def timed() -> float:
        started = time.perf_counter()
        work()
        return time.perf_counter() - started

    return timed


def rate_of(work: Callable[[], object], amount: float) -> Subject:
    """A subject whose figure is `amount` per wall-clock second of `work`."""
    timed = seconds_of(work)
    return lambda: amount / timed()


def exact(value: float) -> Samples:
    """A figure that does not vary, such as a size: one sample, no spread."""
    return Samples((value,))


def row(
    metric: str, unit: str, ours: Samples, target: Target | None = None, peer: tuple[str, Samples | None] | None = None
) -> Row:
    """Judge `ours`, against `peer` (its name and figures; None for figures means that it is absent) when given."""
    name, theirs = peer if peer is not None else (None, None)
    ratio = ours.median / theirs.median if theirs is not None and theirs.median else None
    met = target is None or target.is_met(ours.median, ratio)
    return Row(
        metric=metric,
        value=ours.median,
        unit=unit,
        spread=ours.spread,
        peer=name,
        peer_value=theirs.median if theirs is not None else None,
        ratio=ratio,
        target=str(target) if target is not None else None,
        met=met and (name is None or theirs is not None),
    )


def rows_against(
    metric: str, unit: str, ours: str, measured: Mapping[str, Samples | None], target: Target | None = None
) -> list[Row]:
    """A row per peer of one `measure` call; `ours` is the name of our own subject in it."""
    own = measured[ours]
    if own is None:
        raise ValueError(f"{ours} did not run, so there is nothing to compare")
    peers = [name for name in measured if name != ours]
    return [row(metric, unit, own, target, (name, measured[name])) for name in peers]


def table_of(name: str, rows: Sequence[Row]) -> Table:
    """The rows for people."""
    table = Table(title=f"bench {name}", title_justify="left")
    for heading in ("metric", "ours", "unit", "spread", "peer", "theirs", "ratio", "target", "met"):
        table.add_column(heading, justify="right" if heading in ("ours", "spread", "theirs", "ratio") else "left")
    for entry in rows:
        table.add_row(
            entry.metric, _figure(entry.value), entry.unit, f"{entry.spread:.1%}", entry.peer or "",
            "absent" if entry.peer and entry.peer_value is None else _figure(entry.peer_value),
            _figure(entry.ratio), entry.target or "", "[green]yes[/green]" if entry.met else "[red]no[/red]",
        )  # fmt: skip
    return table


def show(name: str, rows: Sequence[Row], console: Console | None = None) -> None:
    """Print the table."""
    (console or standard_console()).print(table_of(name, rows))


def save(rows: Sequence[Row], path: Path) -> None:
    """Write the rows as a JSON array of objects with exactly the fields of Row."""
    path.write_text(json.dumps([asdict(entry) for entry in rows], indent=1, allow_nan=False) + "\n")


def _runs(name: str, subject: Subject) -> bool:
    try:
        subject()
    except PeerAbsent as absence:
        Console(stderr=True).print(f"[yellow]{name} is absent:[/yellow] {absence}")
        return False
    return True


def _figure(value: float | None) -> str:
    if value is None:
        return ""
    if value and not 1e-3 <= abs(value) < 1e7:
        return f"{value:.3e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
