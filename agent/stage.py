"""What the work of one lifecycle state looks like to the runner; the states themselves are acquire.py and activate.py.

Invariant: `start` may be called again at any time (a retry, a restarted agent) and does the work of the state from
where disk and journal are; blocking calls run as work, and a stage that was left gets no more results.
"""

from agent.deployment import Runner
from agent.lifecycle import BOUNDS
from agent.reporting import Progress
from wire.errors import AmperageError, Code, DeployError


class Stage:
    """The work of one state; what a state has no use for does nothing."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.ports = runner.ports

    def start(self) -> None:
        """Begin, or begin again."""

    def on_result(self, result: object) -> None:
        """The work that `start` or `tick` began has returned."""

    def on_error(self, error: AmperageError) -> bool:
        """The work failed; True when the stage deals with it."""
        del error
        return False

    def on_document(self, digest: str, payload: bytes) -> None:
        """A retained document arrived."""

    def on_frame(self, message: object) -> None:
        """The bulk connection's port delivered."""

    def tick(self) -> None:
        """Called several times a second."""

    def overdue(self, trouble: AmperageError | None) -> None:
        """The deadline passed; `trouble` is the last fault that was worth a retry."""
        state = self.runner.row.state
        last = f"; last: {trouble.message}" if trouble else ""
        raise DeployError(
            Code.DEADLINE_PASSED, f"no outcome in state {state} in time; the {BOUNDS[state].owner} had to act{last}"
        )

    def close(self) -> None:
        """The state is left."""

    def progress(self) -> Progress | None:
        """Frames, while there is a fetch."""
        return None
