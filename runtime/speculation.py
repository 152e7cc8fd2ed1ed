"""Prompt lookup: what an answer that repeats its text will say next, and whether checking that guess pays.

A draft is what followed the latest earlier place where the text stood as it stands now; the model reads it in one step,
and every token is still drawn from the model's own rows, so that a guess changes the speed and never the
distribution. Guesses are tried against the answer even while none is drafted, which costs nothing; a draft is made
only while they hold often enough for what a step of that size was measured to cost here. Pure: no I/O, no clock.

After Saxena, "Prompt Lookup Decoding" (2023), and Leviathan et al., arXiv 2211.17192, for what a draft may gain.
"""

from collections import deque
from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

SHORTEST_MATCH, LEVELS = 2, 7
"""Tokens at the text's end that must have stood earlier; a match of level 0 has so many, one of the last level as many
as LEVELS - 1 more, or any number beyond. Of the sample LM's guesses after 2, 3, 4 and 8 tokens 56, 78, 88 and 97 of 100
are right in greedy answers, and 20 and 12 after 2 and 3 tokens at temperature 1, where longer matches hardly occur."""
PLACES = 16
"""Latest places of the shortest match among which the longest is sought: the bound of a token's work."""
DRAFT_TOKENS = 7
"""Longest draft: on CPUs a step's time grows with its tokens, so that longer ones gain little."""
TRIAL_TOKENS, TRIAL_COST = 3, 1.5
"""Draft of the first steps, before any was timed, and how many plain steps one of them is taken to cost, of which the
answers that were decoded together share each."""
MARGIN = 1.05
"""A draft must be expected to be faster by this factor."""
FIRST_RATE = 0.3
"""Of right guesses, before any was made."""
PRIOR_GUESSES, OWN_GUESSES, COMMON_GUESSES = 2, 12, 64
"""Latest guesses that a rate tells of: when it begins, of one answer at most, of all answers at most."""
WINDOW_STEPS, TIMED_STEPS = 9, 3
"""Steps of which the shortest counts, and how many make it credible."""
FRESH_STEPS = 32
"""Steps with drafts after which a plain one is timed again."""
FORGET_STEPS = 256
"""Plain steps after which the times of steps with drafts are forgotten: the machine may have changed."""
PATIENCE_STEPS, REST_STEPS = 4, 7
"""So many plans in turn without a draft make a plain step more before the next, up to so many: looking is not free."""
ALLOWANCE_STEPS, ALLOWANCE_LIMIT_STEPS, ALLOWANCE_GROWTH = 4.0, 8.0, 0.005
"""Plain steps that drafts may lose at first and at most, and what a plain step adds: the bound of the loss, 0.5 %."""


class Rates:
    """Shares of guesses that were right, by the level of the match that they follow."""

    def __init__(self, common: "Rates | None" = None) -> None:
        self._common = common
        self._rates = [FIRST_RATE if common is None else common[level] for level in range(LEVELS)]
        self._guesses = [PRIOR_GUESSES] * LEVELS
        self._limit = COMMON_GUESSES if common is None else OWN_GUESSES

    def __getitem__(self, level: int) -> float:
        """At `level`; beyond the last it is that of the last."""
        return self._rates[min(level, LEVELS - 1)]

    def note(self, level: int, hit: bool) -> None:
        """A guess was right or wrong."""
        level = min(level, LEVELS - 1)
        self._rates[level] += (hit - self._rates[level]) / self._guesses[level]
        self._guesses[level] = min(self._guesses[level] + 1, self._limit)
        if self._common is not None:
            self._common.note(level, hit)


class Drafter:
    """Guesses for one answer. `tokens` is its text, prompt first, which its owner appends to and never shortens."""

    def __init__(self, tokens: Sequence[int], common: Rates) -> None:
        self._tokens = tokens
        self._latest: dict[tuple[int, int], int] = {}
        """By the SHORTEST_MATCH tokens before it, the latest place, an index of the text."""
        self._previous = [0] * SHORTEST_MATCH
        """By place, the one before it with the same tokens before it; 0: none."""
        self._length = 0
        """Tokens that were looked at."""
        self._place = 0
        """What stood before it stands at the end of them now; 0: no place is like that."""
        self._level = 0
        self.rates = Rates(common)

    def look(self) -> bool:
        """Take notice of new tokens, learn how good the last guess was, make a new one; False when there is none."""
        tokens, latest = self._tokens, self._latest
        end = len(tokens)
        if end == self._length:
            return self._place > 0
        if self._place:
            self._learn(end)
        self._length, self._place = end, 0
        for place in range(len(self._previous), end + 1):
            pair = (tokens[place - 2], tokens[place - 1])
            self._place = latest.get(pair, 0)
            latest[pair] = place
            self._previous.append(self._place)
        if self._place:
            self._seek()
        return self._place > 0

    def expected(self, count: int) -> list[float]:
        """Tokens that steps with drafts of 0..count tokens give: the model's own and the guesses before a miss."""
        expected, reach = [1.0], 1.0
        for position in range(count):
            reach *= self.rates[self._level + position]
            expected.append(expected[-1] + reach)
        return expected

    def draft(self, count: int) -> list[int]:
        """The guess: `count` tokens from the match on; one that reaches the text's end goes on as the text would."""
        period = self._length - self._place
        return [self._tokens[self._place + position % period] for position in range(count)]

    def _seek(self) -> None:
        """The longest match, among equals the latest."""
        place, self._level = self._place, -1
        for _ in range(PLACES):
            level = self._level_of(place)
            if level > self._level:
                self._place, self._level = place, level
            place = self._previous[place]
            if self._level == LEVELS - 1 or not place:
                return

    def _level_of(self, place: int) -> int:
        """How many tokens beyond the shortest match agree."""
        tokens, end = self._tokens, self._length
        level = 0
        while level < LEVELS - 1:
            back = SHORTEST_MATCH + 1 + level
            if back > place or tokens[place - back] != tokens[end - back]:
                break
            level += 1
        return level

    def _learn(self, end: int) -> None:
        for position in range(end - self._length):
            hit = self._tokens[self._length + position] == self._tokens[self._place + position]
            self.rates.note(self._level + position, hit)
            if not hit:
                return


class Costs:
    """Seconds of steps by their size: the shortest of the last few, as what else the machine does only ever adds."""

    def __init__(self) -> None:
        self._windows: dict[int, deque[float]] = {}

    def note(self, size: int, span_s: float) -> None:
        """A step of this size took `span_s`."""
        window = self._windows.get(size)
        if window is None:
            window = self._windows[size] = deque(maxlen=WINDOW_STEPS)
        window.append(span_s)

    def get(self, size: int) -> float | None:
        """Seconds of a size that was timed often enough."""
        window = self._windows.get(size, ())
        return min(window) if len(window) >= TIMED_STEPS else None

    def line(self) -> list[float]:
        """Seconds of every size from 0 to 1 + DRAFT_TOKENS, on straight lines between those that were timed.

        Smaller sizes are taken to cost what the smallest of these does. Empty before two were timed.
        """
        timed = [(size, span_s) for size in sorted(self._windows) if (span_s := self.get(size)) is not None]
        if len(timed) < 2:
            return []
        line: list[float] = []
        pieces = iter(pairwise(timed))
        (low, low_s), (high, high_s) = next(pieces)
        for size in range(2 + DRAFT_TOKENS):
            if size > high:
                (low, low_s), (high, high_s) = next(pieces, ((low, low_s), (high, high_s)))
            line.append(low_s + max(high_s - low_s, 0.0) * max(size - low, 0) / (high - low))
        return line

    def forget(self) -> None:
        """Begin anew."""
        self._windows.clear()


class Answer(Protocol):
    """A running answer."""

    @property
    def drafter(self) -> Drafter | None:
        """Guesses how it goes on; None: nobody may."""

    @property
    def left(self) -> int:
        """Tokens that it may still get."""


class Speculation:
    """Decides for every step of one engine whether it decodes or verifies drafts."""

    def __init__(self) -> None:
        self._rates = {True: Rates(), False: Rates()}
        """Of all greedy answers, and of all others, which repeat much less; a new one begins with those of its kind."""
        self._plain = Costs()
        """By the number of answers that were decoded together."""
        self._verify = Costs()
        """By the tokens that one answer's step read, its last one and the draft."""
        self._allowance = ALLOWANCE_STEPS
        self._verified_in_turn = self._decoded_in_turn = 0
        self._forget_at = FORGET_STEPS
        self._fruitless = self._rest = 0

    def drafter(self, tokens: Sequence[int], *, greedy: bool) -> Drafter:
        """For a new answer: as Drafter says."""
        return Drafter(tokens, self._rates[greedy])

    def plan(self, running: Sequence[Answer]) -> list[list[int]] | None:
        """A draft for each answer, to be verified one after the other; None when decoding them together is better.

        Verifying must be expected to bring every answer on faster: one that repeats nothing gets a token per step
        whatever the others do, and would only wait for their drafts, so that there are none beside it.
        """
        if self._rest > 0:
            self._rest -= 1
            return None
        drafts = self._choose(running)
        self._fruitless = self._fruitless + 1 if drafts is None else 0
        self._rest = min(self._fruitless // PATIENCE_STEPS, REST_STEPS)
        return drafts

    def decoded(self, answers: int, span_s: float) -> None:
        """`answers` were decoded together, by a token each."""
        self._decoded_in_turn += 1
        if self._rest > 0:
            return
        self._verified_in_turn = 0
        self._plain.note(answers, span_s)
        if answers == 1:
            self._verify.note(1, span_s)

    def verified(self, answers: int, size: int, given: int, span_s: float) -> None:
        """One of `answers` read `size` tokens in one step, of which `given` became its own or ended it."""
        self._verify.note(size, span_s)
        self._allowance += ALLOWANCE_GROWTH * self._decoded_in_turn
        self._decoded_in_turn, self._forget_at = 0, FORGET_STEPS
        self._verified_in_turn += 1
        plain_s = self._plain.get(answers)
        if plain_s is not None:
            # a pause of the machine is no reason: so many plain steps would take no longer
            usual_s = self._verify.get(size) or min(span_s, size * plain_s)
            self._allowance += given / answers - usual_s / plain_s
        self._allowance = min(self._allowance, ALLOWANCE_LIMIT_STEPS)

    def _choose(self, running: Sequence[Answer]) -> list[list[int]] | None:
        if self._verified_in_turn >= FRESH_STEPS or self._allowance + ALLOWANCE_GROWTH * self._decoded_in_turn <= 0:
            return None
        ready = [(a.drafter, a.left) for a in running if a.drafter is not None and a.drafter.look() and a.left > 1]
        if len(ready) < len(running):
            return None
        if self._decoded_in_turn >= self._forget_at:
            self._verify.forget()
            self._forget_at += FORGET_STEPS
        plain_s, costs_s = self._plain.get(len(running)), self._verify.line()
        if plain_s is None:
            return None
        drafts: list[list[int]] = []
        gain, span_s = float(1 + DRAFT_TOKENS), 0.0
        for drafter, left in ready:
            expected = drafter.expected(min(DRAFT_TOKENS, left - 1))
            count, cost_s = _best(expected, costs_s, TRIAL_COST * plain_s / len(ready))
            drafts.append(drafter.draft(count))
            gain, span_s = min(gain, expected[count]), span_s + cost_s
        return drafts if gain * plain_s >= MARGIN * span_s else None


def _best(expected: list[float], costs_s: list[float], trial_s: float) -> tuple[int, float]:
    """How many tokens to draft, and the seconds of the step; `costs_s` is empty before steps with drafts were timed."""
    if not costs_s:
        return min(TRIAL_TOKENS, len(expected) - 1), trial_s
    count = max(range(1, len(expected)), key=lambda count: expected[count] / costs_s[count + 1])
    return count, costs_s[count + 1]
