"""Frequencies of rotary positions (RoPE, arXiv 2104.09864), as trained or stretched to a longer context.

The rules are those of transformers' modeling_rope_utils: `linear` divides every frequency, `llama3` only those whose
wave is long against the context of the pre-training, with a ramp between.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from forge.configuration import Configuration
from wire.errors import ConfigError

DEFAULT_THETA = 10_000.0


@dataclass(frozen=True, slots=True)
class Rotary:
    """`theta` is the base; `factor` 1 stretches nothing. With `ramp` (low_freq_factor, high_freq_factor,
    original_max_position_embeddings) it is llama3's way, else the linear one."""

    theta: float = DEFAULT_THETA
    factor: float = 1.0
    ramp: tuple[float, float, int] | None = None

    def inverse_frequencies(self, head_size: int) -> NDArray[np.float64]:
        """Radians per position, float64 [head_size / 2]."""
        plain = self.theta ** -(np.arange(0, head_size, 2, dtype=np.float64) / head_size)
        if self.ramp is None:
            return plain / self.factor
        low, high, context = self.ramp
        waves = context * plain / (2 * np.pi)  # how many fit into the context of the pre-training
        kept = np.clip((waves - low) / (high - low), 0.0, 1.0)
        return plain * (kept + (1 - kept) / self.factor)


def read_rotary(config: Configuration) -> Rotary:
    """From `rope_parameters`, or from `rope_theta` and `rope_scaling` as older exports have it. Raises ConfigError."""
    parameters = config.nested("rope_parameters")
    scaling = parameters if parameters.fields else config.nested("rope_scaling")
    kind = scaling.fields.get("rope_type") or scaling.fields.get("type") or "default"
    older = config.number("rope_theta", default=DEFAULT_THETA)
    theta = parameters.number("rope_theta", default=older)
    if kind == "default":
        return Rotary(theta)
    if kind == "linear":
        return Rotary(theta, scaling.number("factor"))
    if kind == "llama3":
        low, high = scaling.number("low_freq_factor"), scaling.number("high_freq_factor")
        if low >= high:
            raise scaling.refusal("low_freq_factor", "not below high_freq_factor")
        ramp = (low, high, scaling.count("original_max_position_embeddings"))
        return Rotary(theta, scaling.number("factor"), ramp)
    raise ConfigError(f"rotary scaling {kind!r} is not supported; use a checkpoint with default, linear or llama3")
