"""Which work belongs to which state; total over the states that are no ends."""

from agent.acquire import Admitting, Decoding, Fetching
from agent.activate import Activating, Probing, Soaking, Staged, Undoing
from agent.deployment import Runner
from agent.stage import Stage
from wire.messages import State

_STAGES: dict[State, type[Stage]] = {
    State.ADMITTED: Admitting,
    State.FETCHING: Fetching,
    State.DECODING: Decoding,
    State.PROBING: Probing,
    State.STAGED: Staged,
    State.ACTIVATING: Activating,
    State.SOAKING: Soaking,
}


def new_stage(runner: Runner, *, undoing: bool) -> Stage:
    """The stage for the runner's state."""
    return (Undoing if undoing else _STAGES[runner.row.state])(runner)
