"""What came of a request that a thread of the runtime works on."""

import threading
from dataclasses import dataclass, field

from wire.errors import InferenceError

WAIT_S = 20


@dataclass(slots=True)
class Outcome:
    """The one event that ends a request; `take` is its sink."""

    error: InferenceError | None = None
    ended: threading.Event = field(default_factory=threading.Event)

    def take(self, error: InferenceError | None) -> None:
        """Once."""
        assert not self.ended.is_set(), "an event after the end"
        self.error = error
        self.ended.set()

    def succeed(self) -> None:
        """Wait for the end, which must be a good one."""
        assert self.ended.wait(WAIT_S)
        assert self.error is None, self.error

    def fault(self) -> InferenceError:
        """Wait for the end, which must be an error."""
        assert self.ended.wait(WAIT_S)
        assert self.error is not None
        return self.error
