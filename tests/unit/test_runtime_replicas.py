"""Several engines as one: requests are spread, stay where they are, and count together."""

import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from runtime_fixtures import base_version, wait_for

from runtime.engine import Engine
from runtime.generation import End, Event, Generation, Reason
from runtime.model import Model
from runtime.replicas import Replicas
from runtime.sampling import Sampling
from runtime.slab import Shape
from runtime.stats import Stats
from wire.serving import ExecutionOptions

GREEDY = Sampling(temperature=0.0)
PROMPT = [int(token) for token in range(100, 140)]


@pytest.fixture
def replicas() -> Iterator[Replicas]:
    version, stats = base_version(), Stats()
    engines = []
    for number in range(2):
        model = Model(version.directory, version.document.config, Shape(2, 512, 32), ExecutionOptions(threads=1))
        engines.append(Engine(f"replica-{number}", model, stats, max_queue=2))
    replicas = Replicas(engines, stats)
    yield replicas
    replicas.close()


class Asked:
    """A request and its end."""

    def __init__(self, replicas: Replicas, prompt: list[int], count: int) -> None:
        self.end: End | None = None
        self._begun, self._ended = threading.Event(), threading.Event()
        self.generation = Generation(prompt, count, GREEDY, self._take)
        replicas.submit(self.generation)

    def begun(self) -> bool:
        """Wait for the first token."""
        return self._begun.wait(20)

    def _take(self, event: Event) -> None:
        self._begun.set()
        if isinstance(event, End):
            self.end = event
            self._ended.set()

    def wait(self) -> Reason:
        assert self._ended.wait(20)
        assert self.end is not None
        return self.end.reason


def test_requests_are_spread_evenly(replicas: Replicas) -> None:
    asked = [Asked(replicas, [number + 5, *PROMPT], 100) for number in range(4)]
    assert [one.generation.replica for one in asked] == [0, 1, 0, 1]
    assert [one.wait() for one in asked] == [Reason.LENGTH] * 4
    assert replicas.stats.snapshot().requests == 4
    assert replicas.stats.snapshot().completion_tokens == 400
    wait_for("no open requests", lambda: replicas.open == 0)


def test_prompt_goes_where_its_beginning_is_kept_unless_others_wait_there(replicas: Replicas) -> None:
    busy = Asked(replicas, [1, *PROMPT], 300)
    first = Asked(replicas, PROMPT, 1)
    first.wait()
    assert first.generation.replica == 1
    assert busy.begun()
    replicas.cancel(busy.generation)
    wait_for("no open requests", lambda: replicas.open == 0)
    again = Asked(replicas, [*PROMPT, 7], 200)
    beside = Asked(replicas, [*PROMPT, 8], 200)
    elsewhere = Asked(replicas, [*PROMPT, 9], 200)
    assert [one.generation.replica for one in (again, beside, elsewhere)] == [1, 0, 1]
    assert [one.wait() for one in (again, beside, elsewhere)] == [Reason.LENGTH] * 3


def test_cancelled_request_ends_in_the_engine_that_has_it(replicas: Replicas) -> None:
    asked = [Asked(replicas, [number + 5, *PROMPT], 400) for number in range(2)]
    assert all(one.begun() for one in asked)
    replicas.cancel(asked[1].generation)
    assert asked[1].wait() is Reason.CANCELLED
    assert asked[0].wait() is Reason.LENGTH
