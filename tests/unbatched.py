"""What one request alone would be answered: texts judged token by token against a model that runs nothing else."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from runtime.model import PREFILL_TOKENS, Float, Model

PATH_TOKENS = 100
"""Of a prompt's greedy answer, kept because most answers follow it to their end."""


@dataclass(slots=True)
class Unbatched:
    """Judges texts. `tolerance` is how far below the best, in standard deviations of the row, a token may be where an
    answer parts from the unbatched one."""

    model: Model
    decode: Callable[[Sequence[int]], str]
    ends: frozenset[int]
    tolerance: float
    partings: list[float] = field(default_factory=list)
    """How far below the best the tokens were at which answers parted."""
    _paths: dict[tuple[int, ...], list[int]] = field(default_factory=dict)

    def explains(self, prompt: list[int], text: str, tokens: int | None, *, ended: bool) -> bool:
        """Whether `text` is what greedy decoding gives, or parts from it only within the tolerance.

        `tokens` counts those of a whole answer, None when only its beginning is known; `ended` says that its last
        token was an end token, which has no text.
        """
        path = self._path(prompt)[: PATH_TOKENS if tokens is None else tokens]
        if tokens is None and self.decode(path).startswith(text):
            return True
        if not ended and len(path) == tokens and self.decode(path) == text:
            return True
        return self._search(prompt, text, tokens, ended=ended)

    def _path(self, prompt: list[int]) -> list[int]:
        path = self._paths.get(tuple(prompt))
        if path is None:
            path = self._paths[tuple(prompt)] = []
            row = self._read(prompt)
            room = self.model.shape.capacity - len(prompt)
            while len(path) < min(PATH_TOKENS, room):
                path.append(int(row.argmax()))
                row = self.model.decode([path[-1]], [len(prompt) + len(path) - 1])[0]
        return path

    def _search(self, prompt: list[int], text: str, tokens: int | None, *, ended: bool) -> bool:
        """Depth first through what may have been taken where."""
        row = self._read(prompt)
        trail: list[tuple[int, Iterator[tuple[int, float]]]] = []
        taken: list[tuple[int, float]] = []
        position = len(prompt)
        choices = self._choices(row, [], text, tokens, ended=ended)
        while True:
            chosen = next(choices, None)
            if chosen is None:
                if not trail:
                    return False
                position, choices = trail.pop()
                taken.pop()
                continue
            taken.append(chosen)
            found = [token for token, _ in taken]
            if self._is_all(found, text, tokens):
                self.partings += [gap for _, gap in taken if gap > 0]
                return True
            trail.append((position, choices))
            row = self.model.decode([chosen[0]], [position])[0].copy()
            position += 1
            choices = self._choices(row, found, text, tokens, ended=ended)

    def _is_all(self, found: list[int], text: str, tokens: int | None) -> bool:
        if tokens is not None:
            return len(found) == tokens
        return self.decode(found).startswith(text)

    def _choices(
        self, row: Float, found: list[int], text: str, tokens: int | None, *, ended: bool
    ) -> Iterator[tuple[int, float]]:
        """Tokens within the tolerance that go on towards `text`, the best first, and how far below it each is."""
        deviation = float(row.std())
        near = np.flatnonzero(row.max() - row <= self.tolerance * deviation)
        for token in near[np.argsort(-row[near], kind="stable")]:
            after = [*found, int(token)]
            last = tokens is not None and len(after) == tokens
            if last and ended:
                fits = int(token) in self.ends and self.decode(found) == text
            else:
                fits = self._goes_on(after, text, whole=tokens is not None, last=last)
            if fits:
                yield int(token), float(row.max() - row[token]) / deviation

    def _goes_on(self, tokens: list[int], text: str, *, whole: bool, last: bool) -> bool:
        written = self.decode(tokens)
        if last:
            return written == text
        written = written.rstrip("\ufffd")
        return text.startswith(written) or (not whole and written.startswith(text))

    def _read(self, prompt: list[int]) -> Float:
        for start in range(0, len(prompt), PREFILL_TOKENS):
            row = self.model.prefill(0, prompt[start : start + PREFILL_TOKENS], start)
        return row.copy()
