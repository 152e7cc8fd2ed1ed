"""Constant folding: what does not depend on inputs is computed once, by onnxruntime without its optimisations.

onnxruntime folds at load, too. Doing it ahead shows the trip counts of loops, and what a loop's unrolled body computes
from its own number. Invariant: no value is computed whose size shape inference did not tell before, and what would make
the file grow beyond the limit stays a computation. Left alone: chance, (de)quantisation, and what has graphs in it.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # before the import: the wheel phones home by default

import onnx
import onnxruntime as ort
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from forge.compiler.work import CONTRIB, Array, Work, array_of, called, readers_of, repeats, replace_nodes
from forge.onnx_file import BITS_OF, size_bytes_of

VALUE_LIMIT_BYTES = 256 << 20
"""Of one value."""
TOTAL_LIMIT_BYTES = 1 << 30
"""Of all values that are computed."""
SHAPE_BYTES = 4096
"""Constants up to this are shown to shape inference, which reads shapes from them."""
_LEFT = ("QuantizeLinear", "DequantizeLinear", "Identity")


@dataclass(slots=True)
class _Folding:
    """What is known while folding: constants as stored, values that were computed, by node and by name."""

    work: Work
    stored: dict[str, TensorProto]
    values: dict[str, Array] = field(default_factory=dict)
    folded: set[int] = field(default_factory=set)
    tried: set[int] = field(default_factory=set)
    room: int = TOTAL_LIMIT_BYTES

    def ready(self) -> list[int]:
        """Nodes that have only constant inputs and were not tried."""
        known = self.stored.keys() | self.values.keys() | {""}
        return [
            index
            for index, node in enumerate(self.work.graph.node)
            if index not in self.tried and _may_fold(node) and known >= set(node.input)
        ]

    def tensor(self, name: str) -> TensorProto:
        """A constant as a tensor."""
        return self.stored[name] if name in self.stored else numpy_helper.from_array(self.values[name], name)


def fold_constants(work: Work) -> bool:
    """Fold the main graph; returns whether anything changed."""
    folding = _Folding(work, work.constants)
    while level := folding.ready():
        folding.tried.update(level)
        for index, sizes in _sizes(folding, level).items():
            node = work.graph.node[index]
            if max(sizes) > VALUE_LIMIT_BYTES or sum(sizes) > folding.room:
                work.left[called(node)] = f"folding {node.op_type} would compute {sum(sizes)} bytes"
                continue
            found = _compute(folding, node)
            if found is None:
                work.left[called(node)] = f"onnxruntime does not compute {node.op_type} alone"
                continue
            folding.room -= sum(sizes)
            folding.folded.add(index)
            folding.values |= found
    _keep_small(folding)
    if not folding.folded:
        return False
    work.done["folded"] += len(folding.folded)
    kept = [node for index, node in enumerate(work.graph.node) if index not in folding.folded]
    for name in _border(folding):
        work.graph.initializer.append(numpy_helper.from_array(folding.values[name], name))
    replace_nodes(work.graph, kept)
    return True


def _may_fold(node: NodeProto) -> bool:
    plain = repeats(node) and node.domain != CONTRIB and node.op_type not in _LEFT
    return plain and bool(node.input) and any(node.output)


def _sizes(folding: _Folding, level: list[int]) -> dict[int, list[int]]:
    """By node, the bytes of its outputs; nodes whose sizes nobody can tell are left out."""
    nodes = [folding.work.graph.node[index] for index in level]
    stored, inputs = [], []
    for name in sorted({name for node in nodes for name in node.input if name}):
        tensor = folding.tensor(name)
        if size_bytes_of(tensor) <= SHAPE_BYTES:
            stored.append(tensor)
        else:
            inputs.append(helper.make_tensor_value_info(name, tensor.data_type, list(tensor.dims)))
    model = _model(folding.work, nodes, inputs, [], stored)
    try:  # without data_prop, which writes out a shape of as many sizes as a constant claims
        inferred = onnx.shape_inference.infer_shapes(model)
    except Exception:  # noqa: BLE001  onnx raises several unrelated types for what it cannot infer
        return {}
    told = {value.name: _bytes_of(value) for value in inferred.graph.value_info}
    sizes = {}
    for index in level:
        found = [told.get(name) for name in folding.work.graph.node[index].output if name]
        known = [size for size in found if size is not None]
        if len(known) == len(found):
            sizes[index] = known
    return sizes


def _bytes_of(value: ValueInfoProto) -> int | None:
    kind = value.type.tensor_type
    known = kind.HasField("shape") and all(size.HasField("dim_value") for size in kind.shape.dim)
    if not known or kind.elem_type not in BITS_OF:
        return None
    return size_bytes_of(TensorProto(data_type=kind.elem_type, dims=[size.dim_value for size in kind.shape.dim]))


def _compute(folding: _Folding, node: NodeProto) -> dict[str, Array] | None:
    """Outputs of a node of constants, None when onnxruntime cannot run it."""
    tensors = {name: folding.tensor(name) for name in node.input if name}
    outputs = [name for name in node.output if name]
    inputs = [helper.make_tensor_value_info(name, t.data_type, list(t.dims)) for name, t in tensors.items()]
    model = _model(folding.work, [node], inputs, [ValueInfoProto(name=name) for name in outputs], [])
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    try:
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        found = session.run(outputs, {name: array_of(tensor) for name, tensor in tensors.items()})
    except Exception:  # noqa: BLE001  onnxruntime raises a dozen unrelated types
        return None
    return dict(zip(outputs, found, strict=True)) if all(hasattr(value, "dtype") for value in found) else None


def _model(
    work: Work, nodes: list[NodeProto], inputs: list[ValueInfoProto], outputs: list[ValueInfoProto],
    stored: list[TensorProto],
) -> ModelProto:  # fmt: skip
    graph = helper.make_graph(nodes, "constants", inputs, outputs, stored)
    return helper.make_model(graph, opset_imports=list(work.model.opset_import), ir_version=work.model.ir_version)


def _keep_small(folding: _Folding) -> None:
    """Take nodes out of what is folded until the file grows by no more than the limit: first what adds most."""
    work = folding.work
    while True:
        freed = _freed(folding)
        border = list(_border(folding))
        if sum(folding.values[name].nbytes for name in border) - sum(freed.values()) <= work.limits.grown_bytes:
            return
        makers = {name: index for index in folding.folded for name in work.graph.node[index].output}
        adds = {name: folding.values[name].nbytes - _saves(folding, makers, name, freed) for name in border}
        worst = max(border, key=lambda name: (adds[name], name))
        folding.folded.discard(makers[worst])
        node = work.graph.node[makers[worst]]
        work.left[called(node)] = f"folding {node.op_type} would add {adds[worst]} bytes to the file"


def _saves(folding: _Folding, makers: dict[str, int], name: str, freed: dict[str, int]) -> int:
    """Bytes of the constants in `freed` that the value `name` was computed from."""
    pending, seen = [name], set[str]()
    while pending:
        value = pending.pop()
        if value not in seen and value in makers:
            pending += folding.work.graph.node[makers[value]].input
        seen.add(value)
    return sum(size for stored, size in freed.items() if stored in seen)


def _border(folding: _Folding) -> Iterator[str]:
    """Computed values that something reads which is not folded."""
    graph = folding.work.graph
    outputs, readers = {value.name for value in graph.output}, readers_of(graph)
    for index in sorted(folding.folded):
        for name in graph.node[index].output:
            read = set(readers.get(name, ())) - folding.folded
            if name and (read or name in outputs):
                yield name


def _freed(folding: _Folding) -> dict[str, int]:
    """Constants that only folded nodes read, and their bytes."""
    graph, readers = folding.work.graph, readers_of(folding.work.graph)
    outputs = {value.name for value in graph.output}
    return {
        name: size_bytes_of(tensor)
        for name, tensor in folding.stored.items()
        if name not in outputs and readers.get(name) and set(readers[name]) <= folding.folded
    }
