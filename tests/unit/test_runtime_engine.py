"""The engine over the real sample model: what batching may change, and what it may not."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from engine_fixtures import CAPACITY, KEPT, QUEUE, SLOTS, engine_fixture, load, reference_fixture, text_fixture  # noqa: F401  pytest finds them
from engine_requests import TOLERANCE, ask, ask_at_once, check_greedy, load_counted, prompts
from runtime_fixtures import wait_for

from runtime.engine import Engine
from runtime.generation import Deliveries, Reason, deliver_directly
from runtime.model import Model
from runtime.pace import LEAST_TOKENS
from runtime.sampling import Sampling
from runtime.slab import Shape
from runtime.stats import Stats
from runtime.text import Text
from wire.errors import Code, InferenceError


def test_batched_and_chunked_greedy_equals_one_step_after_another(engine: Engine, reference: Model, text: Text) -> None:
    asked = [(prompt, ask(engine, prompt, 20 + 7 * i)) for i, prompt in enumerate(prompts(text))]
    for i, (prompt, one) in enumerate(asked):
        assert one.wait().reason is Reason.LENGTH
        assert len(one.tokens) == 20 + 7 * i
        check_greedy(reference, prompt, one.tokens)


def test_kernels_of_other_batch_sizes_stay_far_below_the_tolerance(reference: Model, text: Text) -> None:
    prompt = text.encode("It was late in the evening when the", special=False)
    batched = load(4)
    for position, token in enumerate(prompt):
        alone = reference.decode([token], [position])[0].copy()
        for row in batched.decode([token] * 4, [position] * 4):
            assert np.abs(row - alone).max() < TOLERANCE / 2 * alone.std()
    prefilled = load(1).prefill(0, prompt, 0)
    assert np.abs(prefilled - alone).max() < TOLERANCE / 2 * alone.std()


def test_request_that_joins_later_leaves_the_running_one_as_it_was(
    engine: Engine, reference: Model, text: Text
) -> None:
    first, second = prompts(text)[1], prompts(text)[3]
    running = ask(engine, first, 200)
    assert running.some.wait(20)
    joined = ask(engine, second, 10)
    assert joined.wait().reason is Reason.LENGTH
    assert running.wait().reason is Reason.LENGTH
    check_greedy(reference, first, running.tokens)
    check_greedy(reference, second, joined.tokens)


def together(engine: Engine) -> set[int]:
    """How many prompts the steps read that read more than one."""
    return {prompts for _, prompts, _ in engine._model._prefillers if prompts > 1}


def test_short_prompts_that_wait_are_read_in_one_step(engine: Engine, reference: Model, text: Text) -> None:
    long = prompts(text)[3]
    short = [long[:30], long[40:73], long[80:112]]
    asked = ask_at_once(engine, short, 20)
    for prompt, one in zip(short, asked, strict=True):
        assert one.wait().reason is Reason.LENGTH
        check_greedy(reference, prompt, one.tokens)
    assert together(engine) == {3}


@pytest.mark.parametrize(
    "cuts", [[(0, 90), (100, 150)], [(0, 60), (70, 75)], [(0, 200), (5, 20)]], ids=["long", "padded", "chunked"]
)
def test_prompts_that_do_not_fit_into_one_step_are_read_one_by_one(
    engine: Engine, reference: Model, text: Text, cuts: list[tuple[int, int]]
) -> None:
    chosen = [prompts(text)[3][start:end] for start, end in cuts]
    for prompt, one in zip(chosen, ask_at_once(engine, chosen, 10), strict=True):
        assert one.wait().reason is Reason.LENGTH
        check_greedy(reference, prompt, one.tokens)
    assert together(engine) == set()


def test_chunks_are_short_while_somebody_waits_for_a_slow_model(
    engine: Engine, reference: Model, text: Text, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks: list[int] = []
    prefill = engine._model.prefill

    def seen(slot: int, tokens: list[int], length: int, **more: Any) -> Any:
        chunks.append(len(tokens))
        engine._pace.note(1, 1.0)
        return prefill(slot, tokens, length, **more)

    monkeypatch.setattr(engine._model, "prefill", seen)
    running = ask(engine, prompts(text)[1], 300)
    assert running.some.wait(20)
    joined = ask(engine, prompts(text)[3], 10)
    assert joined.wait().reason is Reason.LENGTH
    assert running.end is None, "the other was meant to be still running"
    assert chunks == [20, *[LEAST_TOKENS] * 8, 17]
    check_greedy(reference, prompts(text)[3], joined.tokens)


def test_end_token_ends_the_answer_and_is_no_part_of_it(engine: Engine, text: Text) -> None:
    prompt = prompts(text)[1]
    free = ask(engine, prompt, 10)
    free.wait()
    ended = ask(engine, prompt, 10, ends=frozenset([free.tokens[4]]))
    assert ended.wait().reason is Reason.STOP
    assert ended.tokens == free.tokens[: free.tokens.index(free.tokens[4])]


def test_same_seed_at_the_same_load_gives_the_same_answer(engine: Engine, text: Text) -> None:
    sampling = Sampling(temperature=0.9, top_p=0.95, seed=11)
    answers = []
    for _ in range(2):
        one = ask(engine, prompts(text)[1], 30, sampling)
        one.wait()
        answers.append(one.tokens)
    assert answers[0] == answers[1]


def test_cancelled_request_ends_at_once_and_the_others_go_on(engine: Engine, reference: Model, text: Text) -> None:
    all_prompts = prompts(text)
    asked = [ask(engine, prompt, 150) for prompt in all_prompts[:SLOTS]]
    assert all(one.some.wait(20) for one in asked)
    engine.cancel(asked[0].generation)
    assert asked[0].wait().reason is Reason.CANCELLED
    assert len(asked[0].tokens) < 150
    for prompt, one in zip(all_prompts[1:SLOTS], asked[1:], strict=True):
        assert one.wait().reason is Reason.LENGTH
        check_greedy(reference, prompt, one.tokens)
    assert engine.open == 0


def test_full_queue_refuses_with_429_and_a_time_to_come_back(engine: Engine, text: Text) -> None:
    prompt = prompts(text)[1]
    asked = [ask(engine, prompt, 400) for _ in range(SLOTS + QUEUE)]
    with pytest.raises(InferenceError) as refusal:
        ask(engine, prompt, 1)
    assert (refusal.value.code, refusal.value.http_status) == (Code.OVERLOADED, 429)
    assert refusal.value.retry_after_s is not None
    assert refusal.value.retry_after_s >= 1
    for one in asked:
        engine.cancel(one.generation)
    wait_for("an empty engine", lambda: engine.open == 0)
    assert ask(engine, prompt, 1).wait().reason is Reason.LENGTH


def test_request_that_waits_is_cancelled_without_having_run(engine: Engine, text: Text) -> None:
    prompt = prompts(text)[1]
    busy = [ask(engine, prompt, 300) for _ in range(SLOTS)]
    assert all(one.some.wait(20) for one in busy)
    waiting = ask(engine, prompt, 300)
    engine.cancel(waiting.generation)
    assert engine.open <= SLOTS
    for one in busy:
        assert one.wait().reason is Reason.LENGTH
    assert waiting.tokens == []


@pytest.mark.parametrize(
    ("prompt_tokens", "max_tokens", "numbers"),
    [
        (CAPACITY, 1, f"has {CAPACITY} tokens .* at most {CAPACITY - 1}$"),
        (CAPACITY - 9, 10, "max_tokens is 10, .* at most 9,"),
    ],
)
def test_request_that_fits_no_slot_is_a_400_with_all_numbers_and_the_setting(
    engine: Engine, prompt_tokens: int, max_tokens: int, numbers: str
) -> None:
    with pytest.raises(InferenceError, match=numbers) as refusal:
        ask(engine, [5] * prompt_tokens, max_tokens)
    assert f"the context of {CAPACITY} tokens (the model's own)" in refusal.value.message
    assert (refusal.value.code, refusal.value.http_status) == (Code.CONTEXT_EXCEEDED, 400)
    assert engine.open == 0


@pytest.mark.parametrize("token", [-1, 4096, 1 << 40])
def test_token_outside_the_vocabulary_is_refused(engine: Engine, token: int) -> None:
    with pytest.raises(InferenceError, match="vocabulary") as refusal:
        ask(engine, [5, token], 1)
    assert refusal.value.http_status == 400


def test_answer_may_fill_the_context_to_its_last_token(engine: Engine) -> None:
    one = ask(engine, [5] * (CAPACITY - 3), 3)
    assert one.wait().reason is Reason.LENGTH
    assert len(one.tokens) == 3


def test_requests_run_together_only_while_all_that_they_may_become_fits_the_memory(
    reference: Model, text: Text
) -> None:
    model = load_counted(Shape(SLOTS, CAPACITY, KEPT, tokens=600))
    engine = Engine("small", model, Stats(), max_queue=QUEUE)
    prompt = prompts(text)[1]
    for count, together in ((380, 1), (260, 2), (100, 3)):
        model.steps.clear()
        asked = [ask(engine, [number, *prompt], count) for number in range(SLOTS)]
        for number, one in enumerate(asked):
            assert one.wait().reason is Reason.LENGTH
            assert len(one.tokens) == count
            check_greedy(reference, [number, *prompt], one.tokens)
        assert f"decode {together}" in model.steps
        assert f"decode {together + 1}" not in model.steps
    engine.close()


def test_request_cancelled_while_it_waits_for_memory_lets_the_next_one_run(text: Text) -> None:
    engine = Engine("small", load_counted(Shape(SLOTS, CAPACITY, tokens=CAPACITY)), Stats(), max_queue=QUEUE)
    running = ask(engine, prompts(text)[1], 300)
    assert running.some.wait(20)
    waiting, small = ask(engine, prompts(text)[1], 400), ask(engine, prompts(text)[1], 20)
    engine.cancel(waiting.generation)
    assert small.wait().reason is Reason.LENGTH
    assert running.end is None, "the small one was meant to run beside it"
    engine.close()


def test_answer_that_is_wanted_whole_is_handed_out_once_and_streams_beside_it_as_they_come(text: Text) -> None:
    handed_out: list[Deliveries] = []

    def deliver(deliveries: Deliveries) -> None:
        handed_out.append(list(deliveries))
        deliver_directly(deliveries)

    engine = Engine("handing out", load(), Stats(), max_queue=QUEUE, deliver=deliver)
    whole = ask(engine, prompts(text)[1], 20, whole=True)
    stream = ask(engine, prompts(text)[2], 20)
    assert whole.wait().reason is stream.wait().reason is Reason.LENGTH
    engine.close()
    assert len(whole.tokens) == len(stream.tokens) == 20
    told = [[generation for generation, _ in batch] for batch in handed_out]
    counts = [sum(one.generation in batch for batch in told) for one in (whole, stream)]
    assert counts == [1, 20]  # the last token and the end come together


def test_step_that_fails_fails_its_requests_and_the_engine_goes_on(engine: Engine, text: Text) -> None:
    session, engine._model._session = engine._model._session, None
    broken = ask(engine, prompts(text)[1], 5)
    end = broken.wait()
    engine._model._session = session
    assert end.reason is Reason.FAILED
    assert end.error is not None
    assert end.error.code is Code.INTERNAL
    assert engine.stats.snapshot().failures == 1
    assert ask(engine, prompts(text)[1], 3).wait().reason is Reason.LENGTH


def test_close_ends_what_is_open_and_refuses_what_comes(text: Text) -> None:
    engine = Engine("closing", load(), Stats(), max_queue=QUEUE)
    asked = [ask(engine, prompts(text)[1], 400) for _ in range(SLOTS + 1)]
    engine.close()
    assert {one.wait().reason for one in asked} == {Reason.CANCELLED}
    with pytest.raises(InferenceError) as refusal:
        ask(engine, [1], 1)
    assert refusal.value.http_status == 503


def test_counters_add_up(engine: Engine, text: Text) -> None:
    for one in [ask(engine, prompt, 12) for prompt in prompts(text)]:
        one.wait()
    figures = engine.stats.snapshot()
    assert figures.requests == len(prompts(text))
    assert figures.prompt_tokens == sum(map(len, prompts(text)))
    assert figures.completion_tokens == 12 * len(prompts(text))
    assert figures.failures == 0
    assert figures.busy_s > 0
    assert figures.latency_p50_s is not None
    assert figures.first_token_p50_s is not None
    assert figures.first_token_p50_s <= figures.latency_p50_s
    assert figures.tokens_per_s is not None
