"""A checkpoint's matrices, stacked and quantised (or kept in float), placed in weights.bin and handed to the graph."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from forge.checkpoint import Checkpoint
from forge.graph import Layer, Matrix, Weights
from forge.quantise import Float, Int4Matrix, quantise_int4
from forge.weights import WeightsWriter
from wire.manifest import Dtype, Layout

Progress = Callable[[str, int, int], None]
"""Called with (what, done, of)."""


@dataclass(slots=True)
class _Placer:
    """Places matrices quantised, or in float as trained."""

    writer: WeightsWriter
    base_scales: Mapping[str, Float]
    quantise: bool

    def matrix(self, name: str, weights: Float) -> Matrix:
        rows, columns = weights.shape
        if not self.quantise:
            dense = self.writer.add(f"{name}.weight", np.ascontiguousarray(weights.T), Layout.F32)
            return Matrix(rows, columns, dense=dense)
        return place_int4(self.writer, name, quantise_int4(name, weights, self.base_scales.get(f"{name}.scales")))


def place_int4(writer: WeightsWriter, name: str, matrix: Int4Matrix) -> Matrix:
    """Place a quantised matrix as two tensors, `name`.packed and `name`.scales."""
    rows, columns = matrix.shape
    packed = writer.add(f"{name}.packed", matrix.packed, Layout.BYTES, dtype=Dtype.U4, shape=(rows, columns))
    scales = writer.add(f"{name}.scales", matrix.scales, Layout.F32_BF16_GRID)
    return Matrix(rows, columns, packed=packed, scales=scales)


def place_weights(
    checkpoint: Checkpoint, writer: WeightsWriter, *, base_scales: Mapping[str, Float] | None = None,
    quantise: bool = True, progress: Progress | None = None,
) -> Weights:  # fmt: skip
    """Read, transform and place every weight of `checkpoint`; `base_scales` by tensor name (see quantise_int4)."""
    a = checkpoint.architecture
    placer = _Placer(writer, base_scales or {}, quantise)
    table = checkpoint.tensor("model.embed_tokens.weight", (a.vocab_size, a.hidden_size))
    embedding = placer.matrix("model.embed_tokens", table) if quantise else _float_embedding(writer, table)
    layers = []
    for i in range(a.layers):
        if progress is not None:
            progress("quantise" if quantise else "read", i, a.layers)
        layers.append(_place_layer(checkpoint, placer, i))
    norm = writer.add("model.norm", checkpoint.tensor("model.norm.weight", (a.hidden_size,)), Layout.F32)
    if a.tied_head:
        head = embedding if quantise else placer.matrix("lm_head", table)
    else:
        head = placer.matrix("lm_head", checkpoint.tensor("lm_head.weight", (a.vocab_size, a.hidden_size)))
    return Weights(embedding, layers, norm, head)


def _float_embedding(writer: WeightsWriter, table: Float) -> Matrix:
    placed = writer.add("model.embed_tokens.weight", table, Layout.F32)
    return Matrix(table.shape[0], table.shape[1], dense=placed)


def _place_layer(checkpoint: Checkpoint, placer: _Placer, i: int) -> Layer:
    a, stem, name = checkpoint.architecture, f"model.layers.{i}", f"layers.{i}"
    q, kv = a.heads * a.head_size, a.kv_heads * a.head_size

    def read(part: str, rows: int, columns: int) -> Float:
        return checkpoint.tensor(f"{stem}.{part}.weight", (rows, columns))

    def norm(part: str) -> NDArray[np.float32]:
        return checkpoint.tensor(f"{stem}.{part}.weight", (a.hidden_size,))

    qkv = np.concatenate(
        [read("self_attn.q_proj", q, a.hidden_size), read("self_attn.k_proj", kv, a.hidden_size),
         read("self_attn.v_proj", kv, a.hidden_size)]
    )  # fmt: skip
    gate_up = np.concatenate(
        [read("mlp.gate_proj", a.mlp_size, a.hidden_size), read("mlp.up_proj", a.mlp_size, a.hidden_size)]
    )
    add = placer.writer.add
    return Layer(
        input_norm=add(f"{name}.input_norm", norm("input_layernorm"), Layout.F32),
        qkv=placer.matrix(f"{name}.qkv", qkv),
        output=placer.matrix(f"{name}.output", read("self_attn.o_proj", a.hidden_size, q)),
        post_norm=add(f"{name}.post_norm", norm("post_attention_layernorm"), Layout.F32),
        gate_up=placer.matrix(f"{name}.gate_up", gate_up),
        down=placer.matrix(f"{name}.down", read("mlp.down_proj", a.hidden_size, a.mlp_size)),
    )
