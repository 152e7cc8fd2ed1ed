"""Drafts in the engine over the real sample model: they may change when tokens come, never which."""

import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from engine_requests import GREEDY, TOLERANCE, Reckless, ask, check_greedy, load, load_counted
from runtime_fixtures import base_version, wait_for

from runtime.engine import Engine
from runtime.generation import Reason
from runtime.model import Float, Model
from runtime.sampling import COLUMNS, Sampling
from runtime.slab import Shape
from runtime.slots import READ_ANEW
from runtime.speculation import DRAFT_TOKENS, Answer, Speculation
from runtime.stats import Stats
from runtime.text import Text
from wire.errors import Code

SLOTS, CAPACITY = 3, 512
BEGINNINGS = (
    "It was late in the evening when the", "Once upon a time there was a king who",
    "She opened the letter slowly, and read it twice before",
)  # fmt: skip
"""The sample LM goes on from each for a sentence or two and then repeats itself."""


class Knowing(Speculation):
    """Drafts what an answer is known to become; its drafts are right to the last token."""

    def __init__(self, text: Sequence[int]) -> None:
        super().__init__()
        self._text = list(text)

    def plan(self, running: Sequence[Answer]) -> list[list[int]] | None:
        (answer,) = running
        if answer.drafter is None:
            return None
        answer.drafter.look()
        at = answer.drafter._length
        return [self._text[at : at + min(DRAFT_TOKENS, answer.left - 1)]]


class Clocked(Speculation):
    """Decides as ever, on steps that take what they took once on two quiet x86 cores, and adds them up."""

    def __init__(self) -> None:
        super().__init__()
        self.spent_s = 0.0

    def decoded(self, answers: int, span_s: float) -> None:
        self._spend(0.5 + 0.5 * answers)
        super().decoded(answers, 0.5 + 0.5 * answers)

    def verified(self, answers: int, size: int, given: int, span_s: float) -> None:
        self._spend(0.68 + 0.32 * size)
        super().verified(answers, size, given, 0.68 + 0.32 * size)

    def _spend(self, span_s: float) -> None:
        self.spent_s += span_s


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    text = Text(base_version().directory, base_version().document.config)
    return [text.encode(beginning, special=True) for beginning in BEGINNINGS]


@pytest.fixture(scope="module")
def reference() -> Model:
    return load(1, CAPACITY)


def engine_with(speculation: Speculation | None, kept_blocks: int = 0) -> Engine:
    return Engine("test", load(SLOTS, CAPACITY, kept_blocks), Stats(), max_queue=4, speculation=speculation)


@pytest.fixture
def reckless() -> Iterator[Engine]:
    engine = engine_with(Reckless(), kept_blocks=64)
    yield engine
    engine.close()


def rows(reference: Model, prompt: list[int], tokens: list[int]) -> Iterator[tuple[int, Float]]:
    """Each token of an answer, and the logits by which a plain step would have drawn it."""
    for position, token in enumerate(prompt):
        row = reference.decode([token], [position])[0].copy()
    for position, token in enumerate(tokens):
        yield token, row
        row = reference.decode([token], [len(prompt) + position])[0].copy()


def drafted(engine: Engine) -> tuple[int, int]:
    figures = engine.stats.snapshot()
    return figures.drafted_tokens, figures.accepted_tokens


def test_rows_of_a_draft_are_those_of_plain_steps_and_what_is_taken_back_is_forgotten(
    reference: Model, prompts: list[list[int]]
) -> None:
    prompt, tokens = prompts[0], prompts[1][:6]
    model = load(2, CAPACITY)
    model.prefill(1, prompt, 0)
    for _ in range(2):  # the second time over what the first has left behind
        verified = model.verify(1, tokens, len(prompt)).copy()
        assert verified.shape == (len(tokens), model.config.vocab_size)
        for got, (_, expected) in zip(verified, rows(reference, [*prompt, tokens[0]], [*tokens[1:], 5]), strict=True):
            assert np.abs(got - expected).max() < TOLERANCE / 2 * expected.std()
        assert np.abs(verified[0] - verified[1]).max() > verified[0].std(), "rows of one token alone prove nothing"
        model.verify(1, [9] * (1 + DRAFT_TOKENS), len(prompt))


@pytest.mark.parametrize("answers", [1, SLOTS])
def test_drafts_right_altered_and_invented_change_no_greedy_answer(
    reckless: Engine, reference: Model, prompts: list[list[int]], answers: int
) -> None:
    asked = [ask(reckless, prompt, 90 + 30 * i) for i, prompt in enumerate(prompts[:answers])]
    for i, (prompt, one) in enumerate(zip(prompts, asked, strict=False)):
        assert one.wait().reason is Reason.LENGTH
        assert len(one.tokens) == 90 + 30 * i
        check_greedy(reference, prompt, one.tokens)
    made, accepted = drafted(reckless)
    assert 40 < accepted < made - 40
    assert reckless.stats.snapshot().completion_tokens == sum(len(one.tokens) for one in asked)


def test_drafts_change_no_sampled_answer(reckless: Engine, reference: Model, prompts: list[list[int]]) -> None:
    """Every token is the one that its own random number picks from the plain row; a number this near to a border
    between two tokens may pick the other."""
    near, temperature = 0.04, 0.25
    order = np.arange(reference.config.vocab_size).reshape(-1, COLUMNS).T.ravel()  # in which shares are added up
    for seed, prompt in enumerate(prompts):
        one = ask(reckless, prompt, 120, Sampling(temperature=temperature, seed=seed))
        one.wait()
        chance = np.random.default_rng(seed)
        for token, row in rows(reference, prompt, one.tokens):
            weights = np.exp((row - row.max()).astype(np.float64) / temperature)
            upper = np.empty_like(weights)
            upper[order] = np.cumsum(weights[order]) / weights.sum()
            lower = upper[token] - weights[token] / weights.sum()
            assert lower - near <= chance.random() <= upper[token] + near
    assert drafted(reckless)[1] > 20


def test_penalties_count_accepted_tokens_one_by_one(
    reckless: Engine, reference: Model, prompts: list[list[int]]
) -> None:
    one = ask(reckless, prompts[0], 120, Sampling(temperature=0.0, frequency_penalty=0.3, presence_penalty=0.2))
    one.wait()
    counts = np.zeros(reference.config.vocab_size, np.float32)
    for token, row in rows(reference, prompts[0], one.tokens):
        row -= 0.3 * counts + 0.2 * (counts > 0)
        assert row.max() - row[token] <= TOLERANCE * row.std()
        counts[token] += 1
    assert drafted(reckless)[1] > 5


@pytest.fixture(scope="module")
def known(prompts: list[list[int]]) -> list[int]:
    """An answer to the first prompt that comes again when it is drafted. Where two tokens are nearly as good, kernels
    for drafts may choose another than those for plain steps, so that it takes a few trials."""
    text: list[int] = []
    for _ in range(20):
        engine = engine_with(Knowing([*prompts[0], *text]) if text else None)
        one = ask(engine, prompts[0], 60)
        one.wait()
        engine.close()
        if one.tokens == text:
            return text
        text = one.tokens
    raise AssertionError("the same draft leads to another answer every time")


def test_right_draft_is_taken_whole(prompts: list[list[int]], known: list[int]) -> None:
    model = load_counted(Shape(1, CAPACITY, kept_blocks=64))
    engine = Engine("test", model, Stats(), max_queue=4, speculation=Knowing([*prompts[0], *known]))
    one = ask(engine, prompts[0], 60)
    one.wait()
    assert one.tokens == known
    steps = -(-59 // (1 + DRAFT_TOKENS))
    assert model.steps.count("verify") == steps
    assert "decode" not in model.steps
    assert drafted(engine) == (59 - steps, 59 - steps)
    again = ask(engine, [*prompts[0], *known], 1)
    again.wait()
    assert again.generation.cached == len(prompts[0]) + len(known) - READ_ANEW
    engine.close()


def test_end_token_within_a_right_draft_ends_the_answer_there(prompts: list[list[int]], known: list[int]) -> None:
    for at in (1, 4, 8, 9):
        engine = engine_with(Knowing([*prompts[0], *known]))
        first = known.index(known[at])
        one = ask(engine, prompts[0], 60, ends=frozenset([known[at]]))
        assert one.wait().reason is Reason.STOP
        assert one.tokens == known[:first]
        wait_for("an empty engine", lambda engine=engine: engine.open == 0)
        engine.close()


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 10])
def test_answer_is_as_long_as_it_may_be_within_a_right_draft(
    prompts: list[list[int]], known: list[int], reference: Model, count: int
) -> None:
    engine = engine_with(Knowing([*prompts[0], *known]))
    one = ask(engine, prompts[0], count)
    assert one.wait().reason is Reason.LENGTH
    assert len(one.tokens) == count
    check_greedy(reference, prompts[0], one.tokens)
    engine.close()


def test_drafts_stop_where_the_context_ends(reckless: Engine, reference: Model) -> None:
    prompt = [5, 6, 7] * 166
    one = ask(reckless, prompt, CAPACITY - len(prompt))
    assert one.wait().reason is Reason.LENGTH
    assert len(one.tokens) == CAPACITY - len(prompt)
    check_greedy(reference, prompt, one.tokens)


def test_only_accepted_tokens_are_kept_for_the_next_request(
    reckless: Engine, reference: Model, prompts: list[list[int]]
) -> None:
    prompt = prompts[1]
    first = ask(reckless, prompt, 70)
    first.wait()
    going_on = [*prompt, *first.tokens, *prompt]
    second = ask(reckless, going_on, 20)
    second.wait()
    assert second.generation.cached == len(prompt) + 70 - 1
    check_greedy(reference, going_on, second.tokens)
    assert drafted(reckless)[0] > drafted(reckless)[1] > 0


def test_request_that_is_alone_gets_no_drafts_and_neither_does_what_runs_beside_it(
    reckless: Engine, reference: Model, prompts: list[list[int]]
) -> None:
    alone = ask(reckless, prompts[0], 60, alone=True)
    alone.wait()
    assert drafted(reckless) == (0, 0)
    beside = ask(reckless, prompts[1], 60)
    alone = ask(reckless, prompts[0], 60, alone=True)
    alone.wait()
    beside.wait()
    check_greedy(reference, prompts[0], alone.tokens)
    check_greedy(reference, prompts[1], beside.tokens)


def test_draft_that_fails_fails_its_request_and_the_engine_goes_on(prompts: list[list[int]], reference: Model) -> None:
    model = load_counted(Shape(SLOTS, CAPACITY))
    engine = Engine("test", model, Stats(), max_queue=4, speculation=Reckless())

    def fail_once(step: str) -> None:
        if step == "verify" and model.steps.count("verify") == 2:
            raise RuntimeError("broken on purpose")

    model.before = fail_once
    first, second = ask(engine, prompts[0], 40), ask(engine, prompts[1], 40)
    ends = [first.wait(), second.wait()]
    assert sorted(end.reason for end in ends) == [Reason.FAILED, Reason.LENGTH]
    assert next(end.error for end in ends if end.error).code is Code.INTERNAL
    for one, prompt in ((first, prompts[0]), (second, prompts[1])):
        check_greedy(reference, prompt, one.tokens)
    assert engine.stats.snapshot().failures == 1
    assert ask(engine, prompts[2], 30).wait().reason is Reason.LENGTH
    engine.close()


def test_answer_cancelled_while_another_is_verified_is_not_verified_any_more(
    prompts: list[list[int]], reference: Model
) -> None:
    model = load_counted(Shape(SLOTS, CAPACITY))
    engine = Engine("test", model, Stats(), max_queue=4, speculation=Reckless())
    begun, known = threading.Event(), threading.Event()
    seen: list[int] = []

    def cancel_second(step: str) -> None:
        if step == "verify" and len(engine._slots.running) == 2 and not seen:
            begun.set()
            assert known.wait(20)
            engine.cancel(second.generation)
            seen.append(len(second.generation.tokens))

    model.before = cancel_second
    first, second = ask(engine, prompts[0], 60), ask(engine, prompts[1], 60)
    assert begun.wait(20)
    known.set()
    assert second.wait().reason is Reason.CANCELLED
    assert first.wait().reason is Reason.LENGTH
    assert seen == [len(second.generation.tokens)]
    check_greedy(reference, prompts[0], first.tokens)
    engine.close()


def test_answers_that_repeat_themselves_take_less_time_and_others_no_more(
    reference: Model, prompts: list[list[int]]
) -> None:
    """By the steps that the real speculation chooses, on a clock of our own: the machine that tests is too noisy."""
    clock = Clocked()
    engine = engine_with(clock)
    for prompt in prompts:
        one = ask(engine, prompt, 200)
        one.wait()
        check_greedy(reference, prompt, one.tokens)
    assert 1.5 * clock.spent_s < 3 * 199
    before_s = clock.spent_s
    for seed, prompt in enumerate(prompts):
        ask(engine, prompt, 200, Sampling(temperature=1.0, seed=seed)).wait()
    assert 0.98 * (clock.spent_s - before_s) < 3 * 199
    engine.close()


def test_setting_off_means_that_nothing_is_drafted(prompts: list[list[int]]) -> None:
    engine = engine_with(None)
    asked = [ask(engine, prompts[0], 60, GREEDY) for _ in range(2)]
    assert {one.wait().reason for one in asked} == {Reason.LENGTH}
    assert drafted(engine) == (0, 0)
    assert asked[0].generation.drafter is None
    engine.close()
