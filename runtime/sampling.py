"""From a row of logits to a token, and to log probabilities of tokens.

What a request asks for is applied in the order of vLLM (vllm/v1/sample/sampler.py), in which each filter sees what the
one before it left:

1. `logit_bias` is added;
2. `repetition_penalty` divides positive logits of the tokens of prompt and answer, and multiplies negative ones (Keskar
   et al. 2019, CTRL, section 4.1, with Hugging Face's treatment of signs);
3. `frequency_penalty` and `presence_penalty` are subtracted for the tokens of the answer (OpenAI's API reference);
4. temperature; below GREEDY_TEMPERATURE the largest logit wins and nothing more is done;
5. `min_p`: tokens at least that share as probable as the best one (Nguyen et al. 2024);
6. `top_k`: the k best, and what ties with the last of them;
7. `top_p`: the smallest set of the best that reaches that share of what is left (Holtzman et al. 2019).

Log probabilities are of the row as the model gave it, before all of this, which is vLLM's default, too.

Pure but for the generator's state; the same seed gives the same tokens for the same rows of logits, and a row that is
not greedy takes one number of the generator. Rows of different batch sizes differ in their last bits
(docs/design.md), so that a seed promises no equal text under another load. Everything runs on the engine's thread
between two steps: a row is gone over as few times as can be, in ways that numpy vectorises. A loop over the rows of a
batch costs less than numpy's reductions along the last axis.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wire.errors import Code, InferenceError

Float = NDArray[np.float32]
Int = NDArray[np.intp]

GREEDY_TEMPERATURE = 1e-5
"""As in vLLM: below it float32 cannot hold the quotients."""
COLUMNS = 512
"""A row is folded to so many columns where a part of it has to be found: reductions over columns are vectorised, and
running sums of a whole row are not."""
FOLDED_FROM = 4 * COLUMNS
FIRST_TAIL = 256
"""How many tokens the tail that top_p cuts off is first thought to have: of a sharp distribution few remain to sort."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """What a request asks for. temperature 0 is greedy; top_k 0 means all; penalties as the module says."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Tokens, each at most once, and what is added to their logits."""

    @property
    def greedy(self) -> bool:
        """Whether the largest logit always wins."""
        return self.temperature < GREEDY_TEMPERATURE


@dataclass(frozen=True, slots=True)
class Scored:
    """A token with its natural log probability, and the most probable tokens of its place, best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Sampler:
    """Draws the tokens of one request, whose prompt `repetition_penalty` looks at."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int] = ()) -> None:
        self._sampling = sampling
        self._random: np.random.Generator | None = None
        self._penalties = _Penalties(sampling, prompt) if _penalised(sampling) else None

    def draw(self, logits: Float) -> int:
        """The next token by `logits` float32 [vocab_size]; raises InferenceError(internal) when they are not finite."""
        if self._penalties is not None:
            logits = self._penalties.apply(logits)
        token = int(logits.argmax())  # of NaNs the first
        peak = float(logits[token])
        if not math.isfinite(peak):
            raise InferenceError(
                Code.INTERNAL, "the model's logits are not finite; have the agent probe the version again", 500
            )
        if not self._sampling.greedy:
            token = self._choose(logits, peak)
        if self._penalties is not None:
            self._penalties.count(token)
        return token

    def _choose(self, logits: Float, peak: float) -> int:
        s = self._sampling
        tokens, values = _best(logits, peak, s)
        weights = values - np.float32(peak)
        weights *= np.float32(1.0 / s.temperature)
        np.exp(weights, out=weights)
        if s.top_p < 1.0:
            nucleus = _nucleus(weights, s.top_p)
            weights = weights[nucleus]
            tokens = nucleus if tokens is None else tokens[nucleus]
        if self._random is None:  # seeding takes 0.1 ms, which a greedy request does not pay
            self._random = np.random.default_rng(s.seed)
        at = _pick(weights, self._random.random())
        return at if tokens is None else int(tokens[at])


def score(logits: Float, token: int, top: int) -> Scored:
    """`token` and the `top` best by the log-softmax of `logits` float32 [vocab_size], as the model gave them."""
    peak = logits.max()
    normaliser = float(peak) + math.log(float(np.exp(logits - peak).sum()))
    best: list[int] = []
    if top:
        tokens = _places(logits >= np.float32(_floor_of_best(logits, top)))
        best = tokens[np.argsort(-logits[tokens], kind="stable")][:top].tolist()
    return Scored(
        token, float(logits[token]) - normaliser, tuple((at, float(logits[at]) - normaliser) for at in best)
    )  # fmt: skip


class _Penalties:
    """What changes logits of single tokens, and the tokens that were seen, each with how often the answer has it."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int]) -> None:
        self._sampling = sampling
        self._biased = np.array([token for token, _ in sampling.logit_bias], np.intp)
        self._bias = np.array([bias for _, bias in sampling.logit_bias], np.float32)
        seen = list(dict.fromkeys(prompt)) if sampling.repetition_penalty != 1.0 else []
        self._places = {token: place for place, token in enumerate(seen)}
        self._tokens = np.array(seen, np.intp)
        self._counts = np.zeros(len(seen), np.float32)

    def apply(self, logits: Float) -> Float:
        """A changed copy of `logits`."""
        s, seen, counts = self._sampling, self._tokens[: len(self._places)], self._counts[: len(self._places)]
        changed = logits.copy()
        changed[self._biased] += self._bias
        values = changed[seen]
        if s.repetition_penalty != 1.0:
            penalty = np.float32(s.repetition_penalty)
            values = np.where(values > 0, values / penalty, values * penalty)
        values -= counts * np.float32(s.frequency_penalty) + (counts > 0) * np.float32(s.presence_penalty)
        changed[seen] = values
        return changed

    def count(self, token: int) -> None:
        """`token` is part of the answer."""
        place = self._places.setdefault(token, len(self._places))
        if place == self._tokens.size:
            self._tokens = np.concatenate([self._tokens, np.zeros(64 + place, np.intp)])
            self._counts = np.concatenate([self._counts, np.zeros(64 + place, np.float32)])
        self._tokens[place] = token
        self._counts[place] += 1


def _penalised(s: Sampling) -> bool:
    return bool(s.frequency_penalty or s.presence_penalty or s.logit_bias or s.repetition_penalty != 1.0)


def _best(logits: Float, peak: float, s: Sampling) -> tuple[Int | None, Float]:
    """The tokens that min_p and top_k leave, in rising order, and their logits; None: all."""
    floor = peak + s.temperature * math.log(s.min_p) if s.min_p > 0.0 else -math.inf
    limited = 0 < s.top_k < logits.size
    if limited:
        floor = max(floor, _floor_of_best(logits, s.top_k))
    if floor == -math.inf:
        return None, logits
    tokens = _places(logits >= np.float32(floor))
    values = logits[tokens]
    if limited and tokens.size > s.top_k:
        kept = _places(values >= _largest(values.copy(), s.top_k))
        tokens, values = tokens[kept], values[kept]
    return tokens, values


def _floor_of_best(logits: Float, count: int) -> float:
    """A logit that the `count` best reach, and of a long row few more than they."""
    count = min(count, logits.size)
    if logits.size >= FOLDED_FROM and count <= COLUMNS // 4:
        # the best of different columns are as many different tokens
        return _largest(logits[: logits.size // COLUMNS * COLUMNS].reshape(-1, COLUMNS).max(axis=0), count)
    return _largest(logits.copy(), count)


def _largest(values: Float, count: int) -> float:
    """The last of the `count` largest of `values`, which are left in another order."""
    values.partition(values.size - count)
    return float(values[values.size - count])


def _places(mask: NDArray[np.bool_]) -> Int:
    """numpy.flatnonzero without what it costs to be general: half of it for short masks."""
    return mask.nonzero()[0]


def _nucleus(weights: Float, share: float) -> Int:
    """Places, in rising order, of the largest weights that together reach `share` of all; of equal ones the first."""
    target = share * float(weights.sum())
    tail = FIRST_TAIL
    while True:
        # what is below weighs at most (1 - share) of all when it has no more than `tail` tokens
        values = weights[_places(weights >= np.float32(target * (1.0 / share - 1.0) / tail))]
        if tail >= weights.size or float(values.sum()) >= target:
            break
        tail *= 16
    values.sort()
    values = values[::-1]
    count = min(int(np.cumsum(values, dtype=np.float64).searchsorted(target)) + 1, values.size)
    edge = values[count - 1]
    places = _places(weights >= edge)
    if places.size > count:
        places = np.delete(places, np.flatnonzero(weights[places] == edge)[count - places.size :])
    return places


def _pick(weights: Float, chance: float) -> int:
    """Where the running sum of `weights` passes `chance` (in [0, 1)) of all; by columns when they are many."""
    whole = weights.size // COLUMNS * COLUMNS if weights.size >= FOLDED_FROM else 0
    if not whole:
        return _passes(weights, chance)[0]
    sums = weights[:whole].reshape(-1, COLUMNS).sum(axis=0)
    if whole < weights.size:
        sums = np.append(sums, weights[whole:].sum())
    column, rest = _passes(sums, chance)
    if column == COLUMNS:
        return whole + _passes(weights[whole:], rest)[0]
    return column + COLUMNS * _passes(weights[column:whole:COLUMNS], rest)[0]


def _passes(weights: Float, chance: float) -> tuple[int, float]:
    """Where the running sum passes `chance` of all, and how far, as a share of the weight there."""
    cumulative = np.cumsum(weights, dtype=np.float64)
    target = chance * float(cumulative[-1])
    at = int(cumulative.searchsorted(target, side="right"))
    if at == weights.size:  # the product was rounded up to all of it
        at = int(np.flatnonzero(weights)[-1])
    before = float(cumulative[at - 1]) if at else 0.0
    return at, min(max((target - before) / float(weights[at]), 0.0), math.nextafter(1.0, 0.0))
