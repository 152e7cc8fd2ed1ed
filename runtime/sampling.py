"""From logits to a token: greedy, temperature, top-k, top-p, penalties; seeded.

Order as in the Hugging Face generation code: penalties, temperature, top-k, top-p. Temperature 0 is greedy.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class SamplingParameters:
    """What a client asks for; defaults are OpenAI's."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None


@dataclass(slots=True)
class Sampler:
    """State of one request: its random numbers and how often it produced each token."""

    parameters: SamplingParameters
    random: np.random.Generator = field(init=False)
    counts: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.parameters.seed)

    def choose(self, logits: Float) -> int:
        """The next token of `logits` (float32 [vocabulary], not changed)."""
        p = self.parameters
        if p.presence_penalty or p.frequency_penalty or p.logit_bias:
            logits = self._adjusted(logits)
        token = int(np.argmax(logits)) if p.temperature <= 0 else self._draw(logits)
        self.counts[token] = self.counts.get(token, 0) + 1
        return token

    def _adjusted(self, logits: Float) -> Float:
        adjusted = logits.copy()
        p = self.parameters
        for token, count in self.counts.items():
            adjusted[token] -= p.presence_penalty + p.frequency_penalty * count
        for token, bias in p.logit_bias:
            adjusted[token] += bias
        return adjusted

    def _draw(self, logits: Float) -> int:
        p = self.parameters
        scaled = logits.astype(np.float64) / p.temperature
        tokens = np.arange(scaled.size)
        if 0 < p.top_k < scaled.size:
            tokens = np.argpartition(-scaled, p.top_k - 1)[: p.top_k]
            scaled = scaled[tokens]
        weights = np.exp(scaled - scaled.max())
        weights /= weights.sum()
        if p.top_p < 1.0:
            order = np.argsort(-weights, kind="stable")
            kept = int(np.searchsorted(np.cumsum(weights[order]), p.top_p)) + 1
            tokens, weights = tokens[order[:kept]], weights[order[:kept]]
            weights = weights / weights.sum()
        drawn = int(np.searchsorted(np.cumsum(weights), self.random.random()))
        return int(tokens[min(drawn, tokens.size - 1)])
