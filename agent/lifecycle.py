"""The lifecycle of a release on a node: one literal table, pure, no I/O and no clock.

Invariant: a state changes only through `step`, an illegal step raises and changes nothing, and every state that is not
an end has an owner, a deadline, a bound on attempts and a rule for what a crash in it means. The drawing in
docs/design.md section 5 and the table below are the same thing.
"""

from dataclasses import dataclass
from enum import StrEnum

from wire.errors import Code, DeployError
from wire.messages import State


class Outcome(StrEnum):
    """What happened to a release in its present state."""

    CLEARED = "cleared"
    """Signature, manifest and pre-flight are right; the artifact has to be fetched."""
    FOUND = "found"
    """The decoded version is on the node already."""
    SERVING = "serving"
    """The version serves already."""
    FETCHED = "fetched"
    DECODED = "decoded"
    DAMAGED = "damaged"
    """Staged bytes no longer match their hashes: the disk changed them; those frames are fetched again."""
    PROVED = "proved"
    ORDERED = "ordered"
    """Nothing stands against activating now."""
    ACTIVATED = "activated"
    SOAKED = "soaked"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Owner(StrEnum):
    """Who has to make progress in a state, for whoever asks why nothing moves."""

    AGENT = "agent"
    DEPOT = "depot"
    DECODER = "decoder"
    RUNTIME = "runtime"
    NOBODY = "nobody"


_BEFORE_SERVING = {Outcome.FAILED: State.FAILED, Outcome.CANCELLED: State.CANCELLED}
_WHILE_SERVING = {Outcome.FAILED: State.ROLLED_BACK, Outcome.CANCELLED: State.ROLLED_BACK}

TRANSITIONS: dict[State, dict[Outcome, State]] = {
    State.ADMITTED: {
        Outcome.CLEARED: State.FETCHING,
        Outcome.FOUND: State.PROBING,
        Outcome.SERVING: State.COMMITTED,
        **_BEFORE_SERVING,
    },
    State.FETCHING: {Outcome.FETCHED: State.DECODING, **_BEFORE_SERVING},
    State.DECODING: {Outcome.DECODED: State.PROBING, Outcome.DAMAGED: State.FETCHING, **_BEFORE_SERVING},
    State.PROBING: {Outcome.PROVED: State.STAGED, **_BEFORE_SERVING},
    State.STAGED: {Outcome.ORDERED: State.ACTIVATING, **_BEFORE_SERVING},
    State.ACTIVATING: {Outcome.ACTIVATED: State.SOAKING, **_WHILE_SERVING},
    State.SOAKING: {Outcome.SOAKED: State.COMMITTED, **_WHILE_SERVING},
    State.COMMITTED: {},
    State.ROLLED_BACK: {},
    State.FAILED: {},
    State.CANCELLED: {},
}


class Resume(StrEnum):
    """What a restarted agent does with a release that it finds in a state."""

    REPEAT = "repeat"
    """Do the state's work again: it is idempotent, or its half-done output is discarded first."""
    CONTINUE = "continue"
    """Go on where the journal says."""
    KEEP = "keep"
    """An end stays an end."""


RESUME: dict[State, Resume] = {
    State.ADMITTED: Resume.REPEAT,  # nothing was written but a manifest, which is written again
    State.FETCHING: Resume.CONTINUE,  # journalled frames are on the disk and are not fetched again
    State.DECODING: Resume.REPEAT,  # the half-decoded directory lies in work/, which was emptied
    State.PROBING: Resume.REPEAT,  # a probe changes nothing
    State.STAGED: Resume.REPEAT,
    State.ACTIVATING: Resume.REPEAT,  # serving.json holds the old or the new version whole; write and nudge again
    State.SOAKING: Resume.REPEAT,  # the soak counts from its beginning: nobody watched in between
    State.COMMITTED: Resume.KEEP,
    State.ROLLED_BACK: Resume.KEEP,
    State.FAILED: Resume.KEEP,
    State.CANCELLED: Resume.KEEP,
}


@dataclass(frozen=True, slots=True)
class Bound:
    """How long one attempt in a state may take, how many attempts there are, and whose task it is."""

    deadline_s: float
    attempts: int
    owner: Owner


BOUNDS: dict[State, Bound] = {
    State.ADMITTED: Bound(300.0, 50, Owner.AGENT),
    State.FETCHING: Bound(24 * 3600.0, 200, Owner.DEPOT),
    State.DECODING: Bound(1800.0, 5, Owner.DECODER),
    State.PROBING: Bound(600.0, 5, Owner.RUNTIME),
    State.STAGED: Bound(60.0, 50, Owner.AGENT),
    State.ACTIVATING: Bound(300.0, 10, Owner.RUNTIME),
    State.SOAKING: Bound(3600.0, 20, Owner.RUNTIME),
    State.COMMITTED: Bound(0.0, 0, Owner.NOBODY),
    State.ROLLED_BACK: Bound(0.0, 0, Owner.NOBODY),
    State.FAILED: Bound(0.0, 0, Owner.NOBODY),
    State.CANCELLED: Bound(0.0, 0, Owner.NOBODY),
}
"""Seconds per attempt; a restart of the agent begins a new attempt. Settings may change a deadline."""

DEADLINES_S: dict[State, float] = {state: bound.deadline_s for state, bound in BOUNDS.items()}


def is_end(state: State) -> bool:
    """True when nothing leads out of `state`."""
    return not TRANSITIONS[state]


def serves_candidate(state: State) -> bool:
    """True in the states in which serving.json may name the candidate, so that leaving needs the old file put back."""
    return state in (State.ACTIVATING, State.SOAKING)


def step(state: State, outcome: Outcome) -> State:
    """The state after `outcome`; raises DeployError(illegal_transition)."""
    after = TRANSITIONS[state].get(outcome)
    if after is None:
        raise DeployError(
            Code.ILLEGAL_TRANSITION, f"{outcome} cannot happen in state {state}; this is a defect of the agent"
        )
    return after
