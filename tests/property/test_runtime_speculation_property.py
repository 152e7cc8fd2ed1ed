"""Guesses from the text itself, and the choice between verifying them and plain steps, on clocks of our own."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.speculation import (
    ALLOWANCE_GROWTH,
    ALLOWANCE_LIMIT_STEPS,
    DRAFT_TOKENS,
    LEVELS,
    PLACES,
    SHORTEST_MATCH,
    Drafter,
    Rates,
    Speculation,
)

Texts = st.lists(st.integers(0, 3), max_size=80)
PLAIN_S = 0.010
Step = Callable[[int], float]
"""Seconds of a step of so many tokens."""


def costs(slope: float) -> Step:
    """In the sample LM a token more costs 0.32 of a plain step on two x86 cores."""
    return lambda size: PLAIN_S * (1 + slope * (size - 1))


@dataclass(frozen=True, slots=True)
class Waiting:
    """A running answer."""

    drafter: Drafter | None
    left: int = 100


def brute_match(text: Sequence[int]) -> tuple[int, int] | None:
    """(place, level) by looking at every place of the text."""
    end = len(text)
    places = [p for p in range(SHORTEST_MATCH, end) if all(text[p - i] == text[end - i] for i in (1, SHORTEST_MATCH))]

    def level(place: int) -> int:
        sizes = range(SHORTEST_MATCH, min(SHORTEST_MATCH + LEVELS - 1, place) + 1)
        return max(size for size in sizes if text[place - size : place] == text[end - size :]) - SHORTEST_MATCH

    recent = [(level(place), place) for place in places[-PLACES:]]
    return (max(recent)[1], max(recent)[0]) if recent else None


@settings(max_examples=300)
@given(Texts, st.lists(st.integers(1, 9), max_size=40), st.integers(0, DRAFT_TOKENS))
def test_guess_is_what_followed_the_longest_latest_match(text: list[int], pieces: list[int], count: int) -> None:
    grown: list[int] = []
    drafter = Drafter(grown, Rates())
    while text:
        size = pieces.pop() if pieces else 1
        grown += text[:size]
        text = text[size:]
        expected = brute_match(grown)
        assert drafter.look() == (expected is not None)
        if expected is None:
            continue
        place, level = expected
        assert (drafter._place, drafter._level) == (place, level)
        draft = drafter.draft(count)
        assert len(draft) == count
        whole = [*grown, *draft]
        for position in range(-SHORTEST_MATCH, count):  # the draft goes on as the text did from its earlier place on
            assert whole[len(grown) + position] == whole[place + position]


@given(Texts, st.lists(st.integers(1, 4), max_size=40))
def test_rates_are_the_shares_of_guesses_that_held(text: list[int], pieces: list[int]) -> None:
    """Against the definition: of the tokens that came, those up to the first wrong guess count, each at the level that
    the match had grown to, the n-th of a rate by 1 / min(n + 1, horizon)."""
    common = Rates()
    grown: list[int] = []
    drafter = Drafter(grown, common)
    own, guesses = [common[level] for level in range(LEVELS)], [2] * LEVELS
    while text:
        size = pieces.pop() if pieces else 1
        came, text = text[:size], text[size:]
        expected = brute_match(grown)
        if expected is not None:
            place, level = expected
            for token, guess in zip(came, [*grown, *came][place:], strict=False):
                own[level] += ((token == guess) - own[level]) / guesses[level]
                guesses[level] = min(guesses[level] + 1, 12)
                level = min(level + 1, LEVELS - 1)
                if token != guess:
                    break
        grown += came
        drafter.look()
        assert [drafter.rates[level] for level in range(LEVELS)] == pytest.approx(own)


def play(
    speculation: Speculation,
    text: Sequence[int],
    cost: Step,
    answers: int = 1,
    prompt: int = 2,
    batch: float = 0.5,
    one_s: float = PLAIN_S,
) -> tuple[float, float]:
    """Seconds that `answers` equal answers take with speculation and with plain steps, for `text` after its prompt."""
    grown = [list(text[:prompt]) for _ in range(answers)]
    drafters = [speculation.drafter(tokens, greedy=True) for tokens in grown]
    plain_s = one_s * (1 + batch * (answers - 1))
    spent_s = 0.0
    while len(grown[0]) < len(text):
        left = len(text) - len(grown[0])
        drafts = speculation.plan([Waiting(drafter, left) for drafter in drafters])
        if drafts is None:
            for tokens in grown:
                tokens.append(text[len(tokens)])
            spent_s += plain_s
            speculation.decoded(answers, plain_s)
            continue
        assert len(drafts) == answers
        for tokens, draft in zip(grown, drafts, strict=True):
            assert 1 <= len(draft) <= min(DRAFT_TOKENS, left - 1)
            given = 0
            for guess in [*draft, None]:
                tokens.append(text[len(tokens)])
                given += 1
                if tokens[-1] != guess:
                    break
            span_s = cost(1 + len(draft))
            spent_s += span_s
            speculation.verified(answers, 1 + len(draft), given, span_s)
    return spent_s, plain_s * (len(text) - prompt)


def ordinary(seed: int, size: int, words: int = 60) -> list[int]:
    """Words of two or three tokens in any order: pairs of tokens return all the time, and what follows them seldom."""
    chance = random.Random(seed)
    vocabulary = [[chance.randrange(500) for _ in range(chance.choice((2, 3)))] for _ in range(words)]
    return [token for _ in range(size) for token in chance.choice(vocabulary)][:size]


def test_text_that_copies_is_much_faster_and_ordinary_text_as_fast() -> None:
    passage = ordinary(1, 80)
    copied = play(Speculation(), passage * 6, costs(0.32), prompt=80)
    assert copied[1] >= 1.5 * copied[0]
    for seed in range(5):
        spent_s, plain_s = play(Speculation(), ordinary(seed, 2000), costs(0.32))
        assert plain_s >= spent_s
    chance = random.Random(7)
    lying = [chance.randrange(40) for _ in range(2000)]  # matches without number, and whatever after them
    spent_s, plain_s = play(Speculation(), lying, costs(0.32))
    assert spent_s == pytest.approx(plain_s)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1 << 30), st.floats(0.0, 1.0), st.integers(1, 4), st.integers(1, 40), st.floats(0.0, 1.0))
def test_nothing_that_text_and_machine_do_costs_more_than_the_allowance(
    seed: int, slope: float, answers: int, period: int, fault: float
) -> None:
    """Text that repeats and lies, on machines where verifying costs from one plain step to one for each token."""
    chance = random.Random(seed)
    text = [chance.randrange(50) for _ in range(period)]
    while len(text) < 400:
        text.append(chance.randrange(50) if chance.random() < fault * 0.4 else text[-period])
    spent_s, plain_s = play(Speculation(), text, costs(slope), answers, prompt=period)
    steps = ALLOWANCE_LIMIT_STEPS + (1 + DRAFT_TOKENS) * answers + ALLOWANCE_GROWTH * len(text)
    assert spent_s <= plain_s + steps * PLAIN_S * (1 + 0.5 * (answers - 1))


def test_machine_on_which_verifying_costs_too_much_decodes_and_tries_again_when_it_changes() -> None:
    speculation = Speculation()
    text = ordinary(3, 40) * 100
    spent_s, plain_s = play(speculation, text[:1500], costs(0.95), prompt=40)
    assert spent_s <= 1.02 * plain_s
    spent_s, plain_s = play(speculation, text, costs(0.32), prompt=40)
    assert plain_s >= 1.5 * spent_s
    spent_s, plain_s = play(speculation, text, costs(0.95), prompt=40)
    assert spent_s <= 1.02 * plain_s


def test_plain_steps_that_became_faster_are_noticed_though_every_guess_holds() -> None:
    speculation = Speculation()
    text = ordinary(6, 40) * 100
    play(speculation, text, costs(0.32), prompt=40)
    spent_s, plain_s = play(speculation, text, costs(0.32), prompt=40, one_s=PLAIN_S / 4)
    assert plain_s > 0.7 * spent_s, "it went on at half the speed of plain steps"


def test_several_answers_are_verified_while_that_beats_their_batch() -> None:
    text = ordinary(5, 40) * 40
    for answers, batch, faster in ((2, 0.5, True), (4, 0.5, True), (4, 0.02, False)):
        spent_s, plain_s = play(Speculation(), text, costs(0.32), answers, prompt=40, batch=batch)
        assert (plain_s > 1.15 * spent_s) == faster, (answers, batch)
        assert plain_s > 0.98 * spent_s


def test_answer_that_repeats_nothing_waits_for_nobody() -> None:
    speculation = Speculation()
    play(speculation, ordinary(5, 40) * 20, costs(0.32), prompt=40)
    for _ in range(9):
        speculation.decoded(2, PLAIN_S * 1.5)
    repeats = speculation.drafter([1, 2, 3, 4, 5] * 8, greedy=True)
    assert speculation.plan([Waiting(repeats)]) is not None
    assert speculation.plan([Waiting(repeats), Waiting(repeats)]) is not None
    unlike = speculation.drafter(list(range(40)), greedy=True)
    assert speculation.plan([Waiting(repeats), Waiting(unlike)]) is None
    assert speculation.plan([Waiting(repeats), Waiting(None)]) is None
    assert speculation.plan([Waiting(repeats, 1)]) is None
