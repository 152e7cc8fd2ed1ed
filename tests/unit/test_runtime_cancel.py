"""Cancelled requests over the real sample model, counted in steps: none begins with one, and reading one ends early."""

import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from engine_requests import Asked, CountedModel, ask, check_greedy, load, load_counted

from runtime.engine import Engine
from runtime.generation import Reason
from runtime.model import PREFILL_TOKENS, Model
from runtime.slab import Shape
from runtime.stats import Stats

CHUNKS = 5
LONG = [(i * 37) % 4000 + 3 for i in range(CHUNKS * PREFILL_TOKENS)]
SHORT = LONG[1:9]


@pytest.fixture(scope="module")
def reference() -> Model:
    return load(1, 1024)


@pytest.fixture
def model() -> CountedModel:
    return load_counted(Shape(3, 1024))


@pytest.fixture
def engine(model: CountedModel) -> Iterator[Engine]:
    engine = Engine("test", model, Stats(), max_queue=4)
    yield engine
    engine.close()


class Cancel:
    """Cancels requests, once, as the n-th step of a kind begins."""

    def __init__(self, engine: Engine, model: CountedModel, step: str, number: int) -> None:
        self._engine, self._model, self._step, self._number = engine, model, step, number
        self._asked: list[Asked] = []
        self._known = threading.Event()
        model.before = self._look

    def what(self, *asked: Asked) -> None:
        self._asked += asked
        self._known.set()

    def _look(self, step: str) -> None:
        if step == self._step and self._model.steps.count(step) == self._number:
            assert self._known.wait(20)
            for one in self._asked:
                self._engine.cancel(one.generation)


def test_prompt_cancelled_while_a_chunk_of_it_is_read_is_cut_within_that_chunk(
    engine: Engine, model: CountedModel, reference: Model
) -> None:
    cancel = Cancel(engine, model, "read", 2)
    one = ask(engine, LONG, 5)
    cancel.what(one)
    assert one.wait().reason is Reason.CANCELLED
    assert (model.steps, model.finished) == (["read", "read"], 1)
    assert engine.stats.snapshot().failures == 0
    after = ask(engine, SHORT, 5)
    assert after.wait().reason is Reason.LENGTH
    check_greedy(reference, SHORT, after.tokens)


def test_prompt_cancelled_while_others_decode_is_not_read_on(engine: Engine, model: CountedModel) -> None:
    running = ask(engine, SHORT, 60)
    assert running.some.wait(20)
    reads = model.steps.count("read")
    joined = ask(engine, LONG, 5)
    decoded = threading.Event()

    def look(step: str) -> None:
        if step == "decode 1" and reads < model.steps.count("read") < reads + CHUNKS and not decoded.is_set():
            engine.cancel(joined.generation)
            decoded.set()
            model.steps.append("cancelled")

    model.before = look
    assert joined.wait().reason is Reason.CANCELLED
    assert running.wait().reason is Reason.LENGTH
    assert "read" not in model.steps[model.steps.index("cancelled") :]


def test_answer_cancelled_during_a_step_is_in_no_other(engine: Engine, model: CountedModel, reference: Model) -> None:
    cancel = Cancel(engine, model, "decode 2", 3)
    one, other = ask(engine, SHORT, 100), ask(engine, SHORT[1:], 100)
    cancel.what(one)
    assert one.wait().reason is Reason.CANCELLED
    assert other.wait().reason is Reason.LENGTH
    assert model.steps.count("decode 2") == 3
    check_greedy(reference, SHORT[1:], other.tokens)


@pytest.mark.parametrize("both", [True, False])
def test_prompts_read_together_are_cut_when_nobody_waits_for_either(
    engine: Engine, model: CountedModel, reference: Model, both: bool
) -> None:
    asked, go_on = threading.Event(), threading.Event()
    busy = [ask(engine, SHORT, 300) for _ in range(3)]
    assert all(one.some.wait(20) for one in busy)
    pair: list[Asked] = []

    def look(step: str) -> None:
        if step == "decode 3":  # all slots are taken: both wait, and find all free at once
            asked.set()
            assert go_on.wait(20)
        elif step == "read together":
            for one in pair if both else pair[:1]:
                engine.cancel(one.generation)

    model.before = look
    assert asked.wait(20)
    pair += [ask(engine, SHORT, 5), ask(engine, [7, *SHORT], 5)]
    for one in busy:
        engine.cancel(one.generation)
    go_on.set()
    assert pair[0].wait().reason is Reason.CANCELLED
    assert pair[1].wait().reason is (Reason.CANCELLED if both else Reason.LENGTH)
    assert len(model.steps) - model.finished == int(both)
    check_greedy(reference, [7, *SHORT], pair[1].tokens)
    assert engine.stats.snapshot().failures == 0


def test_close_cuts_a_prompt_that_is_being_read(model: CountedModel) -> None:
    engine = Engine("closing", model, Stats(), max_queue=4)
    began, go_on = threading.Event(), threading.Event()

    def look(_step: str) -> None:
        began.set()
        assert go_on.wait(20)

    model.before = look
    one = ask(engine, LONG, 5)
    assert began.wait(20)
    closer = threading.Thread(target=engine.close)
    closer.start()
    while not engine._closed:
        pass
    go_on.set()
    closer.join(20)
    assert one.wait().reason is Reason.CANCELLED
    assert (model.steps, model.finished) == (["read"], 0)
