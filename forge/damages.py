"""A float32 twin with parts of it damaged, one at a time: what golden vectors are chosen and judged by.

A damage replaces one tensor of the graph. The tensors that damages replace are inputs of one session, with what is
right as their default, so that trying a damage costs a run and no load. A layer has two: each of its halves ends with a
matrix without which it adds nothing, whatever else of the half is wrong.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper

from forge.graph import ROTARY_FREQUENCIES, ROTARY_LIMIT
from forge.quantise import Float

DECODER_HALVES = {"attention": "model.layers.{}.attention.output", "mlp": "model.layers.{}.mlp.down"}
ENCODER_HALVES = {"attention": "layers.{}.output", "mlp": "layers.{}.down"}
"""By half of a layer, the name of the value that its last matrix makes."""
PRODUCT = ".product"
"""Ends the name of what an int8 matrix makes before its scale (forge/integers.py)."""
WINDOW_TOKENS = 64
"""What is left of a text, as if the attention looked back no further."""
ROTARY_STRETCH = 10.0
"""Times the base of the rotary positions, as a checkpoint for a longer context would have it."""


@dataclass(frozen=True, slots=True)
class Damage:
    """What is wrong, for people, and the tensors of the graph that make it so, or how much of the text is left."""

    name: str
    tensors: Mapping[str, Float]
    window: int = 0
    """Last tokens of a text that are read; 0: all."""


def decoder_damages(twin: ModelProto, layers: int, longest: int) -> list[Damage]:
    """Every half of every layer left out, rotary positions of another base and, where texts are long enough for it to
    show, only their last tokens read. Makes inputs of `twin` of what they replace, and its rotary tables as short as
    texts of `longest` tokens allow, since they are now made in every run.
    """
    stored = {tensor.name: tensor for tensor in twin.graph.initializer}
    stored[ROTARY_LIMIT].CopyFrom(numpy_helper.from_array(np.asarray(longest, np.float32), ROTARY_LIMIT))
    right = numpy_helper.to_array(stored[ROTARY_FREQUENCIES])
    steps = np.linspace(0, 1, right.size, endpoint=False).reshape(right.shape)
    stretched = (right * ROTARY_STRETCH**-steps).astype(np.float32)
    _let_replace(twin, stored[ROTARY_FREQUENCIES])
    damages = [*_left_out(twin, layers, DECODER_HALVES), Damage("rotary positions", {ROTARY_FREQUENCIES: stretched})]
    return [*damages, Damage("a window", {}, WINDOW_TOKENS)] if longest >= 2 * WINDOW_TOKENS else damages


def encoder_damages(twin: ModelProto, layers: int) -> list[Damage]:
    """Every half of every layer left out, as in decoder_damages."""
    return _left_out(twin, layers, ENCODER_HALVES)


def _left_out(twin: ModelProto, layers: int, halves: Mapping[str, str]) -> list[Damage]:
    """A damage for each half of each layer: its last matrix is zero."""
    stored = {tensor.name: tensor for tensor in twin.graph.initializer}
    makers = {node.output[0].removesuffix(PRODUCT): node for node in twin.graph.node if node.op_type == "MatMul"}
    damages = []
    for i in range(layers):
        for half, name in halves.items():
            matrix = stored[makers[name.format(i)].input[1]]
            _let_replace(twin, matrix)
            zeros = np.zeros(tuple(matrix.dims), np.float32)
            damages.append(Damage(f"layer {i} without its {half}", {matrix.name: zeros}))
    return damages


def _let_replace(twin: ModelProto, tensor: TensorProto) -> None:
    """Make an input of a tensor whose default is what it holds."""
    twin.graph.input.append(helper.make_tensor_value_info(tensor.name, TensorProto.FLOAT, tuple(tensor.dims)))
