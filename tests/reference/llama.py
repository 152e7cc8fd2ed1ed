"""A Llama decoder in numpy, written from the papers and the Hugging Face configuration alone.

RMSNorm (arXiv 1910.07467), rotary positions in the half-split form (arXiv 2104.09864), grouped-query attention
(arXiv 2305.13245), SwiGLU (arXiv 2002.05202). It shares no code with the forge or the runtime, so agreement means
something. float32 throughout; a KV cache allows batched sampling.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file


def _rms_norm(x: np.ndarray, weight: np.ndarray, epsilon: float) -> np.ndarray:
    return x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + epsilon) * weight


def _rotate(x: np.ndarray, positions: np.ndarray, theta: float) -> np.ndarray:
    """x [B, heads, S, size] at `positions` [S]."""
    half = x.shape[-1] // 2
    frequency = theta ** (-np.arange(half, dtype=np.float64) * 2 / x.shape[-1])
    angles = (positions[:, None] * frequency[None, :]).astype(np.float32)
    cos, sin = np.cos(angles), np.sin(angles)
    first, second = x[..., :half], x[..., half:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


@dataclass
class ReferenceLlama:
    """Weights and configuration of a checkpoint folder."""

    config: dict[str, Any]
    weights: dict[str, np.ndarray]
    _cache: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    _length: int = 0

    @classmethod
    def load(cls, directory: Path) -> "ReferenceLlama":
        config = json.loads((directory / "config.json").read_text())
        stored = load_file(directory / "model.safetensors")
        return cls(config, {name: tensor.astype(np.float32) for name, tensor in stored.items()})

    def reset(self) -> None:
        """Forget the KV cache."""
        self._cache, self._length = [], 0

    def logits(self, ids: list[int]) -> np.ndarray:
        """float32 [len(ids), vocabulary] of one prompt, without a cache."""
        self.reset()
        hidden = self.forward(np.asarray([ids]))
        self.reset()
        return self.head(hidden)[0]

    def forward(self, ids: np.ndarray) -> np.ndarray:
        """Append ids [B, S] to the cache; normed hidden states [B, S, hidden]."""
        c = self.config
        x = self.weights["model.embed_tokens.weight"][ids]
        positions = np.arange(self._length, self._length + ids.shape[1])
        for i in range(c["num_hidden_layers"]):
            stem = f"model.layers.{i}"
            normed = _rms_norm(x, self.weights[f"{stem}.input_layernorm.weight"], c["rms_norm_eps"])
            x = x + self._attention(i, normed, positions)
            normed = _rms_norm(x, self.weights[f"{stem}.post_attention_layernorm.weight"], c["rms_norm_eps"])
            gate = normed @ self.weights[f"{stem}.mlp.gate_proj.weight"].T
            up = normed @ self.weights[f"{stem}.mlp.up_proj.weight"].T
            x = x + (gate / (1 + np.exp(-gate)) * up) @ self.weights[f"{stem}.mlp.down_proj.weight"].T
        self._length += ids.shape[1]
        return _rms_norm(x, self.weights["model.norm.weight"], c["rms_norm_eps"])

    def head(self, hidden: np.ndarray) -> np.ndarray:
        """Logits of hidden states."""
        tied = self.config.get("tie_word_embeddings", False)
        return hidden @ self.weights["model.embed_tokens.weight" if tied else "lm_head.weight"].T

    def _attention(self, i: int, x: np.ndarray, positions: np.ndarray) -> np.ndarray:
        c = self.config
        heads, kv_heads = c["num_attention_heads"], c["num_key_value_heads"]
        size = c.get("head_dim") or c["hidden_size"] // heads
        theta = (c.get("rope_parameters") or {}).get("rope_theta", c.get("rope_theta", 10000.0))
        batch, length, _ = x.shape

        def project(part: str, count: int) -> np.ndarray:
            weight = self.weights[f"model.layers.{i}.self_attn.{part}_proj.weight"]
            return (x @ weight.T).reshape(batch, length, count, size).transpose(0, 2, 1, 3)

        q = _rotate(project("q", heads), positions, theta)
        k, v = _rotate(project("k", kv_heads), positions, theta), project("v", kv_heads)
        if i < len(self._cache):
            k = np.concatenate([self._cache[i][0], k], axis=2)
            v = np.concatenate([self._cache[i][1], v], axis=2)
            self._cache[i] = (k, v)
        else:
            self._cache.append((k, v))
        k, v = np.repeat(k, heads // kv_heads, axis=1), np.repeat(v, heads // kv_heads, axis=1)
        scores = q @ k.transpose(0, 1, 3, 2) / np.sqrt(np.float32(size))
        future = np.arange(k.shape[2])[None, :] > positions[:, None]
        scores = np.where(future, np.float32(-1e30), scores)
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
        mixed = (scores / scores.sum(axis=-1, keepdims=True)) @ v
        joined = mixed.transpose(0, 2, 1, 3).reshape(batch, length, heads * size)
        return joined @ self.weights[f"model.layers.{i}.self_attn.o_proj.weight"].T


def sample(model: ReferenceLlama, start: int, windows: int, length: int, seed: int) -> np.ndarray:
    """Token windows int [windows, length] drawn from the model's full distribution, from `start` on."""
    random = np.random.default_rng(seed)
    model.reset()
    tokens = np.full((windows, length), start)
    for position in range(1, length):
        logits = model.head(model.forward(tokens[:, position - 1 : position]))[:, 0].astype(np.float64)
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        cumulative = np.cumsum(weights / weights.sum(axis=1, keepdims=True), axis=1)
        drawn = random.random(windows)
        tokens[:, position] = np.minimum((cumulative < drawn[:, None]).sum(axis=1), logits.shape[1] - 1)
    model.reset()
    return tokens
