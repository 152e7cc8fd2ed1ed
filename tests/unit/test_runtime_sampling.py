"""How a token is drawn from a row of logits."""

import numpy as np
import pytest

from runtime.sampling import CANDIDATES, Sampler, Sampling
from wire.errors import Code, InferenceError

ROW = np.log(np.array([0.5, 0.25, 0.15, 0.07, 0.03], np.float32))


def draws(sampling: Sampling, row: np.ndarray = ROW, count: int = 4000) -> np.ndarray:
    sampler = Sampler(sampling)
    return np.bincount([sampler.draw(row) for _ in range(count)], minlength=row.size) / count


def test_temperature_zero_takes_the_largest() -> None:
    assert draws(Sampling(temperature=0.0), count=10)[0] == 1.0


def test_temperature_one_follows_the_distribution() -> None:
    assert np.allclose(draws(Sampling(seed=1)), [0.5, 0.25, 0.15, 0.07, 0.03], atol=0.03)


def test_low_temperature_sharpens() -> None:
    sharp = np.array([0.5, 0.25, 0.15, 0.07, 0.03]) ** 2
    assert np.allclose(draws(Sampling(temperature=0.5, seed=1)), sharp / sharp.sum(), atol=0.03)


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    assert np.allclose(draws(Sampling(top_p=0.7, seed=1)), [2 / 3, 1 / 3, 0, 0, 0], atol=0.03)


def test_tiny_top_p_is_greedy() -> None:
    assert draws(Sampling(top_p=1e-6, seed=1), count=50)[0] == 1.0


def test_top_k_keeps_k() -> None:
    assert np.allclose(draws(Sampling(top_k=3, seed=1)), np.array([0.5, 0.25, 0.15, 0, 0]) / 0.9, atol=0.03)


def test_top_k_and_top_p_apply_one_after_the_other() -> None:
    assert np.allclose(draws(Sampling(top_k=3, top_p=0.8, seed=1)), [2 / 3, 1 / 3, 0, 0, 0], atol=0.03)


def test_nucleus_of_a_flat_row_goes_beyond_the_first_candidates() -> None:
    row = np.zeros(CANDIDATES * 40, np.float32)
    sampler = Sampler(Sampling(top_p=0.9, seed=1))
    assert len({sampler.draw(row) for _ in range(2000)}) > CANDIDATES


def test_same_seed_draws_the_same_tokens_and_another_seed_others() -> None:
    def run(seed: int) -> list[int]:
        sampler = Sampler(Sampling(seed=seed))
        return [sampler.draw(ROW) for _ in range(50)]

    assert run(7) == run(7)
    assert run(7) != run(8)


def test_penalties_push_down_what_was_said() -> None:
    sampler = Sampler(Sampling(temperature=0.0, frequency_penalty=0.5, presence_penalty=0.3))
    assert [sampler.draw(ROW) for _ in range(3)] == [0, 1, 0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_fail_the_request(temperature: float, bad: float) -> None:
    row = ROW.copy()
    row[3] = bad
    with pytest.raises(InferenceError) as failure:
        Sampler(Sampling(temperature=temperature, seed=1)).draw(row)
    assert failure.value.code is Code.INTERNAL
