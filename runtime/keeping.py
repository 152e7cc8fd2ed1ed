"""Giving a model's memory back while nobody asks for it, and loading it again for whoever does.

What rests keeps its place: it is listed, ready and counted, and its next request waits for the load. Invariant: only
the thread that runs the model calls anything here, so that nothing is given back under a step and the threads of what
is loaded again inherit that thread's cores.
"""

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import structlog

from runtime.memory import trim_heap
from wire.errors import AmperageError, Code, InferenceError

RETRY_S = 5.0

_log = structlog.get_logger(__name__)


class Closable(Protocol):
    """What holds a model's memory."""

    def close(self) -> None:
        """Give it back."""


Kept = TypeVar("Kept", bound=Closable)


@dataclass(slots=True)
class Keeper(Generic[Kept]):
    """The memory of one replica of a model."""

    name: str
    load: Callable[[], Kept]
    keep_s: float
    """How long after the last request it is kept."""
    resting: bool = False

    def rest(self, model: Kept) -> None:
        """Give `model` back."""
        model.close()
        gc.collect()  # bindings of onnxruntime refer to each other in a circle
        trim_heap()
        self.resting = True
        _log.info("model rests until it is asked", model=self.name)

    def wake(self) -> Kept:
        """Load it again. Raises InferenceError(not_ready) with the reason; it can be tried again."""
        try:
            model = self.load()
        except (AmperageError, OSError, MemoryError) as error:
            _log.error("model cannot be loaded again", model=self.name, error=str(error)[:500])
            raise InferenceError(
                Code.NOT_READY, f"{self.name} rested and cannot be loaded again: {error}"[:1000], 503, RETRY_S
            ) from error
        self.resting = False
        _log.info("model is back", model=self.name)
        return model
