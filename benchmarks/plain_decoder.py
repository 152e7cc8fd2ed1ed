"""A decoder as exporters write it: plain ONNX operators, one after the other, from the weights of a checkpoint.

Queries, keys, values, gate and up are matrices of their own, norms, SiLU and rotary positions are spelt out, and keys
and values are concatenated to what was cached.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper

from forge.checkpoint import Architecture, Checkpoint
from forge.graph_builder import GraphBuilder
from forge.placer import Placer
from forge.quantise import Precision
from forge.reference import MODEL_FILE
from forge.weights import writing_weights

Feeds = Mapping[str, np.ndarray[Any, Any]]


def write_plain_decoder(source: Path, out: Path, precision: Precision) -> Path:
    """The graph of the checkpoint `source` and its weights, written to the folder `out`; returns the graph's path."""
    checkpoint = Checkpoint(source)
    with writing_weights(out) as writer:
        builder = PlainDecoder(checkpoint=checkpoint, placer=Placer(writer, {}, precision))
        model = builder.build()
    (out / MODEL_FILE).write_bytes(model.SerializeToString(deterministic=True))
    return out / MODEL_FILE


def plain_feeds(a: Architecture, tokens: int, cached: int) -> Feeds:
    """Inputs for `tokens` after `cached` ones; keys and values of chance, the same every time."""
    chance = np.random.default_rng(7)
    feeds: dict[str, np.ndarray[Any, Any]] = {
        "input_ids": chance.integers(3, a.vocab_size, (1, tokens)),
        "position_ids": np.arange(cached, cached + tokens)[None],
    }
    for i in range(a.layers):
        for part in ("key", "value"):
            shape = (1, a.kv_heads, cached, a.head_size)
            feeds[f"past_key_values.{i}.{part}"] = chance.standard_normal(shape, np.float32)
    return feeds


@dataclass(slots=True)
class PlainDecoder(GraphBuilder):
    """Names of values are those of the modules in the checkpoint."""

    checkpoint: Checkpoint = field(kw_only=True)
    placer: Placer = field(kw_only=True)

    @property
    def shape(self) -> Architecture:
        """The numbers of the decoder."""
        return self.checkpoint.architecture

    def build(self) -> Any:
        """The whole model."""
        a = self.shape
        table = self.checkpoint.tensor("model.embed_tokens.weight", (a.vocab_size, a.hidden_size))
        embedded = self.placer.table("model.embed_tokens", table)
        for name, value in {"one": 1.0, "two": 2.0, "epsilon": a.rms_epsilon, "scale": a.head_size**-0.5,
                            "hidden": -np.inf}.items():  # fmt: skip
            self.constant(name, value, np.float32)
        for name, axes in {"axis.1": [1], "axis.2": [2]}.items():
            self.constant(name, axes, np.int64)
        self._positions()
        residual = self.embed("model.embed_tokens", "input_ids", embedded)
        for i in range(a.layers):
            residual = self._layer(i, residual)
        normed = self._norm("model.norm", residual)
        head = embedded if embedded.dense is None else self.placer.matrix("lm_head", table)
        self.matmul("logits", normed, head)
        return self._model()

    def _linear(self, name: str, source: str, rows: int, columns: int) -> str:
        weights = self.checkpoint.tensor(f"{name}.weight", (rows, columns))
        return self.matmul(name, source, self.placer.matrix(name, weights))

    def _norm(self, name: str, source: str) -> str:
        """x * (1 / sqrt(mean(x^2) + epsilon)) * weight."""
        weight = self.checkpoint.tensor(f"{name}.weight", (self.shape.hidden_size,))
        self.node("Pow", [source, "two"], [f"{name}.square"])
        self.node("ReduceMean", [f"{name}.square", self.constant(f"{name}.axis", [-1], np.int64)], [f"{name}.mean"])
        self.node("Add", [f"{name}.mean", "epsilon"], [f"{name}.safe"])
        self.node("Sqrt", [f"{name}.safe"], [f"{name}.root"])
        self.node("Div", ["one", f"{name}.root"], [f"{name}.factor"])
        self.node("Mul", [source, f"{name}.factor"], [f"{name}.scaled"])
        placed = self.vector(f"{name}.weight", self.placer.vector(name, weight))
        return self.node("Mul", [placed, f"{name}.scaled"], [name])

    def _positions(self) -> None:
        """cos and sin [B, 1, S, head_size], and the causal mask [B, 1, S, T] of 0 and -infinity."""
        a = self.shape
        self.constant("rotary.frequency", a.rotary.inverse_frequencies(a.head_size)[None, None], np.float32)
        self.constant("last", [-1], np.int64)
        self.node("Cast", ["position_ids"], ["rotary.position"], to=TensorProto.FLOAT)
        self.node("Unsqueeze", ["rotary.position", "last"], ["rotary.column"])
        self.node("Mul", ["rotary.column", "rotary.frequency"], ["rotary.half"])
        self.node("Concat", ["rotary.half", "rotary.half"], ["rotary.angle"], axis=-1)
        for kind in ("Cos", "Sin"):
            self.node(kind, ["rotary.angle"], [f"rotary.{kind}.flat"])
            self.node("Unsqueeze", [f"rotary.{kind}.flat", "axis.1"], [f"rotary.{kind}"])
        self.constant("nothing", 0, np.int64)
        self.constant("one.integer", 1, np.int64)
        self.node("Shape", ["past_key_values.0.key"], ["cached"], start=2, end=3)
        self.node("Shape", ["input_ids"], ["length"], start=1)
        self.node("Add", ["cached", "length"], ["total"])
        self.node("Squeeze", ["total"], ["total.scalar"])
        self.node("Range", ["nothing", "total.scalar", "one.integer"], ["keys"])
        self.node("Unsqueeze", ["position_ids", "last"], ["queries"])
        self.node("LessOrEqual", ["keys", "queries"], ["seen"])
        self.constant("zero", 0.0, np.float32)
        self.node("Where", ["seen", "zero", "hidden"], ["mask.rows"])
        self.node("Unsqueeze", ["mask.rows", "axis.1"], ["mask"])

    def _rotary(self, name: str, source: str) -> str:
        """x cos + rotate_half(x) sin."""
        half = self.shape.head_size // 2
        bounds = {key: self.constant(f"{name}.{key}", [value], np.int64)
                  for key, value in {"start": 0, "half": half, "end": 2 * half, "axis": 3}.items()}  # fmt: skip
        self.node("Slice", [source, bounds["start"], bounds["half"], bounds["axis"]], [f"{name}.first"])
        self.node("Slice", [source, bounds["half"], bounds["end"], bounds["axis"]], [f"{name}.second"])
        self.node("Neg", [f"{name}.second"], [f"{name}.negative"])
        self.node("Concat", [f"{name}.negative", f"{name}.first"], [f"{name}.rotated"], axis=-1)
        self.node("Mul", [source, "rotary.Cos"], [f"{name}.cos"])
        self.node("Mul", [f"{name}.rotated", "rotary.Sin"], [f"{name}.sin"])
        return self.node("Add", [f"{name}.cos", f"{name}.sin"], [name])

    def _heads(self, name: str, source: str, heads: int) -> str:
        """[B, S, heads * head_size] to [B, heads, S, head_size]."""
        shape = self.constant(f"{name}.shape", [0, 0, heads, self.shape.head_size], np.int64)
        self.node("Reshape", [source, shape], [f"{name}.split"])
        return self.node("Transpose", [f"{name}.split"], [f"{name}.heads"], perm=[0, 2, 1, 3])

    def _repeated(self, name: str, source: str) -> str:
        """Each head of keys or values as often as queries share it."""
        a = self.shape
        times = self.constant(f"{name}.times", [1, 1, a.heads // a.kv_heads, 1, 1], np.int64)
        self.node("Unsqueeze", [source, "axis.2"], [f"{name}.single"])
        self.node("Expand", [f"{name}.single", times], [f"{name}.copies"])
        shape = self.constant(f"{name}.flat", [0, a.heads, -1, a.head_size], np.int64)
        return self.node("Reshape", [f"{name}.copies", shape], [f"{name}.repeated"])

    def _attention(self, i: int, source: str) -> str:
        a, name = self.shape, f"model.layers.{i}.self_attn"
        counts = {"q": a.heads, "k": a.kv_heads, "v": a.kv_heads}
        parts = {}
        for part, heads in counts.items():
            flat = self._linear(f"{name}.{part}_proj", source, heads * a.head_size, a.hidden_size)
            parts[part] = self._heads(f"{name}.{part}", flat, heads)
        for part in ("q", "k"):
            parts[part] = self._rotary(f"{name}.{part}.turned", parts[part])
        for part, kind in (("k", "key"), ("v", "value")):
            joined = self.node("Concat", [f"past_key_values.{i}.{kind}", parts[part]], [f"present.{i}.{kind}"], axis=2)
            parts[part] = self._repeated(f"{name}.{part}", joined)
        self.node("Transpose", [parts["k"]], [f"{name}.k.turned.over"], perm=[0, 1, 3, 2])
        self.node("MatMul", [parts["q"], f"{name}.k.turned.over"], [f"{name}.products"])
        self.node("Mul", [f"{name}.products", "scale"], [f"{name}.scores"])
        self.node("Add", [f"{name}.scores", "mask"], [f"{name}.masked"])
        self.node("Softmax", [f"{name}.masked"], [f"{name}.weights"], axis=-1)
        self.node("MatMul", [f"{name}.weights", parts["v"]], [f"{name}.mixed"])
        self.node("Transpose", [f"{name}.mixed"], [f"{name}.rows"], perm=[0, 2, 1, 3])
        shape = self.constant(f"{name}.joined", [0, 0, a.heads * a.head_size], np.int64)
        self.node("Reshape", [f"{name}.rows", shape], [f"{name}.flat"])
        return self._linear(f"{name}.o_proj", f"{name}.flat", a.hidden_size, a.heads * a.head_size)

    def _layer(self, i: int, residual: str) -> str:
        a, name = self.shape, f"model.layers.{i}"
        attended = self._attention(i, self._norm(f"{name}.input_layernorm", residual))
        residual = self.node("Add", [residual, attended], [f"{name}.attended"])
        normed = self._norm(f"{name}.post_attention_layernorm", residual)
        gate = self._linear(f"{name}.mlp.gate_proj", normed, a.mlp_size, a.hidden_size)
        up = self._linear(f"{name}.mlp.up_proj", normed, a.mlp_size, a.hidden_size)
        self.node("Sigmoid", [gate], [f"{name}.mlp.sigmoid"])
        self.node("Mul", [gate, f"{name}.mlp.sigmoid"], [f"{name}.mlp.silu"])
        self.node("Mul", [f"{name}.mlp.silu", up], [f"{name}.mlp.product"])
        fed = self._linear(f"{name}.mlp.down_proj", f"{name}.mlp.product", a.hidden_size, a.mlp_size)
        return self.node("Add", [residual, fed], [f"{name}.out"])

    def _model(self) -> Any:
        a = self.shape
        inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, ["B", "S"])
                  for name in ("input_ids", "position_ids")]  # fmt: skip
        outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["B", "S", a.vocab_size])]
        for i in range(a.layers):
            for part in ("key", "value"):
                for values, name, length in ((inputs, "past_key_values", "P"), (outputs, "present", "T")):
                    shape: list[str | int | None] = ["B", a.kv_heads, length, a.head_size]
                    values.append(helper.make_tensor_value_info(f"{name}.{i}.{part}", TensorProto.FLOAT, shape))
        return self.model("plain-decoder", inputs, outputs)
