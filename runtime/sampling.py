"""From a row of logits to a token: greedy, or temperature with top-k and top-p, with OpenAI's repetition penalties.

Pure but for the generator's state; the same seed gives the same tokens for the same rows of logits. Rows of different
batch sizes differ in their last bits (docs/design.md), so that a seed promises no equal text under another load.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wire.errors import Code, InferenceError

CANDIDATES = 256
"""Tokens sorted at first: the nucleus of a sharp distribution lies within, and a whole row takes milliseconds."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """What a request asks for. temperature 0 is greedy; top_k 0 means all; penalties as in OpenAI's API."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0


@dataclass(frozen=True, slots=True)
class Scored:
    """A token with its natural log probability, and the most probable tokens of its place, best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Sampler:
    """Draws the tokens of one request."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._random: np.random.Generator | None = None
        self._penalised = bool(sampling.frequency_penalty or sampling.presence_penalty)
        self._counts: dict[int, int] = {}

    def draw(self, logits: NDArray[np.float32]) -> int:
        """The next token by `logits` float32 [vocab_size]; raises InferenceError(internal) when they are not finite."""
        if self._penalised:
            logits = self._penalise(logits)
        best = int(logits.argmax())  # of NaNs the first
        if not np.isfinite(logits[best]):
            raise InferenceError(
                Code.INTERNAL, "the model's logits are not finite; have the agent probe the version again", 500
            )
        token = best if self._sampling.temperature == 0.0 else self._choose(logits)
        if self._penalised:
            self._counts[token] = self._counts.get(token, 0) + 1
        return token

    def _penalise(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """mu[j] - c[j] * frequency - (c[j] > 0) * presence, of the answer's own tokens (OpenAI API reference)."""
        changed = logits.copy()
        if self._counts:
            tokens = np.fromiter(self._counts.keys(), np.int64, len(self._counts))
            counts = np.fromiter(self._counts.values(), np.float32, len(self._counts))
            changed[tokens] -= counts * self._sampling.frequency_penalty + self._sampling.presence_penalty
        return changed

    def _choose(self, logits: NDArray[np.float32]) -> int:
        s = self._sampling
        if not s.top_k and s.top_p >= 1.0:
            weights = np.exp((logits - logits.max()).astype(np.float64) / s.temperature)
            return self._pick(weights)
        limit = s.top_k or logits.size
        size = min(CANDIDATES, limit, logits.size)
        while True:
            order, weights, share = _largest(logits, size, s.temperature)
            whole = size >= min(limit, logits.size)
            if whole or share >= s.top_p:
                break
            size = min(size * 16, limit, logits.size)
        if s.top_k:
            share = 1.0  # top-p of what top-k left, as everywhere
        nucleus = s.top_p / share * weights.sum()
        kept = int(np.searchsorted(np.cumsum(weights), nucleus)) + 1
        return int(order[self._pick(weights[:kept])])

    def _pick(self, weights: NDArray[np.float64]) -> int:
        if self._random is None:  # seeding takes 0.1 ms, which a greedy request does not pay
            self._random = np.random.default_rng(self._sampling.seed)
        cumulative = np.cumsum(weights)
        at = int(np.searchsorted(cumulative, self._random.random() * cumulative[-1], side="right"))
        return min(at, weights.size - 1)


def _largest(
    logits: NDArray[np.float32], size: int, temperature: float
) -> tuple[NDArray[np.intp], NDArray[np.float64], float]:
    """(tokens, weights) of the `size` largest logits in falling order, and their share of the whole distribution."""
    order = np.argpartition(logits, logits.size - size)[-size:] if size < logits.size else np.arange(logits.size)
    order = order[np.argsort(-logits[order], kind="stable")]
    scaled = (logits - logits[order[0]]).astype(np.float64) / temperature
    weights = np.exp(scaled[order])
    return order, weights, float(weights.sum() / np.exp(scaled).sum())


def score(logits: NDArray[np.float32], token: int, top: int) -> Scored:
    """`token` and the `top` best by the log-softmax of `logits` float32 [vocab_size], as the model gave them."""
    top = min(top, logits.size)
    peak = logits.max()
    normaliser = float(peak) + math.log(float(np.exp(logits - peak).sum(dtype=np.float64)))
    best = np.argpartition(logits, -top)[-top:] if 0 < top < logits.size else np.arange(top)
    best = best[np.argsort(-logits[best], kind="stable")]
    return Scored(
        token, float(logits[token]) - normaliser, tuple((int(at), float(logits[at]) - normaliser) for at in best)
    )
