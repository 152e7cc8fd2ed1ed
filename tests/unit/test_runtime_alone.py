"""Requests that run alone: the same bits whatever else the engine does. Logits are compared by log probabilities, which
every logit of a row is part of.

The model runs with float activations: onnxruntime's int8 kernels for x86 happen to round alike in every batch size.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from engine_requests import Asked, ask
from runtime_fixtures import base_version

from runtime.engine import Engine
from runtime.generation import Reason
from runtime.model import PREFILL_TOKENS, Model, Shape
from runtime.sampling import Sampling
from runtime.stats import Stats
from runtime.ways import FLOAT_ACTIVATIONS
from wire.serving import ExecutionOptions

SAMPLING = Sampling(temperature=0.9, top_p=0.95, seed=11)
LONG = [(i * 17 + i * i) % 4000 + 3 for i in range(2 * PREFILL_TOKENS + 17)]


def start(shape: Shape) -> Engine:
    version = base_version()
    options = ExecutionOptions(threads=1, session_config=FLOAT_ACTIVATIONS)
    return Engine("alone", Model(version.directory, version.document.config, shape, options), Stats(), max_queue=20)


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = start(Shape(8, 512, 64))
    yield engine
    engine.close()


def crowd(engine: Engine, size: int) -> list[Asked]:
    """Others of all lengths that begin as the one that is watched, and end at different times; some are alone, too."""
    return [
        ask(engine, [*LONG[: 20 + 41 * (i % 6)], 7 + i], 20 + 9 * (i % 5), Sampling(seed=i), alone=i % 3 == 0)
        for i in range(size)
    ]


def watched(engine: Engine, prompt: list[int], others: int, *, alone: bool) -> list[Any]:
    """Scored tokens of one request that comes while others run, and before still others come."""
    before = crowd(engine, others)
    assert all(one.some.wait(20) for one in before[:7])
    one = ask(engine, prompt, 40, SAMPLING, alone=alone, top_logprobs=2)
    after = crowd(engine, others // 2)
    for other in (one, *before, *after):
        assert other.wait().reason is Reason.LENGTH
    assert not alone or one.generation.cached == 0
    return one.tokens


def test_request_that_is_alone_has_the_same_bits_whatever_runs_beside_it(engine: Engine) -> None:
    quiet = watched(engine, LONG, 0, alone=True)
    for others in (0, 12):
        assert watched(engine, LONG, others, alone=True) == quiet
    assert watched(engine, LONG, 12, alone=False) != quiet, "a crowd changes no bit: this proves nothing"


def test_short_prompt_that_is_alone_is_not_read_with_others() -> None:
    engine = start(Shape(8, 128))
    quiet = watched(engine, LONG[:1], 0, alone=True)
    for alone in (True, False):
        with engine._changed:  # they all wait when the engine looks next
            others = [ask(engine, LONG[9 + i : 10 + i], 20) for i in range(2)]
            one = ask(engine, LONG[:1], 40, SAMPLING, alone=alone, top_logprobs=2)
        for other in (one, *others):
            assert other.wait().reason is Reason.LENGTH
        together = {prompts for _, prompts, _ in engine._model._prefillers}
        assert together == ({1, 2} if alone else {1, 2, 3}), "what was meant to be read together was not"
        assert (one.tokens == quiet) is alone
    engine.close()


def test_step_of_one_that_is_alone_fails_it_and_nothing_else(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    plain = ask(engine, LONG[:20], 200)
    assert plain.some.wait(20)
    prefill = engine._model.prefill

    def fail_alone(slot: int, tokens: list[int], length: int, **more: Any) -> Any:
        if more.get("wide") is False:
            raise RuntimeError("broken")
        return prefill(slot, tokens, length, **more)

    monkeypatch.setattr(engine._model, "prefill", fail_alone)
    assert ask(engine, LONG[:20], 5, alone=True).wait().reason is Reason.FAILED
    assert plain.wait().reason is Reason.LENGTH
    assert len(plain.tokens) == 200
