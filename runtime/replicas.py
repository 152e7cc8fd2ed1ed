"""The engines of one version, one for each group of cores, which requests see as one.

Invariants: a request stays with its engine; all engines count into the same counters.
"""

from collections.abc import Sequence

from runtime.engine import Engine
from runtime.generation import Generation, Reason
from runtime.slab import Usage
from runtime.stats import Stats


class Replicas:
    """At least one engine of the same model."""

    def __init__(self, engines: Sequence[Engine], stats: Stats) -> None:
        self._engines = tuple(engines)
        self.stats = stats

    @property
    def open(self) -> int:
        """Requests that wait, are read or run."""
        return sum(engine.open for engine in self._engines)

    @property
    def usage(self) -> Usage:
        """Memory for keys and values of all."""
        return sum((engine.usage for engine in self._engines), Usage())

    def submit(self, generation: Generation) -> None:
        """Give a request to the engine with the fewest; one that knows its beginning may have one more than another.

        Raises InferenceError as Engine.submit does.
        """
        loads = [engine.open - engine.knows(generation.prompt) for engine in self._engines]
        generation.replica = loads.index(min(loads))
        self._engines[generation.replica].submit(generation)

    def cancel(self, generation: Generation, reason: Reason = Reason.CANCELLED) -> None:
        """As Engine.cancel."""
        self._engines[generation.replica].cancel(generation, reason)

    def close(self) -> None:
        """As Engine.close, one after the other."""
        for engine in self._engines:
            engine.close()
