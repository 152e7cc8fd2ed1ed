"""The ONNX graph of a BERT encoder after the graph contract (docs/design.md section 6): tokens to embeddings.

Texts come padded to one length, but only attention sees the padding. Everything else runs on the rows of real tokens,
[T, hidden]: gathered behind `attention_mask` before the first norm, spread out again for each layer's attention. On a
CPU matrices are most of an encoder's work and cost the same per row whatever the batch, so that a row of padding costs
as much as a token (the idea is ByteTransformer's, arXiv 2210.03052; onnxruntime's RemovePadding has no CPU kernel).

Pooling and normalisation are nodes of the graph: the golden vectors judge them with the rest, hidden states of every
token never leave onnxruntime, and any client of the file gets the embedding that the model's card means.
"""

from dataclasses import dataclass, field

import numpy as np
from onnx import ModelProto, TensorProto, helper

from forge.encoder_checkpoint import EncoderArchitecture
from forge.graph_builder import CONTRIB, GraphBuilder, Matrix
from forge.integers import IntegerMatrix, multiply
from forge.weights import Placed
from wire.manifest import Pooling


@dataclass(slots=True)
class _EncoderBuilder(GraphBuilder):
    """With what only encoders have."""

    architecture: EncoderArchitecture = field(kw_only=True)


@dataclass(frozen=True, slots=True)
class Linear:
    """A matrix with its bias [rows], which a later operation adds."""

    matrix: Matrix | IntegerMatrix
    bias: Placed


@dataclass(frozen=True, slots=True)
class Norm:
    """A layer norm's vectors."""

    weight: Placed
    bias: Placed


@dataclass(frozen=True, slots=True)
class EncoderLayer:
    """Weights of one layer; query, key and value are stacked, so that they are one MatMul."""

    qkv: Linear
    output: Linear
    attention_norm: Norm
    up: Linear
    down: Linear
    mlp_norm: Norm


@dataclass(frozen=True, slots=True)
class EncoderWeights:
    """Everything that the graph needs from weights.bin; `positions` [max_tokens, hidden] includes the token type's."""

    words: Matrix
    positions: Placed
    norm: Norm
    layers: list[EncoderLayer]


def build_encoder_graph(architecture: EncoderArchitecture, weights: EncoderWeights) -> ModelProto:
    """The encoder graph; deterministic for the same input."""
    b = _EncoderBuilder(architecture=architecture)
    _find_rows(b)
    b.constant("flat_hidden", [-1, architecture.hidden_size], np.int64)
    word = b.embed("embeddings.words", "token_ids", weights.words)
    position = b.node("Gather", [b.vector("positions.table", weights.positions), "positions"], ["embeddings.position"])
    rows = _norm(b, attention_source(0), [word, position], weights.norm)
    for i, layer in enumerate(weights.layers):
        name = f"layers.{i}"
        attended = _attention(b, f"{name}.attention", rows, layer)
        added = multiply(b, f"{name}.output", attended, layer.output.matrix)
        rows = _norm(b, mlp_source(i), [added, rows], layer.attention_norm, layer.output.bias)
        up = multiply(b, f"{name}.up", rows, layer.up.matrix)
        active = b.node(
            architecture.activation, [up, b.vector(f"{name}.up.bias", layer.up.bias)], [f"{name}.active"], CONTRIB
        )
        added = multiply(b, f"{name}.down", active, layer.down.matrix)
        rows = _norm(b, attention_source(i + 1), [added, rows], layer.mlp_norm, layer.down.bias)
    _pool(b, rows)
    texts: list[str | int | None] = ["B", "S"]
    inputs = [helper.make_tensor_value_info(n, TensorProto.INT64, texts) for n in ("input_ids", "attention_mask")]
    output = helper.make_tensor_value_info("embeddings", TensorProto.FLOAT, ["B", architecture.hidden_size])
    return b.model("encoder", inputs, [output])


def attention_source(layer: int) -> str:
    """Name of what a layer's query, key and value are made of."""
    return f"layers.{layer - 1}.mlp_norm" if layer else "embeddings.norm"


def mlp_source(layer: int) -> str:
    """Name of what a layer's MLP begins with."""
    return f"layers.{layer}.attention_norm"


def _find_rows(b: GraphBuilder) -> None:
    """Where real tokens are: `real` [T] in the flat B*S, and `spread` [B, S], the row of each place or any for padding.

    Also `lengths` [B], `token_ids` [T] and `positions` [T].
    """
    for name, value in (("flat", [-1]), ("axis_0", [0]), ("axis_1", [1])):
        b.constant(name, value, np.int64)
    for name, number in (("zero", 0), ("one", 1)):
        b.constant(name, number, np.int64)
    b.node("Shape", ["input_ids"], ["shape"])
    b.node("Gather", ["shape", "one"], ["longest"], axis=0)
    b.node("Cast", ["attention_mask"], ["mask"], to=TensorProto.INT32)
    b.node("ReduceSum", ["mask", "axis_1"], ["lengths"], keepdims=0)
    b.node("Reshape", ["attention_mask", "flat"], ["flat_mask"])
    b.node("NonZero", ["flat_mask"], ["real_rows"])
    b.node("Squeeze", ["real_rows", "axis_0"], ["real"])
    b.node("Reshape", ["input_ids", "flat"], ["flat_ids"])
    b.node("Gather", ["flat_ids", "real"], ["token_ids"], axis=0)
    b.node("Mod", ["real", "longest"], ["positions"])
    b.node("CumSum", ["flat_mask", "zero"], ["counted"])
    b.node("Sub", ["counted", "one"], ["row_before"])
    b.node("Max", ["row_before", "zero"], ["row"])
    b.node("Reshape", ["row", "shape"], ["spread"])


def _norm(b: _EncoderBuilder, name: str, sources: list[str], norm: Norm, bias: Placed | None = None) -> str:
    """Layer norm of the sum of both sources, and of the bias of the matrix before it; apart, which is faster than in
    one node (docs/adr/0016)."""
    total = b.node("Add", sources, [f"{name}.sum"])
    if bias is not None:
        total = b.node("Add", [total, b.vector(f"{name}.bias", bias)], [f"{name}.biased"])
    inputs = [total, b.vector(f"{name}.weight", norm.weight), b.vector(f"{name}.shift", norm.bias)]
    return b.node("LayerNormalization", inputs, [name], axis=-1, epsilon=b.architecture.norm_epsilon)


def _attention(b: _EncoderBuilder, name: str, rows: str, layer: EncoderLayer) -> str:
    """Attention of every token to the tokens of its text."""
    qkv = multiply(b, f"{name}.qkv", rows, layer.qkv.matrix)
    b.node("Gather", [qkv, "spread"], [f"{name}.spread"], axis=0)
    parts = [f"{name}.{part}" for part in ("query", "key", "value")]
    b.node("Split", [f"{name}.spread"], parts, axis=-1, num_outputs=3)
    bias = b.vector(f"{name}.bias", layer.qkv.bias)
    b.node("MultiHeadAttention", [*parts, bias, "lengths"], [f"{name}.mixed"], CONTRIB, num_heads=b.architecture.heads)
    b.node("Reshape", [f"{name}.mixed", "flat_hidden"], [f"{name}.rows"])
    return b.node("Gather", [f"{name}.rows", "real"], [name], axis=0)


def _pool(b: _EncoderBuilder, rows: str) -> None:
    a = b.architecture
    pooled = "pooled" if a.normalised else "embeddings"
    if a.pooling is Pooling.CLS:
        b.node("Gather", ["spread", "zero"], ["first_rows"], axis=1)
        b.node("Gather", [rows, "first_rows"], [pooled], axis=0)
    else:
        _mean(b, rows, pooled)
    if a.normalised:
        b.node("LpNormalization", ["pooled"], ["embeddings"], axis=-1, p=2)


def _mean(b: GraphBuilder, rows: str, name: str) -> None:
    """The mean of each text's rows."""
    b.node("Gather", [rows, "spread"], ["tokens"], axis=0)
    b.node("Cast", ["mask"], ["weight"], to=TensorProto.FLOAT)
    b.node("Unsqueeze", ["weight", "flat"], ["weights"])
    b.node("Mul", ["tokens", "weights"], ["weighted"])
    b.node("ReduceSum", ["weighted", "axis_1"], ["summed"], keepdims=0)
    b.node("ReduceSum", ["weight", "axis_1"], ["count"], keepdims=1)
    b.node("Div", ["summed", "count"], [name])
