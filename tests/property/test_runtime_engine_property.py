"""Requests that come and go in any order: each gets what it would have got alone, and every slot comes back."""

import sys
import threading
from functools import cache
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1]))

from engine_requests import Reckless
from runtime_fixtures import base_version

from runtime.engine import Engine
from runtime.generation import End, Event, Generation, Reason
from runtime.model import Model
from runtime.sampling import Sampling
from runtime.slab import Shape
from runtime.speculation import DRAFT_TOKENS
from runtime.stats import Stats
from wire.serving import ExecutionOptions

TOLERANCE = 0.05
"""As in tests/unit/test_runtime_engine.py."""


@cache
def load(slots: int, kept_blocks: int = 0) -> Model:
    version = base_version()
    shape = Shape(slots, 256, kept_blocks)
    return Model(version.directory, version.document.config, shape, ExecutionOptions(threads=1))


class Plan:
    """A request that ends by itself after `count` tokens, or is cancelled by its own sink after `cancel_at`; its prompt
    is everybody's for the first `shared` tokens."""

    def __init__(
        self, engine: Engine, seed: int, size: int, count: int, cancel_at: int | None, shared: int
    ) -> None:  # fmt: skip
        self.prompt = [((i >= shared) * (seed + 1) * 131 + i * 17) % 4000 + 3 for i in range(size)]
        self.count, self.cancel_at = count, cancel_at
        self.tokens: list[int] = []
        self.end: End | None = None
        self.ended = threading.Event()
        self.engine = engine
        self.generation = Generation(self.prompt, count, Sampling(temperature=0.0), self.take)

    def take(self, event: Event) -> None:
        if isinstance(event, End):
            self.end = event
            self.ended.set()
            return
        self.tokens.append(event)
        if len(self.tokens) == self.cancel_at:
            self.engine.cancel(self.generation)


def check(plan: Plan) -> None:
    """Token by token against an unbatched model."""
    alone = load(1)
    for position, token in enumerate(plan.prompt):
        row = alone.decode([token], [position])[0]
    for position, token in enumerate(plan.tokens):
        assert row.max() - row[token] <= TOLERANCE * row.std()
        row = alone.decode([token], [len(plan.prompt) + position])[0]


@settings(max_examples=12, deadline=None)
@given(
    st.integers(1, 4),
    st.sampled_from([0, 2, 9, 200]),
    st.booleans(),
    st.lists(
        st.tuples(st.integers(1, 150), st.integers(1, 25), st.none() | st.integers(1, 25), st.integers(0, 150)),
        min_size=1, max_size=9,
    ),
)  # fmt: skip
def test_any_mixture_of_requests_gets_what_each_gets_alone(
    slots: int, kept_blocks: int, drafts: bool, shapes: list[tuple[int, int, int | None, int]]
) -> None:
    speculation = Reckless() if drafts else None
    engine = Engine("property", load(slots, kept_blocks), Stats(), max_queue=10, speculation=speculation)
    engine._model.close = lambda: None  # type: ignore[method-assign]  # the model is used by the next example too
    plans = [Plan(engine, i, *shape) for i, shape in enumerate(shapes)]
    for plan in plans:
        engine.submit(plan.generation)
    for plan in plans:
        assert plan.ended.wait(20)
        assert plan.end is not None
        last = plan.count if plan.cancel_at is None else min(plan.count, plan.cancel_at)
        more = DRAFT_TOKENS if drafts else 0  # tokens of the step in which it is cancelled
        assert last <= len(plan.tokens) <= min(plan.count, last + more)
        assert plan.end.reason is (Reason.LENGTH if len(plan.tokens) == plan.count else Reason.CANCELLED)
    engine.close()
    assert engine.open == 0
    for plan in plans:
        check(plan)
