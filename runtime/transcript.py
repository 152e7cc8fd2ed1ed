"""What of an answer can be given out by now: its text up to a stop string, and the scores of the tokens behind it.

Invariants: text is given out whole characters at a time and never taken back; nothing that follows a stop string, and
nothing of the string itself, is given out, neither as text nor as a token; a score is given out with the text that its
token completes, so that a token that reaches into a stop string has none.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from runtime.sampling import Scored
from runtime.text import Detokeniser, StopStrings
from runtime.vocabulary import Vocabulary


@dataclass(frozen=True, slots=True)
class Placed:
    """A scored token, and where in the answer its text begins, in characters."""

    scored: Scored
    offset: int


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of an answer. `scores` is empty unless log probabilities were asked for."""

    text: str
    scores: tuple[Placed, ...] = ()


class Transcript:
    """Takes the tokens of one answer and gives out pieces."""

    def __init__(self, vocabulary: Vocabulary, stops: Sequence[str]) -> None:
        self._detokeniser, self._stops = Detokeniser(vocabulary), StopStrings(tuple(stops))
        self._text: list[str] = []
        self._read = self._given = 0
        """Characters that the tokens made, and those of them that were given out."""
        self._unread: list[Placed] = []
        """Tokens since the last that ended with a whole character."""
        self._held: deque[tuple[Placed, int]] = deque()
        """Tokens that may still reach into a stop string, and where their text ends."""
        self._scores: list[Placed] = []

    @property
    def stopped(self) -> bool:
        """True once a stop string is complete; nothing more is given out."""
        return self._stops.stopped

    def feed(self, token: int | Scored) -> None:
        """One more token."""
        if isinstance(token, Scored):
            self._unread.append(Placed(token, self._read))
            token = token.token
        self._add(self._detokeniser.feed(token), final=False)

    def finish(self) -> None:
        """There are no more tokens: what was held is given out, unless it completes a stop string."""
        self._add(self._detokeniser.finish(), final=True)

    def take(self) -> Piece:
        """What can be given out since the last time."""
        piece = Piece("".join(self._text), tuple(self._scores))
        self._text, self._scores = [], []
        return piece

    def _add(self, text: str, *, final: bool) -> None:
        self._read += len(text)
        if final or not self._detokeniser.within_character:
            self._held.extend((placed, self._read) for placed in self._unread)
            self._unread = []
        given = self._stops.feed(text)
        if final:
            given += self._stops.finish()
        self._text.append(given)
        self._given += len(given)
        while self._held and self._held[0][1] <= self._given:
            self._scores.append(self._held.popleft()[0])
