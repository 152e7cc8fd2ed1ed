"""Which rows of logits become golden vectors, and which of their columns: those that damage shows in.

A row is a place in a text. Of each text's places those are taken where this machine's kernels round least and the best
token is clear, and of these again and again the one that shows best what has been shown least so far. Of its logits it
keeps the largest, those that this damage moves most, and some of all others.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from forge.quantise import Float
from wire.golden import GoldenVector

VECTORS = 8
TOP_COLUMNS = 48
TELLING_COLUMNS = 104
RANDOM_COLUMNS = 104
CLEAR = 0.1
"""Share of a row's deviation that the best token must be ahead by: less, and kernels disagree about it."""


@dataclass(frozen=True, slots=True)
class Row:
    """The place `position` of a text; `late` when it needs much of a long text."""

    text: tuple[int, ...]
    position: int
    late: bool

    @property
    def tokens(self) -> tuple[int, ...]:
        """What a golden vector reads."""
        return self.text[: self.position + 1]

    def recent(self, count: int) -> "Row":
        """The same place when only the last `count` tokens are read."""
        if self.position < count:
            return self
        tokens = self.tokens[-count:]
        return Row(tokens, len(tokens) - 1, self.late)


@dataclass(frozen=True, slots=True)
class Choice:
    """A row and the damage that it was chosen to show, by their numbers."""

    row: int
    damage: int


def relative_error(row: Float, reference: Float) -> NDArray[np.float64]:
    """RMS difference of each row to the reference's as a share of its deviation; float32 [rows, vocabulary] both."""
    difference = row.astype(np.float64) - reference
    return np.asarray(np.sqrt(np.mean(np.square(difference), axis=1)) / reference.std(axis=1))


def choose_rows(
    late: NDArray[np.bool_], reference: Float, rounding: NDArray[np.float64], seen: NDArray[np.float64]
) -> list[Choice]:
    """At most VECTORS rows, at least one of the `late` [rows] if there are such. `rounding` [rows] is the error of
    right kernels, `seen` [damages, rows] that of each damage, `reference` float32 [rows, vocabulary]."""
    fit = _is_clear(reference) & (rounding <= np.median(rounding))
    open_rows = np.where(fit | (late & ~(fit & late).any()) | (~late & ~(fit & ~late).any()), True, False)
    choices: list[Choice] = []
    shown = np.zeros(len(seen))
    undone = np.ones(len(seen), bool)
    while len(choices) < VECTORS and open_rows.any():
        allowed = open_rows & late if not choices and late.any() else open_rows
        best = np.where(allowed, seen, -1.0)
        damage = int(np.argmin(np.where(undone, best.max(axis=1) if not choices else shown, np.inf)))
        row = int(np.argmax(best[damage]))
        choices.append(Choice(row, damage))
        shown = np.maximum(shown, seen[:, row])
        open_rows[row] = undone[damage] = False
        if not undone.any():
            undone[:] = True
    return choices


def make_vector(row: Row, reference: Float, change: Float, random: np.random.Generator) -> GoldenVector:
    """The golden vector of a row; `reference` are its logits and `change` what the damage adds to them, float32
    [vocabulary] both."""
    top = np.argsort(-reference, kind="stable")[:TOP_COLUMNS]
    moved = np.argsort(-np.abs(change), kind="stable")
    telling = moved[~np.isin(moved, top)][:TELLING_COLUMNS]
    others = np.setdiff1d(np.arange(reference.size), np.concatenate([top, telling]))
    chosen = random.choice(others, min(RANDOM_COLUMNS, others.size), replace=False)
    columns = np.sort(np.concatenate([top, telling, chosen]))
    return GoldenVector(
        input_ids=row.tokens,
        columns=tuple(int(column) for column in columns),
        logits=tuple(round(float(reference[column]), 5) for column in columns),
        deviation=round(float(reference.std()), 6),
        argmax=int(np.argmax(reference)),
    )


def rows_of(texts: Sequence[Sequence[int]], long_text: Sequence[int], late_rows: int) -> list[Row]:
    """Every place of the texts, and the last `late_rows` of the long one."""
    rows = [Row(tuple(text), position, late=False) for text in texts for position in range(len(text))]
    late = range(max(len(long_text) - late_rows, 0), len(long_text))
    return [*rows, *(Row(tuple(long_text), position, late=True) for position in late)]


def _is_clear(reference: Float) -> NDArray[np.bool_]:
    """Of each row, whether its best token is ahead."""
    second, first = np.partition(reference, (-2, -1), axis=1)[:, -2:].T
    return np.asarray(first - second >= CLEAR * reference.std(axis=1))
