"""A BERT or RoBERTa sentence encoder in numpy, written from the papers and the configuration files alone.

BERT (arXiv 1810.04805): post-norm layers, learned positions, token types; RoBERTa (arXiv 1907.11692) counts positions
from the row after the padding's. Pooling as the model cards of sentence-transformers describe it. It shares no code
with the forge or the runtime, so agreement means something. float32, one text at a time, so that nothing is padded.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

_erf = np.vectorize(math.erf, otypes=[np.float64])


def _gelu(x: np.ndarray, kind: str) -> np.ndarray:
    if kind == "gelu":
        return (x * 0.5 * (1 + _erf(x / math.sqrt(2)))).astype(np.float32)
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


@dataclass
class ReferenceBert:
    """Weights and configuration of a checkpoint folder."""

    config: dict[str, Any]
    weights: dict[str, np.ndarray]
    mean: bool
    normalised: bool

    @classmethod
    def load(cls, directory: Path) -> "ReferenceBert":
        config = json.loads((directory / "config.json").read_text())
        modules = json.loads((directory / "modules.json").read_text())
        pooling = json.loads((directory / "1_Pooling" / "config.json").read_text())
        stored = load_file(directory / "model.safetensors")
        return cls(
            config, {name: tensor.astype(np.float32) for name, tensor in stored.items()},
            bool(pooling.get("pooling_mode_mean_tokens")), any("Normalize" in module["type"] for module in modules),
        )  # fmt: skip

    def embed(self, ids: list[int]) -> np.ndarray:
        """float32 [hidden] of one text."""
        x = self._states(np.asarray(ids))
        pooled = x.mean(axis=0) if self.mean else x[0]
        return pooled / np.linalg.norm(pooled) if self.normalised else pooled

    def _states(self, ids: np.ndarray) -> np.ndarray:
        first = self.config["pad_token_id"] + 1 if self.config["model_type"] == "roberta" else 0
        table = {name: self.weights[f"embeddings.{name}_embeddings.weight"] for name in ("word", "position")}
        kind = self.weights["embeddings.token_type_embeddings.weight"][0]
        x = table["word"][ids] + table["position"][first + np.arange(len(ids))] + kind
        x = self._norm(x, "embeddings.LayerNorm")
        for i in range(self.config["num_hidden_layers"]):
            stem = f"encoder.layer.{i}"
            attended = self._linear(self._attention(x, stem), f"{stem}.attention.output.dense")
            x = self._norm(x + attended, f"{stem}.attention.output.LayerNorm")
            inner = _gelu(self._linear(x, f"{stem}.intermediate.dense"), self.config["hidden_act"])
            x = self._norm(x + self._linear(inner, f"{stem}.output.dense"), f"{stem}.output.LayerNorm")
        return x

    def _attention(self, x: np.ndarray, stem: str) -> np.ndarray:
        heads, size = self.config["num_attention_heads"], x.shape[1] // self.config["num_attention_heads"]
        parts = [self._linear(x, f"{stem}.attention.self.{part}") for part in ("query", "key", "value")]
        q, k, v = (part.reshape(len(x), heads, size).transpose(1, 0, 2) for part in parts)
        scores = q @ k.transpose(0, 2, 1) / np.float32(math.sqrt(size))
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
        mixed = (scores / scores.sum(axis=-1, keepdims=True)) @ v
        return mixed.transpose(1, 0, 2).reshape(x.shape)

    def _linear(self, x: np.ndarray, name: str) -> np.ndarray:
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def _norm(self, x: np.ndarray, name: str) -> np.ndarray:
        centred = x - x.mean(axis=-1, keepdims=True)
        variance = np.mean(np.square(centred), axis=-1, keepdims=True)
        normed = centred / np.sqrt(variance + self.config["layer_norm_eps"])
        return normed * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]
