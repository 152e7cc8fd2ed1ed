"""A model that is being compiled: its graph, new names, and the notes of what was done and what was left alone."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from forge.onnx_file import bodies_of, reads_of

STANDARD = ("", "ai.onnx")
"""Names of ONNX's own domain."""
CONTRIB = "com.microsoft"
CHANCE = frozenset(
    ("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial", "Dropout")
)
"""Operators that give something else every time."""

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Limits:
    """What compiling may cost. `grown_bytes` is how much larger folded constants may make the file."""

    nodes: int = 20_000
    grown_bytes: int = 1 << 20


@dataclass(slots=True)
class Work:
    """The model, changed in place by one pass after the other."""

    model: ModelProto
    limits: Limits
    done: Counter[str] = field(default_factory=Counter)
    """How often each thing was done."""
    left: dict[str, str] = field(default_factory=dict)
    """Name of what was left alone, and why."""
    _names: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        """Every name of the model is taken."""
        for graph in graphs_of(self.model.graph):
            self._names.update(value.name for value in (*graph.input, *graph.output, *graph.initializer))
            for node in graph.node:
                self._names.update(node.input, node.output, [node.name])

    @property
    def graph(self) -> GraphProto:
        """The main graph."""
        return self.model.graph

    @property
    def opset(self) -> int:
        """Version of ONNX's own operators."""
        return next((entry.version for entry in self.model.opset_import if entry.domain in STANDARD), 1)

    @property
    def constants(self) -> dict[str, TensorProto]:
        """What the main graph stores and no caller can replace."""
        return constants_of(self.graph)

    def fresh(self, stem: str) -> str:
        """A name that the model has not."""
        name, number = stem, 1
        while name in self._names:
            name, number = f"{stem}.{number}", number + 1
        self._names.add(name)
        return name

    def constant(self, graph: GraphProto, stem: str, values: Array) -> str:
        """Store `values` in `graph`."""
        name = self.fresh(stem)
        graph.initializer.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    def axes_node(self, graph: GraphProto, kind: str, value: str, axis: int, output: str) -> NodeProto:
        """Unsqueeze or Squeeze of one axis, as this operator set writes it."""
        if self.opset < 13:
            return helper.make_node(kind, [value], [output], name=output, axes=[axis])
        axes = self.constant(graph, f"{output}.axes", np.asarray([axis], np.int64))
        return helper.make_node(kind, [value, axes], [output], name=output)


def graphs_of(graph: GraphProto) -> Iterator[GraphProto]:
    """`graph` and all graphs inside it."""
    yield graph
    for node in graph.node:
        for body in bodies_of(node):
            yield from graphs_of(body)


def constants_of(graph: GraphProto) -> dict[str, TensorProto]:
    """Initializers by name, without those that are the default of an input."""
    inputs = {value.name for value in graph.input}
    return {tensor.name: tensor for tensor in graph.initializer if tensor.name not in inputs}


def array_of(tensor: TensorProto) -> Array:
    """The numbers of a tensor that lies inside the model."""
    array: Array = numpy_helper.to_array(tensor)
    return array


def count_nodes(graph: GraphProto) -> Counter[str]:
    """Nodes by operator, those inside loops and branches too."""
    return Counter(node.op_type for inner in graphs_of(graph) for node in inner.node)


def attribute_of(node: NodeProto, name: str, default: Any = None) -> Any:
    """The value of an attribute."""
    found = next((attribute for attribute in node.attribute if attribute.name == name), None)
    return default if found is None else helper.get_attribute_value(found)


def repeats(node: NodeProto) -> bool:
    """Whether `node` gives the same for the same inputs, as far as its domain is known."""
    known = node.domain in (*STANDARD, CONTRIB)
    return known and node.op_type not in CHANCE and not any(bodies_of(node))


def called(node: NodeProto) -> str:
    """How people find `node`."""
    return node.name or next((name for name in node.output if name), node.op_type)


def readers_of(graph: GraphProto) -> dict[str, list[int]]:
    """By value, the positions of the nodes of `graph` that read it, themselves or by a graph in them."""
    readers: dict[str, list[int]] = {}
    for index, node in enumerate(graph.node):
        for name in reads_of(node):
            readers.setdefault(name, []).append(index)
    return readers


def rename_reads(node: NodeProto, renamed: Mapping[str, str]) -> None:
    """Let `node`, and the graphs in it, read other names."""
    for index, name in enumerate(node.input):
        if name in renamed:
            node.input[index] = renamed[name]
    for body in bodies_of(node):
        own = {value.name for value in body.input} | {tensor.name for tensor in body.initializer}
        own.update(name for inner in body.node for name in inner.output)
        seen = {old: new for old, new in renamed.items() if old not in own}
        for inner in body.node:
            rename_reads(inner, seen)
        for value in body.output:
            value.name = seen.get(value.name, value.name)


def replace_nodes(graph: GraphProto, nodes: list[NodeProto]) -> None:
    """Let these be the nodes of `graph`."""
    kept = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(kept)


def replace_constants(graph: GraphProto, kept: list[TensorProto]) -> None:
    """Let these be the initializers of `graph`."""
    if len(kept) == len(graph.initializer):
        return
    names = {tensor.name for tensor in kept}
    for index in reversed(range(len(graph.initializer))):
        if graph.initializer[index].name not in names:
            del graph.initializer[index]


def attributes_bytes(node: NodeProto) -> bytes:
    """The attributes of `node`, comparable."""
    ordered: list[AttributeProto] = sorted(node.attribute, key=lambda attribute: str(attribute.name))
    return b"".join(attribute.SerializeToString(deterministic=True) for attribute in ordered)
