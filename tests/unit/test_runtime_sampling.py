"""How a token is drawn from a row of logits, beside a plain computation of what it should be."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from runtime.sampling import COLUMNS, FIRST_TAIL, FOLDED_FROM, Sampler, Sampling, score
from wire.errors import Code, InferenceError

ROW = np.log(np.array([0.5, 0.25, 0.15, 0.07, 0.03], np.float32))
LONG = FOLDED_FROM + COLUMNS + 77
"""A vocabulary that is folded and leaves a rest."""
DRAWS = 6_000


def penalised(row: NDArray[np.float32], s: Sampling, prompt: list[int], answer: list[int]) -> NDArray[np.float64]:
    """The logits that are drawn from, token by token as the module's docstring says."""
    logits = row.astype(np.float64)
    for token, bias in s.logit_bias:
        logits[token] += bias
    for token in {*prompt, *answer}:
        logits[token] *= 1 / s.repetition_penalty if logits[token] > 0 else s.repetition_penalty
    for token in answer:
        logits[token] -= s.frequency_penalty
    for token in set(answer):
        logits[token] -= s.presence_penalty
    return logits


def exact(logits: NDArray[np.float64], s: Sampling) -> NDArray[np.float64]:
    """The distribution that temperature, min_p, top_k and top_p leave, by sorting and adding up everything."""
    shares = np.exp((logits - logits.max()) / s.temperature)
    shares[shares < s.min_p * shares.max()] = 0
    if s.top_k:
        shares[shares < np.sort(shares)[::-1][min(s.top_k, shares.size) - 1]] = 0
    shares /= shares.sum()
    order = np.argsort(-shares, kind="stable")
    before = np.concatenate([[0.0], np.cumsum(shares[order])[:-1]])
    shares[order[before >= s.top_p]] = 0
    return shares / shares.sum()


def draws(sampling: Sampling, row: NDArray[np.float32] = ROW, count: int = 4000) -> NDArray[np.float64]:
    sampler = Sampler(sampling)
    return np.bincount([sampler.draw(row) for _ in range(count)], minlength=row.size) / count


def chi_square_limit(freedom: int) -> float:
    """What is exceeded once in ten million times (Wilson and Hilferty's approximation, 5.2 standard deviations)."""
    return freedom * (1 - 2 / (9 * freedom) + 5.2 * math.sqrt(2 / (9 * freedom))) ** 3


def check_frequencies(counts: NDArray[np.intp], shares: NDArray[np.float64]) -> None:
    """Pearson's test, rare tokens taken together until at least 8 of them are expected."""
    assert not counts[shares == 0].any(), "a token came that a filter takes out"
    order = np.argsort(-shares, kind="stable")
    expected = shares[order] * counts.sum()
    bins = np.floor(np.cumsum(expected) / 8).astype(int)
    bins = np.minimum(bins, bins[-1] - 1)
    want = np.bincount(bins, expected)
    seen = np.bincount(bins, counts[order])
    want, seen = want[want > 0], seen[want > 0]
    assert ((seen - want) ** 2 / want).sum() < chi_square_limit(want.size - 1)


def peaked(size: int) -> NDArray[np.float32]:
    """Like a row of a language model: few likely tokens anywhere, many unlikely ones."""
    chance = np.random.default_rng(size)
    ranks = chance.permutation(size)
    return (-1.3 * np.log1p(ranks) + chance.standard_normal(size) * 0.3).astype(np.float32)


def flat(size: int) -> NDArray[np.float32]:
    """Like a row of random weights."""
    return (np.random.default_rng(size).standard_normal(size) * 0.5).astype(np.float32)


@pytest.mark.parametrize("row", [peaked(40), peaked(LONG), flat(FOLDED_FROM)], ids=len)
@pytest.mark.parametrize(
    "filters",
    [
        {}, {"temperature": 0.5}, {"min_p": 0.02}, {"min_p": 0.4, "temperature": 1.7}, {"top_k": 7}, {"top_k": 300},
        {"top_k": 1 << 20}, {"top_p": 0.6}, {"top_p": 0.97}, {"top_k": 30, "top_p": 0.8},
        {"min_p": 0.001, "top_p": 0.9}, {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.03},
    ],
    ids=str,
)  # fmt: skip
def test_frequencies_are_those_of_the_exact_distribution(row: NDArray[np.float32], filters: dict[str, float]) -> None:
    sampling = Sampling(seed=5, **filters)  # type: ignore[arg-type]
    sampler = Sampler(sampling)
    counts = np.bincount([sampler.draw(row) for _ in range(DRAWS)], minlength=row.size)
    check_frequencies(counts, exact(row.astype(np.float64), sampling))


def test_check_of_frequencies_notices_a_distribution_that_is_a_little_wrong() -> None:
    sampler = Sampler(Sampling(seed=5, temperature=1.15))
    row = peaked(40)
    counts = np.bincount([sampler.draw(row) for _ in range(DRAWS)], minlength=row.size)
    with pytest.raises(AssertionError):
        check_frequencies(counts, exact(row.astype(np.float64), Sampling()))


def test_temperature_zero_takes_the_largest() -> None:
    assert draws(Sampling(temperature=0.0), count=10)[0] == 1.0
    assert draws(Sampling(temperature=1e-300), count=10)[0] == 1.0


def test_tiny_top_p_is_greedy() -> None:
    assert draws(Sampling(top_p=1e-6, seed=1), count=50)[0] == 1.0
    assert draws(Sampling(top_p=1e-300, seed=1), count=50)[0] == 1.0


def test_whole_min_p_leaves_the_best_and_what_ties_with_it() -> None:
    row = np.array([1.0, 3.0, 3.0, 2.999], np.float32)
    assert np.allclose(draws(Sampling(min_p=1.0, seed=1), row), [0, 0.5, 0.5, 0], atol=0.03)


def test_top_k_keeps_what_ties_with_the_last_and_top_p_the_first_of_equals() -> None:
    row = np.zeros(10, np.float32)
    assert np.allclose(draws(Sampling(top_k=1, seed=1), row), 0.1, atol=0.03)
    assert np.allclose(draws(Sampling(top_p=0.5, seed=1), row), [0.2] * 5 + [0] * 5, atol=0.03)


def test_nucleus_of_a_flat_row_goes_beyond_the_first_tail() -> None:
    sampler = Sampler(Sampling(top_p=0.9, seed=1))
    row = np.zeros(FIRST_TAIL * 40, np.float32)
    drawn = {sampler.draw(row) for _ in range(2000)}
    assert len(drawn) > 1500
    assert max(drawn) < 0.9 * row.size


def test_tokens_that_cannot_come_never_come() -> None:
    row = np.full(LONG, -np.inf, np.float32)
    row[[3, COLUMNS + 3, LONG - 1]] = [0.0, 1.0, 2.0]
    for sampling in (Sampling(seed=1), Sampling(seed=1, top_p=0.999), Sampling(seed=1, top_k=5)):
        assert set(np.flatnonzero(draws(sampling, row, 500))) == {3, COLUMNS + 3, LONG - 1}


def test_same_seed_draws_the_same_tokens_and_another_seed_others() -> None:
    def run(seed: int) -> list[int]:
        sampler = Sampler(Sampling(seed=seed))
        return [sampler.draw(ROW) for _ in range(50)]

    assert run(7) == run(7)
    assert run(7) != run(8)


def test_penalties_push_down_what_was_said() -> None:
    sampler = Sampler(Sampling(temperature=0.0, frequency_penalty=0.5, presence_penalty=0.3))
    assert [sampler.draw(ROW) for _ in range(3)] == [0, 1, 0]


def test_presence_and_frequency_look_at_the_answer_alone_and_repetition_at_the_prompt_too() -> None:
    row = np.array([2.0, 1.9, -0.1], np.float32)
    for penalty, first in [({"frequency_penalty": 2.0}, 0), ({"presence_penalty": 2.0}, 0),
                           ({"repetition_penalty": 1.2}, 1)]:  # fmt: skip
        assert Sampler(Sampling(temperature=0.0, **penalty), [0, 0]).draw(row) == first


def test_repetition_penalty_divides_what_is_positive_and_multiplies_what_is_negative() -> None:
    row = np.array([3.0, 2.0, -1.0, -1.5], np.float32)
    sampling = Sampling(repetition_penalty=2.0, seed=1)
    sampler = Sampler(sampling, [0, 2])
    counts = np.bincount([Sampler(Sampling(repetition_penalty=2.0, seed=i), [0, 2]).draw(row) for i in range(4000)])
    check_frequencies(counts, exact(np.array([1.5, 2.0, -2.0, -1.5]), sampling))
    assert sampler.draw(row) in range(4)


def test_bias_bans_and_forces_tokens() -> None:
    assert draws(Sampling(seed=1, logit_bias=((0, -100.0), (1, -100.0))), count=500)[:2].sum() == 0
    assert draws(Sampling(seed=1, logit_bias=((4, 100.0),)), count=500)[4] == 1.0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_fail_the_request(temperature: float, bad: float) -> None:
    row = ROW.copy()
    row[3] = bad
    with pytest.raises(InferenceError) as failure:
        Sampler(Sampling(temperature=temperature, seed=1)).draw(row)
    assert failure.value.code is Code.INTERNAL


def test_row_of_the_model_is_not_changed() -> None:
    row = ROW.copy()
    Sampler(Sampling(seed=1, repetition_penalty=1.3, logit_bias=((1, 5.0),), presence_penalty=1.0), [1]).draw(row)
    assert np.array_equal(row, ROW)


@pytest.mark.parametrize("size", [5, 40, LONG])
@pytest.mark.parametrize("top", [0, 1, 3, 20])
def test_scores_are_the_log_softmax_of_the_row_best_first(size: int, top: int) -> None:
    row = peaked(size)
    want = row.astype(np.float64) - np.log(np.exp(row.astype(np.float64)).sum())
    scored = score(row, 2, top)
    assert scored.token == 2
    assert scored.logprob == pytest.approx(want[2], abs=1e-5)
    assert [token for token, _ in scored.top] == np.argsort(-row, kind="stable")[:top].tolist()
    assert [logprob for _, logprob in scored.top] == pytest.approx(np.sort(want)[::-1][:top].tolist(), abs=1e-5)
