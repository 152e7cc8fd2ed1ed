"""The lifecycle's tables: total, closed, and without a state that can last for ever."""

import pytest

from agent.lifecycle import (
    BOUNDS,
    DEADLINES_S,
    RESUME,
    TRANSITIONS,
    Outcome,
    Resume,
    is_end,
    serves_candidate,
    step,
)
from wire.errors import Code, DeployError
from wire.messages import State

ENDS = {State.COMMITTED, State.ROLLED_BACK, State.FAILED, State.CANCELLED}


def test_every_table_is_total_over_the_states():
    for table in (TRANSITIONS, RESUME, BOUNDS, DEADLINES_S):
        assert set(table) == set(State)


@pytest.mark.parametrize("state", list(State))
def test_every_state_that_is_no_end_can_fail_and_be_cancelled_and_is_bounded(state):
    if state in ENDS:
        assert is_end(state)
        assert RESUME[state] is Resume.KEEP
        return
    assert step(state, Outcome.FAILED) in ENDS
    assert step(state, Outcome.CANCELLED) in ENDS
    assert BOUNDS[state].deadline_s > 0
    assert BOUNDS[state].attempts > 0
    assert RESUME[state] is not Resume.KEEP


def test_way_to_committed_is_the_one_of_the_design():
    state = State.ADMITTED
    way = [state]
    for outcome in (
        Outcome.CLEARED, Outcome.FETCHED, Outcome.DECODED, Outcome.PROVED, Outcome.ORDERED, Outcome.ACTIVATED,
        Outcome.SOAKED,
    ):  # fmt: skip
        state = step(state, outcome)
        way.append(state)
    assert way == [
        State.ADMITTED, State.FETCHING, State.DECODING, State.PROBING, State.STAGED, State.ACTIVATING, State.SOAKING,
        State.COMMITTED,
    ]  # fmt: skip


def test_what_may_serve_already_is_rolled_back_and_never_simply_failed():
    for state in State:
        if serves_candidate(state):
            assert set(TRANSITIONS[state].values()) & {State.FAILED, State.CANCELLED} == set()
            assert step(state, Outcome.FAILED) is State.ROLLED_BACK


@pytest.mark.parametrize(
    ("state", "outcome"),
    [(state, outcome) for state in State for outcome in Outcome if outcome not in TRANSITIONS[state]],
)
def test_illegal_step_raises(state, outcome):
    with pytest.raises(DeployError) as caught:
        step(state, outcome)
    assert caught.value.code is Code.ILLEGAL_TRANSITION


def test_every_state_is_reached_from_admitted():
    reached, pending = set(), [State.ADMITTED]
    while pending:
        state = pending.pop()
        if state not in reached:
            reached.add(state)
            pending += TRANSITIONS[state].values()
    assert reached == set(State)
