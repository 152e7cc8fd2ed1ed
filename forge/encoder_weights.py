"""An encoder checkpoint's weights, placed in weights.bin and handed to the graph."""

from collections.abc import Mapping

import numpy as np

from forge.encoder_checkpoint import EncoderCheckpoint
from forge.encoder_graph import EncoderLayer, EncoderWeights, Linear, Norm
from forge.integers import AFTER_GELU, SYMMETRIC
from forge.placer import Placer
from forge.progress import Progress, silent
from forge.quantise import Float, Precision


def place_encoder(
    checkpoint: EncoderCheckpoint, placer: Placer, activations: Mapping[str, Float] | None = None,
    progress: Progress = silent,
) -> EncoderWeights:  # fmt: skip
    """Read, transform and place every weight; int8 smooths what `activations` has (forge/activations.py)."""
    a = checkpoint.architecture
    source = _Source(checkpoint, placer, activations or {})
    words = source.placer.table("embeddings.words", source.table("word", a.vocab_size))
    positions = source.table("position", a.positions)[a.first_position :][: a.max_tokens]
    placed = source.placer.vector("embeddings.positions", positions + source.table("token_type", a.types)[0])
    norm = source.norm("embeddings.norm", "embeddings.LayerNorm")
    layers = []
    for i in range(a.layers):
        progress("quantise", i, a.layers)
        layers.append(_place_layer(source, i))
    return EncoderWeights(words, placed, norm, layers)


class _Source:
    """A checkpoint's tensors by the names of a BertModel, whatever the checkpoint puts before them."""

    def __init__(self, checkpoint: EncoderCheckpoint, placer: Placer, activations: Mapping[str, Float]) -> None:
        self.placer, self.architecture, self._checkpoint = placer, checkpoint.architecture, checkpoint
        self._activations = activations
        prefix = f"{self.architecture.prefix}."
        self._prefix = prefix if any(name.startswith(prefix) for name in checkpoint.names) else ""

    def read(self, name: str, *shape: int) -> Float:
        """Tensor `name` of `shape`."""
        return self._checkpoint.tensor(self._prefix + name, shape)

    def table(self, name: str, rows: int) -> Float:
        """A table of embeddings, [rows, hidden_size]."""
        return self.read(f"embeddings.{name}_embeddings.weight", rows, self.architecture.hidden_size)

    def linear(self, name: str, parts: list[str], shape: tuple[int, int], zero_point: int = SYMMETRIC) -> Linear:
        """Linear modules of one shape (rows, columns) on top of each other, under the name `name`; `zero_point` of what
        they are multiplied with."""
        weights = np.concatenate([self.read(f"{part}.weight", *shape) for part in parts])
        biases = np.concatenate([self.read(f"{part}.bias", shape[0]) for part in parts])
        bias = self.placer.vector(f"{name}.bias", biases)
        if self.placer.precision is Precision.INT8:
            return Linear(self.placer.integers(name, weights, self._activations.get(name), zero_point), bias)
        return Linear(self.placer.matrix(name, weights), bias)

    def norm(self, name: str, module: str) -> Norm:
        """A layer norm."""
        weight, bias = (self.read(f"{module}.{part}", self.architecture.hidden_size) for part in ("weight", "bias"))
        return Norm(self.placer.vector(f"{name}.weight", weight), self.placer.vector(f"{name}.bias", bias))


def _place_layer(source: _Source, i: int) -> EncoderLayer:
    a, stem, name = source.architecture, f"encoder.layer.{i}", f"layers.{i}"
    hidden, mlp = a.hidden_size, a.mlp_size
    heads = [f"{stem}.attention.self.{part}" for part in ("query", "key", "value")]
    return EncoderLayer(
        qkv=source.linear(f"{name}.qkv", heads, (hidden, hidden)),
        output=source.linear(f"{name}.output", [f"{stem}.attention.output.dense"], (hidden, hidden)),
        attention_norm=source.norm(f"{name}.attention_norm", f"{stem}.attention.output.LayerNorm"),
        up=source.linear(f"{name}.up", [f"{stem}.intermediate.dense"], (mlp, hidden)),
        down=source.linear(f"{name}.down", [f"{stem}.output.dense"], (hidden, mlp), AFTER_GELU),
        mlp_norm=source.norm(f"{name}.mlp_norm", f"{stem}.output.LayerNorm"),
    )
