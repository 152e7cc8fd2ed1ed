"""Requests to an engine over the real sample model, and how their answers are judged."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from runtime_fixtures import SLOWNESS, Version, base_version

from runtime.engine import Engine
from runtime.generation import End, Event, Generation
from runtime.model import PREFILL_TOKENS, Float, Model
from runtime.sampling import Sampling
from runtime.slab import Shape
from runtime.speculation import DRAFT_TOKENS, Answer, Drafter, Speculation
from runtime.text import Text
from wire.serving import ExecutionOptions

Loaded = TypeVar("Loaded", bound=Model)
GREEDY = Sampling(temperature=0.0)
TOLERANCE = 0.05
"""How far, in standard deviations of the row, a token's logit may be below the best of the unbatched step: kernels for
other batch sizes round differently. Measured differences are below 0.01."""


class CountedModel(Model):
    """The real model. `steps` counts those that began; `before` is called as one begins, on the engine's thread."""

    steps: list[str]
    finished: int
    before: Callable[[str], None]

    def decode(self, tokens: list[int], lengths: list[int]) -> Float:
        return self._counted(f"decode {len(tokens)}", lambda: super(CountedModel, self).decode(tokens, lengths))

    def prefill(self, *where: Any, **how: Any) -> Float:
        return self._counted("read", lambda: super(CountedModel, self).prefill(*where, **how))

    def prefill_together(self, *where: Any) -> Float:
        return self._counted("read together", lambda: super(CountedModel, self).prefill_together(*where))

    def verify(self, slot: int, tokens: list[int], length: int) -> Float:
        return self._counted("verify", lambda: super(CountedModel, self).verify(slot, tokens, length))

    def _counted(self, step: str, run: Callable[[], Float]) -> Float:
        self.steps.append(step)
        self.before(step)
        logits = run()
        self.finished += 1
        return logits


def load(slots: int, capacity: int, kept_blocks: int = 0, version: Version | None = None) -> Model:
    return _load(Model, Shape(slots, capacity, kept_blocks), version)


def load_counted(shape: Shape) -> CountedModel:
    model = _load(CountedModel, shape)
    model.steps, model.finished, model.before = [], 0, lambda _step: None
    return model


def _load(kind: type[Loaded], shape: Shape, version: Version | None = None) -> Loaded:
    version = version or base_version()
    return kind(version.directory, version.document.config, shape, ExecutionOptions(threads=1))


class Reckless(Speculation):
    """Has guesses verified whatever they cost, right ones, altered ones and inventions, with plain steps in between."""

    def __init__(self) -> None:
        super().__init__()
        self._number = 0

    def plan(self, running: Sequence[Answer]) -> list[list[int]] | None:
        self._number += 1
        drafts = [self._draft(a.drafter, a.left) for a in running if a.drafter is not None and a.left > 1]
        return drafts if len(drafts) == len(running) and self._number % 5 else None

    def _draft(self, drafter: Drafter, left: int) -> list[int]:
        count = min(1 + self._number % DRAFT_TOKENS, left - 1)
        draft = drafter.draft(count) if drafter.look() else [self._number] * count
        if self._number % 3 == 0:
            draft[self._number % count] = self._number
        return draft


@dataclass(slots=True)
class Asked:
    """One request and what came of it."""

    generation: Generation = field(init=False)
    tokens: list[Any] = field(default_factory=list)
    """Scored ones where log probabilities were asked for."""
    end: End | None = None
    ended: threading.Event = field(default_factory=threading.Event)
    some: threading.Event = field(default_factory=threading.Event)

    def take(self, event: Event) -> None:
        assert self.end is None, "an event after the end"
        if isinstance(event, End):
            self.end = event
            self.ended.set()
        else:
            self.tokens.append(event)
        self.some.set()

    def wait(self) -> End:
        assert self.ended.wait(20 * SLOWNESS)
        assert self.end is not None
        return self.end


def ask(engine: Engine, prompt: list[int], count: int, sampling: Sampling = GREEDY, **more: Any) -> Asked:
    asked = Asked()
    asked.generation = Generation(prompt, count, sampling, asked.take, **more)
    engine.submit(asked.generation)
    return asked


def check_greedy(reference: Model, prompt: list[int], tokens: list[int]) -> None:
    """Every token must be the best of an unbatched, unchunked-by-others step, or as good within the tolerance."""
    for position, token in enumerate(prompt):
        row = reference.decode([token], [position])[0]
    for position, token in enumerate(tokens):
        assert row.max() - row[token] <= TOLERANCE * row.std(), f"token {position} is not what one step gives"
        row = reference.decode([token], [len(prompt) + position])[0]


def prompts(text: Text) -> list[list[int]]:
    """Of one token, within a chunk, exactly a chunk, and over several chunks."""
    long = text.encode(
        "She opened the letter slowly, and read it twice before she spoke to him again. " * 30, special=False
    )
    return [long[:1], long[5:25], long[:PREFILL_TOKENS], long[: 2 * PREFILL_TOKENS + 17], long[3:90]]


def ask_at_once(engine: Engine, all_prompts: list[list[int]], count: int) -> list[Asked]:
    """All of them wait when the engine looks next."""
    with engine._changed:
        return [ask(engine, prompt, count) for prompt in all_prompts]
