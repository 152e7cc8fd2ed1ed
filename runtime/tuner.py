"""Which way to run a version is the fastest here that is right: one change after the other, each against the best.

Runs in the probe child. Invariants: nothing is kept whose golden vectors are not right by the float32 reference; two
ways are measured in turns, so that what else the node does meets both alike; another way must win clearly, and none
wins by rounding the model's numbers away. Every way that was looked at leaves a row.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from runtime.golden import Judgement
from runtime.memory import anonymous_bytes, trim_heap
from runtime.model import PREFILL_TOKENS
from runtime.providers import library_devices
from runtime.subject import Subject
from runtime.ways import SPINNING, Figure, Way, fewer_threads, shorter_pieces
from wire.errors import AmperageError
from wire.serving import ExecutionOptions, Trial, TrialOutcome

ROUNDS_LEAST, ROUNDS_MOST = 3, 21
ROUNDS_PLAIN = 6
"""Rounds after which a race may be over before its time: a fair coin falls so often on one side in 3 of 100 times."""
MEASURE_BUDGET_S = 2.0
BETTER_BY = 1.05
"""Other options must win clearly, because measurements on a serving node are noisy."""
ROUNDING_LIMIT, ROUNDING_FACTOR = 0.02, 2.0
"""A golden error over this, and over so many times that of the other way, decides against a way whatever its speed:
the tolerance alone would let pass what KleidiAI's kernels round off models with loud channels (docs/adr/0013)."""
COST_FACTOR = 2.0
"""Seconds to load and judge another way per second of the first load."""
DETAIL_LIMIT = 300

Speeds = tuple[float, float]
"""Tokens per second of generating and of reading."""


class Tuner:
    """The best way so far, and what was tried. Ways are tried until `until_s` of time.perf_counter."""

    def __init__(self, load: Callable[[], Subject], until_s: float) -> None:
        """Load and judge the first way; raises what `load` raises."""
        self._until_s = until_s
        self._rows: list[Trial] = []
        self.best, self.judged = self._look("as it comes", load)
        self._best_row = 0
        self._mark(0, TrialOutcome.WRONG if self.judged.fault else TrialOutcome.CHOSEN)

    @property
    def trials(self) -> tuple[Trial, ...]:
        """A row for each way, in the order of trying."""
        return tuple(self._rows)

    @property
    def load_s(self) -> float:
        """Seconds that the first load took."""
        return self._rows[0].load_s or 0.0

    def remedy(self, ways: list[Way]) -> bool:
        """Where the first way is wrong, take the first of `ways` that is right; False when none is."""
        first = self.best
        return any(
            self._try(way.name, way.applied(first.options), partial(first.again, way.applied(first.options)), _suits)
            for way in ways
        )

    def attempt(self, way: Way, better_by: float = BETTER_BY) -> bool:
        """Try one way; True when it is the best from now on."""
        options = way.applied(self.best.options)
        if options == self.best.options:
            return False
        if time.perf_counter() + COST_FACTOR * self.load_s + MEASURE_BUDGET_S > self._until_s:
            self._rows.append(Trial(name=way.name, options=options, outcome=TrialOutcome.SKIPPED))
            return False
        return self._try(
            way.name, options, partial(self.best.again, options),
            lambda other, judged: self._weigh(other, judged, way.figure, better_by),
        )  # fmt: skip

    def attempt_threads(self) -> None:
        """Threads that spin, and half of them as long as that is better; of those that sleep two may lose against one
        where two that spin would win, so that the first is tried before."""
        threads = self.best.options.threads
        if threads > 1:
            self.attempt(SPINNING)
        while (way := fewer_threads(self.best.options)) is not None and self.attempt(way):
            continue
        if 1 < self.best.options.threads < threads:
            self.attempt(SPINNING)

    def attempt_shorter_pieces(self) -> None:
        """Shorter and shorter ones for the session that reads, as long as it is better at them."""
        while (way := shorter_pieces(self.best.options)) is not None and self.attempt(way):
            continue

    def attempt_provider(self, provider: str | None, library: str | None) -> bool:
        """The best way with another execution provider, which a `library` names itself when it is loaded."""
        options = self.best.options.model_copy(update={"library": library, "provider": provider or ""})

        def load() -> Subject:
            named = provider or library_devices(library or "")[0].ep_name
            return self.best.again(options.model_copy(update={"provider": named}))

        name = f"provider {provider}" if provider else f"library {library}"
        return self._try(name, options, load, lambda other, judged: self._weigh(other, judged, Figure.BOTH, BETTER_BY))

    def attempt_packed(self, directory: Path, check: Callable[[], str]) -> bool:
        """The best way over packed weights in `directory`, unless `check` says what is wrong with them after a run.

        They are the same bits for the same kernels and save memory; how fast they are is measured to be told.
        """
        options = self.best.options

        def fault(other: Subject, _: Judgement) -> str:
            return check() or self._race(other, Figure.BOTH, 0.0)

        return self._try("weights from the cache", options, partial(self.best.again, options, directory), fault)

    def _try(
        self, name: str, options: ExecutionOptions, load: Callable[[], Subject],
        beaten: Callable[[Subject, Judgement], str],
    ) -> bool:  # fmt: skip
        """Load and judge another; it is the best when it is right and `beaten` has nothing to say."""
        try:
            other, judged = self._look(name, load)
        except (AmperageError, MemoryError) as error:
            failed = Trial(name=name, options=options, outcome=TrialOutcome.FAILED, detail=str(error)[:DETAIL_LIMIT])
            self._rows.append(failed)
            return False
        row = len(self._rows) - 1
        why = judged.fault or beaten(other, judged)
        if why:
            self._mark(row, TrialOutcome.WRONG if judged.fault else TrialOutcome.BEATEN, why)
            other.close()
            return False
        if not self.judged.fault:
            self._mark(self._best_row, TrialOutcome.BEATEN)
        self.best.close()
        self.best, self.judged, self._best_row = other, judged, row
        self._mark(row, TrialOutcome.CHOSEN)
        return True

    def _look(self, name: str, load: Callable[[], Subject]) -> tuple[Subject, Judgement]:
        """Load and judge, and write a row about it."""
        trim_heap()
        before, began_s = anonymous_bytes(), time.perf_counter()
        subject = load()
        load_s = time.perf_counter() - began_s
        judged = subject.judge()
        trim_heap()
        self._rows.append(
            Trial(
                name=name, options=subject.options, outcome=TrialOutcome.BEATEN, golden_error=judged.worst_error,
                heap_bytes=max(0, anonymous_bytes() - before), load_s=load_s,
            )
        )  # fmt: skip
        return subject, judged

    def _weigh(self, other: Subject, judged: Judgement, figure: Figure, better_by: float) -> str:
        """Why `other` is beaten, or nothing: by what it rounds when that differs much, else by its speed."""
        slower = self._race(other, figure, better_by)
        mine, others = self.judged.worst_error or 0.0, judged.worst_error or 0.0
        if others > max(ROUNDING_LIMIT, ROUNDING_FACTOR * mine):
            return f"its golden error is {others:.3f}, that of the best {mine:.3f}"
        return "" if mine > max(ROUNDING_LIMIT, ROUNDING_FACTOR * others) else slower

    def _race(self, other: Subject, figure: Figure, better_by: float) -> str:
        """Measure the best and `other`, whose row is the last, in turns; says why it is beaten, or nothing."""

        def is_over(mine: list[Speeds], others: list[Speeds]) -> bool:
            return is_plain([figure.of(*b) / figure.of(*a) for a, b in zip(mine, others, strict=True)], better_by)

        mine, others = in_turns((self.best, other), figure, is_over)
        ratio = figure.of(*others) / figure.of(*mine)
        if figure is not Figure.PIECES:  # which are slower than a whole prompt
            for row, speeds in ((self._best_row, mine), (len(self._rows) - 1, others)):
                found = {"tokens_per_s": speeds[0], "read_tokens_per_s": speeds[1]}
                self._rows[row] = self._rows[row].model_copy(update={k: v for k, v in found.items() if v == v})
        self._rows[-1] = self._rows[-1].model_copy(update={"ratio": ratio})
        return "" if ratio > better_by else f"{ratio:.2f} times the speed of the best"

    def _mark(self, row: int, outcome: TrialOutcome, detail: str = "") -> None:
        self._rows[row] = self._rows[row].model_copy(update={"outcome": outcome, "detail": detail[:DETAIL_LIMIT]})


def in_turns(subjects: Sequence[Subject], figure: Figure, is_over: Callable[..., bool] | None = None) -> list[Speeds]:
    """Medians of every subject, nan for what `figure` does not ask; `is_over` is asked after every round about the
    samples of each."""
    pieces = figure is Figure.PIECES
    piece_tokens = min(subject.options.reading_tokens for subject in subjects) if pieces else PREFILL_TOKENS
    samples: list[list[Speeds]] = [[] for _ in subjects]
    until_s = time.perf_counter() + MEASURE_BUDGET_S
    for count in range(1, ROUNDS_MOST + 1):
        for subject, taken in zip(subjects, samples, strict=True):
            decode = subject.tokens_per_s() if figure in (Figure.DECODE, Figure.BOTH) else math.nan
            read = subject.read_tokens_per_s(piece_tokens) if figure is not Figure.DECODE else math.nan
            taken.append((decode, read))
        is_late = count >= ROUNDS_LEAST and time.perf_counter() > until_s
        if is_late or (is_over is not None and is_over(*samples)):
            break
    columns = [tuple(zip(*taken, strict=True)) for taken in samples]
    return [(statistics.median(decode), statistics.median(read)) for decode, read in columns]


def is_plain(ratios: Sequence[float], bound: float) -> bool:
    """Whether nearly all of `ratios` are on the same side of `bound`: all of 6, all but one of 12, but two of 18."""
    above = sum(ratio > bound for ratio in ratios)
    return min(above, len(ratios) - above) <= len(ratios) // ROUNDS_PLAIN - 1


def _suits(other: Subject, judged: Judgement) -> str:
    del other, judged
    return ""
