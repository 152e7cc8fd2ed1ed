"""A step that reads is as long as waiting answers can bear, and no shorter than kernels make sense."""

import pytest

from runtime.model import PREFILL_TOKENS
from runtime.pace import LEAST_TOKENS, PAUSE_S, Pace


def paced(tokens_per_s: float) -> Pace:
    pace = Pace()
    for _ in range(40):
        pace.note(64, 64 / tokens_per_s)
    return pace


def test_unknown_model_gets_whole_chunks() -> None:
    assert Pace().tokens() == PREFILL_TOKENS


@pytest.mark.parametrize(
    ("tokens_per_s", "tokens"),
    [(10_000, PREFILL_TOKENS), (100 / PAUSE_S, 96), (50 / PAUSE_S, 48), (1, LEAST_TOKENS)],
)
def test_chunk_is_what_fits_into_the_pause(tokens_per_s: float, tokens: int) -> None:
    assert paced(tokens_per_s).tokens() == tokens


def test_one_slow_step_does_not_change_everything() -> None:
    pace = paced(1000)
    pace.note(64, 64 / 500)
    assert pace.tokens() == PREFILL_TOKENS
