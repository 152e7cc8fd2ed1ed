"""The ONNX graph of a decoder of the Llama kind after the graph contract (docs/design.md section 6).

Beside those of forge/graph_builder.py, ops beyond the ONNX standard are GroupQueryAttention with rotary inside,
SimplifiedLayerNormalization and QuickGelu. The rotary tables are computed in the graph from one small constant,
because onnxruntime folds them at load and 4 bytes per entry of incompressible table would cost a small model several
per cent of its wire.
"""

from dataclasses import dataclass, field

import numpy as np
from onnx import ModelProto, TensorProto, helper

from forge.checkpoint import Architecture
from forge.graph_builder import CONTRIB, GraphBuilder, Matrix
from forge.integers import IntegerMatrix, multiply
from forge.weights import Placed

FLOAT_ATTENTION_INPUTS = 9
"""Inputs of GroupQueryAttention with a float32 cache; with an int8 cache positions, bias and sink follow, all left out,
and then the scales."""
ROTARY_FREQUENCIES, ROTARY_LIMIT = "rotary.inverse_frequency", "rotary.limit"
"""Constants that the rotary tables are made of: float32 [1, head_size / 2], and how many positions."""
SCORE_SCALE = 1.0
"""What the attention multiplies products of queries and keys by: nothing, for then onnxruntime has a kernel for the one
row of a decode step. The usual 1 / sqrt(head_size) is in the rotary tables, a root of it each (docs/adr/0019)."""
CACHE_ATTRIBUTES = {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}


@dataclass(slots=True)
class _DecoderBuilder(GraphBuilder):
    """With what only decoders have."""

    architecture: Architecture = field(kw_only=True)

    def biased(self, source: str, bias: Placed | None) -> str:
        """source + bias, where there is one."""
        if bias is None:
            return source
        return self.node("Add", [source, self.vector(f"{source}.bias", bias)], [f"{source}.biased"])

    def rotary_tables(self) -> tuple[str, str]:
        """cos and sin of position times inverse frequency (forge/rotary.py), times the fourth root of 1 / head_size:
        queries and keys both get it, so that their products are as scaled as attention wants them.

        float32 [context, head_size / 2] each.
        """
        a = self.architecture
        self.constant(ROTARY_FREQUENCIES, a.rotary.inverse_frequencies(a.head_size)[None, :], np.float32)
        for name, value in (("rotary.start", 0), (ROTARY_LIMIT, a.context_tokens), ("rotary.step", 1)):
            self.constant(name, value, np.float32)
        self.node("Range", ["rotary.start", ROTARY_LIMIT, "rotary.step"], ["rotary.range"])
        self.constant("rotary.column", [1], np.int64)
        self.node("Unsqueeze", ["rotary.range", "rotary.column"], ["rotary.positions"])
        self.node("Mul", ["rotary.positions", ROTARY_FREQUENCIES], ["rotary.angles"])
        self.constant("rotary.scale", a.head_size**-0.25, np.float32)
        cos, sin = (
            self.node("Mul", [self.node(kind, ["rotary.angles"], [f"rotary.{kind.lower()}"]), "rotary.scale"], [name])
            for kind, name in (("Cos", "rotary.cos.scaled"), ("Sin", "rotary.sin.scaled"))
        )
        return cos, sin


@dataclass(frozen=True, slots=True)
class Layer:
    """Weights of one decoder layer: q, k and v stacked; gate and up stacked, so that each pair is one MatMul."""

    input_norm: Placed
    qkv: Matrix | IntegerMatrix
    output: Matrix | IntegerMatrix
    post_norm: Placed
    gate_up: Matrix | IntegerMatrix
    down: Matrix | IntegerMatrix
    qkv_bias: Placed | None = None
    output_bias: Placed | None = None
    query_norm: Placed | None = None
    key_norm: Placed | None = None


@dataclass(frozen=True, slots=True)
class CacheScales:
    """float32 [1, kv_heads, 1, head_size] each: a cached int8 times its channel's scale is the key or value."""

    key: Placed
    value: Placed


@dataclass(frozen=True, slots=True)
class Weights:
    """Everything that the graph needs from weights.bin."""

    embedding: Matrix
    layers: list[Layer]
    norm: Placed
    head: Matrix


def build_graph(
    architecture: Architecture, weights: Weights, cache_scales: list[CacheScales] | None = None
) -> ModelProto:
    """The decoder graph; deterministic for the same input. With `cache_scales`, one per layer, keys and values are
    cached as int8, else as float32."""
    b = _DecoderBuilder(architecture=architecture)
    cos, sin = b.rotary_tables()
    residual = b.embed("model.embed_tokens", "input_ids", weights.embedding)
    normed = b.node(
        "SimplifiedLayerNormalization",
        [residual, b.vector("model.layers.0.input_norm.weight", weights.layers[0].input_norm)],
        ["model.layers.0.input_norm"],
        axis=-1,
        epsilon=architecture.rms_epsilon,
    )
    for i, layer in enumerate(weights.layers):
        attended = _attention(b, i, normed, layer, (cos, sin), cache_scales[i] if cache_scales else None)
        normed, residual = _skip_norm(b, f"model.layers.{i}.post_norm", (attended, residual), layer.post_norm)
        fed = _mlp(b, f"model.layers.{i}.mlp", normed, layer)
        last = i == len(weights.layers) - 1
        name = "model.norm" if last else f"model.layers.{i + 1}.input_norm"
        norm = weights.norm if last else weights.layers[i + 1].input_norm
        normed, residual = _skip_norm(b, name, (fed, residual), norm)
    _head(b, normed, weights.head)
    return _model(b, TensorProto.INT8 if cache_scales else TensorProto.FLOAT)


def _attention(  # noqa: PLR0913  # each is another input of the node
    b: _DecoderBuilder, i: int, source: str, layer: Layer, tables: tuple[str, str], cache: CacheScales | None
) -> str:
    a, name = b.architecture, f"model.layers.{i}.attention"
    qkv = b.biased(multiply(b, f"{name}.qkv", source, layer.qkv), layer.qkv_bias)
    inputs = [
        *_normed_heads(b, name, qkv, layer), f"past_key_values.{i}.key", f"past_key_values.{i}.value", "seqlens_k",
        "total_sequence_length", *tables,
    ]  # fmt: skip
    outputs = [name, f"present.{i}.key", f"present.{i}.value"]
    if cache is not None:
        scales = (b.vector(f"{name}.key_scales", cache.key), b.vector(f"{name}.value_scales", cache.value))
        inputs += ["", "", "", *scales]
    b.node(
        "GroupQueryAttention", inputs, outputs, CONTRIB, num_heads=a.heads, kv_num_heads=a.kv_heads, do_rotary=1,
        rotary_interleaved=0, scale=SCORE_SCALE, **(CACHE_ATTRIBUTES if cache is not None else {}),
        **({"local_window_size": a.windows[i]} if a.windows[i] else {}),
    )  # fmt: skip
    return b.biased(multiply(b, f"{name}.output", name, layer.output), layer.output_bias)


def _normed_heads(b: _DecoderBuilder, name: str, qkv: str, layer: Layer) -> tuple[str, str, str]:
    """The first three inputs of the attention: q, k and v in one; or apart, q and k after an RMS norm per head (Qwen3).
    GroupQueryAttention's own inputs for these norms are not read by the CPU's kernel."""
    if layer.query_norm is None or layer.key_norm is None:
        return qkv, "", ""
    a = b.architecture
    sizes = b.constant(f"{name}.sizes", [heads * a.head_size for heads in (a.heads, a.kv_heads, a.kv_heads)], np.int64)
    by_head = b.constant(f"{name}.by_head", [0, 0, -1, a.head_size], np.int64)
    joined = b.constant(f"{name}.joined", [0, 0, -1], np.int64)
    b.node("Split", [qkv, sizes], [f"{name}.{part}" for part in ("query", "key", "value")], axis=-1)
    for part, norm in (("query", layer.query_norm), ("key", layer.key_norm)):
        b.node("Reshape", [f"{name}.{part}", by_head], [f"{name}.{part}.heads"])
        b.node(
            "SimplifiedLayerNormalization", [f"{name}.{part}.heads", b.vector(f"{name}.{part}_norm.weight", norm)],
            [f"{name}.{part}.normed"], axis=-1, epsilon=a.rms_epsilon,
        )  # fmt: skip
        b.node("Reshape", [f"{name}.{part}.normed", joined], [f"{name}.{part}.joined"])
    return f"{name}.query.joined", f"{name}.key.joined", f"{name}.value"


def _mlp(b: _DecoderBuilder, name: str, source: str, layer: Layer) -> str:
    """SwiGLU: down(silu(gate) * up); QuickGelu with alpha 1 is silu."""
    both = multiply(b, f"{name}.gate_up", source, layer.gate_up)
    b.node("Split", [both], [f"{name}.gate", f"{name}.up"], axis=-1, num_outputs=2)
    b.node("QuickGelu", [f"{name}.gate"], [f"{name}.silu"], CONTRIB, alpha=1.0)
    b.node("Mul", [f"{name}.silu", f"{name}.up"], [f"{name}.product"])
    return multiply(b, f"{name}.down", f"{name}.product", layer.down)


def _skip_norm(b: _DecoderBuilder, name: str, sources: tuple[str, str], weight: Placed) -> tuple[str, str]:
    """RMS norm of the sum; returns (normed, sum). Two nodes, which is faster than one (docs/adr/0016)."""
    total = b.node("Add", [*sources], [f"{name}.sum"])
    inputs = [total, b.vector(f"{name}.weight", weight)]
    b.node("SimplifiedLayerNormalization", inputs, [name], axis=-1, epsilon=b.architecture.rms_epsilon)
    return name, total


def _head(b: _DecoderBuilder, source: str, head: Matrix) -> None:
    """Logits of the rows that were asked for: prefill needs one row of a head that is a fifth of the model."""
    b.constant("head.flat", [-1, b.architecture.hidden_size], np.int64)
    b.node("Reshape", [source, "head.flat"], ["head.rows"])
    b.node("Gather", ["head.rows", "logit_rows"], ["head.chosen"], axis=0)
    b.matmul("logits", "head.chosen", head)


def _model(b: _DecoderBuilder, cache_type: int) -> ModelProto:
    a = b.architecture
    cache: list[str | int | None] = ["B", a.kv_heads, "C", a.head_size]
    inputs = [
        helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["B", "S"]),
        helper.make_tensor_value_info("seqlens_k", TensorProto.INT32, ["B"]),
        helper.make_tensor_value_info("total_sequence_length", TensorProto.INT32, []),
        helper.make_tensor_value_info("logit_rows", TensorProto.INT64, ["R"]),
    ]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["R", a.vocab_size])]
    for i in range(a.layers):
        for part in ("key", "value"):
            inputs.append(helper.make_tensor_value_info(f"past_key_values.{i}.{part}", cache_type, cache))
            outputs.append(helper.make_tensor_value_info(f"present.{i}.{part}", cache_type, cache))
    return b.model("decoder", inputs, outputs)
