"""Scales of an int8 cache: how large keys and values become, channel by channel, while the model reads text.

A value beyond its channel's scale times 127 is clipped, which costs far more than coarser steps: on the sample, scales
from 150 tokens without a margin made a divergence 90 times that of scales from 2,000 tokens with one. Rotary embedding
turns the channels i and i + head_size / 2 of a key into each other as positions grow (RoPE, arXiv 2104.09864), so both
are bounded by the length of the pair, which no position changes: without that, the second 500 tokens of a context
diverge 1.7 times as much.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from forge.golden import PROMPTS
from forge.graph import CacheScales
from forge.own_text import OWN_TOKENS, continue_prompts, read_text
from forge.progress import Progress
from forge.quantise import Float, to_bf16_grid
from forge.weights import Placed, WeightsWriter
from forge.windows import fit_windows
from runtime.cpu import allowed_threads
from runtime.model import Model
from runtime.slab import Shape
from runtime.version import TOKENIZER_FILE
from wire.manifest import DecoderConfig, Layout
from wire.serving import ExecutionOptions

LEVELS = 127
MARGIN = 1.25
"""For text that is not the calibration's."""
SMALLEST = 2.0**-20


@dataclass(frozen=True, slots=True)
class Int8Cache:
    """The choice to cache keys and values as int8."""

    calibration: list[list[int]] | None = None
    """Windows of tokens of text; None lets the model continue the golden vectors' prompts, sampled with a seed."""


def measure_scales(directory: Path, config: DecoderConfig, choice: Int8Cache, progress: Progress) -> Float:
    """float32 [layers, 2, kv_heads, head_size], keys first, on the bfloat16 grid.

    `directory` holds the model with a float32 cache. Raises ConfigError when a window is not of the model's tokens.
    """
    windows = choice.calibration
    if windows is not None:
        windows = fit_windows(windows, config.vocab_size, config.context_tokens, shortest=1)
    longest = min(config.context_tokens, max(map(len, windows)) if windows else OWN_TOKENS)
    shape = Shape(1 if windows else len(PROMPTS), longest)
    model = Model(directory, config, shape, ExecutionOptions(threads=allowed_threads()))
    texts = windows or continue_prompts(model, Tokenizer.from_file(str(directory / TOKENIZER_FILE)), progress)
    bounds = np.zeros((config.layers, 2, config.kv_heads, config.head_size), np.float32)
    for number, text in enumerate(texts):
        progress("calibrate the cache", number, len(texts))
        read_text(model, 0, text[:longest])
        np.maximum(bounds, _bounds(model, min(len(text), longest)), out=bounds)
    model.close()
    return np.maximum(to_bf16_grid(bounds * np.float32(MARGIN / LEVELS)), np.float32(SMALLEST))


def place_scales(writer: WeightsWriter, scales: Float) -> list[CacheScales]:
    """Two tensors per layer, shaped as GroupQueryAttention wants them."""

    def place(layer: int, part: int, name: str) -> Placed:
        return writer.add(f"layers.{layer}.{name}", scales[layer, part][None, :, None, :], Layout.F32_BF16_GRID)

    return [CacheScales(place(i, 0, "key_scales"), place(i, 1, "value_scales")) for i in range(scales.shape[0])]


def _bounds(model: Model, length: int) -> Float:
    """Largest magnitude per channel of what slot 0 holds."""
    cache = np.stack([part[0, :, :length] for part in model.slab.parts(0, 1)])
    parts, heads, _, size = cache.shape
    by_layer = cache.reshape(parts // 2, 2, heads, length, size)
    pairs = np.hypot(by_layer[:, 0, ..., : size // 2], by_layer[:, 0, ..., size // 2 :]).max(axis=2)
    return np.stack([np.concatenate([pairs, pairs], axis=-1), np.abs(by_layer[:, 1]).max(axis=2)], axis=1)
