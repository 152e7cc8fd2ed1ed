"""Whatever the logits and the filters: what is drawn is what they leave, and penalties are those of a plain loop."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.sampling import Sampler, Sampling, score

LOGITS = st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=600)


@settings(deadline=None)
@given(LOGITS, st.floats(0.05, 2.0), st.floats(0.01, 1.0), st.integers(0, 50), st.floats(0.0, 1.0), st.integers(0, 9))
def test_drawn_token_is_in_what_every_filter_leaves(
    row: list[float], temperature: float, top_p: float, top_k: int, min_p: float, times: int
) -> None:
    logits = np.asarray(row * (1 + times), np.float32)
    token = Sampler(Sampling(temperature, top_p, top_k, min_p=min_p, seed=1)).draw(logits)
    weights = np.exp((logits - logits.max()).astype(np.float64) / temperature)
    assert weights[token] >= min_p * (1 - 1e-4)
    better = weights[weights > weights[token] * (1 + 1e-5)]
    if top_k:
        assert better.size < top_k
    kept = weights[weights >= min_p * (1 - 1e-4)]
    if top_k:
        kept = kept[kept >= np.sort(kept)[::-1][min(top_k, kept.size) - 1]]
    assert better.sum() <= top_p * kept.sum() * (1 + 1e-4)


@settings(deadline=None)
@given(st.data())
def test_penalties_and_bias_are_those_of_a_plain_loop(data: st.DataObject) -> None:
    size = data.draw(st.integers(2, 12))
    token = st.integers(0, size - 1)
    prompt = data.draw(st.lists(token, max_size=20))
    bias = data.draw(st.dictionaries(token, st.floats(-100, 100, width=32), max_size=3))
    sampling = Sampling(
        temperature=0.0, repetition_penalty=data.draw(st.floats(0.1, 3)), frequency_penalty=data.draw(st.floats(-2, 2)),
        presence_penalty=data.draw(st.floats(-2, 2)), logit_bias=tuple(bias.items()),
    )  # fmt: skip
    sampler = Sampler(sampling, prompt)
    answer: list[int] = []
    for row in data.draw(st.lists(st.lists(st.floats(-9, 9, width=32), min_size=size, max_size=size), max_size=90)):
        want = [value + bias.get(place, 0.0) for place, value in enumerate(row)]
        for place in {*prompt, *answer}:
            want[place] *= 1 / sampling.repetition_penalty if want[place] > 0 else sampling.repetition_penalty
        for place in set(answer):
            want[place] -= answer.count(place) * sampling.frequency_penalty + sampling.presence_penalty
        answer.append(sampler.draw(np.asarray(row, np.float32)))
        assert want[answer[-1]] >= max(want) - 1e-3


@settings(deadline=None)
@given(LOGITS, st.integers(0, 25), st.data())
def test_scores_are_probabilities_and_the_best_come_first(row: list[float], top: int, data: st.DataObject) -> None:
    token = data.draw(st.integers(0, len(row) - 1))
    scored = score(np.asarray(row, np.float32), token, top)
    assert len(scored.top) == min(top, len(row))
    values = [logprob for _, logprob in scored.top]
    assert values == sorted(values, reverse=True)
    assert all(value <= 1e-4 for value in (*values, scored.logprob))
    if len(scored.top) == len(row):
        assert abs(sum(np.exp(values)) - 1) < 1e-4
        assert dict(scored.top)[token] == scored.logprob
