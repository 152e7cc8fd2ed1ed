"""What every pass leaves behind: constants in nodes, copies of values, the same work twice, and work for nothing."""

import numpy as np
from onnx import AttributeProto, GraphProto, NodeProto, TensorProto, numpy_helper

from forge.compiler.work import (
    STANDARD,
    Work,
    attributes_bytes,
    constants_of,
    graphs_of,
    rename_reads,
    repeats,
    replace_constants,
    replace_nodes,
)
from forge.onnx_file import reads_of

SHARED_BYTES = 1024
"""Equal constants up to this are one."""


def clean(work: Work) -> None:
    """All of it, in the main graph; what is inside loops stays but for constants in nodes."""
    graph = work.graph
    for inner in graphs_of(graph):
        store_constants(inner)
    _share_constants(graph)
    _merge_same(work)
    _skip_copies(work)
    drop_unread(graph)


def store_constants(graph: GraphProto) -> None:
    """Constant nodes become initializers."""
    kept = []
    for node in graph.node:
        tensor = _constant(node) if node.op_type == "Constant" and node.domain in STANDARD else None
        if tensor is None:
            kept.append(node)
        else:
            tensor.name = node.output[0]
            graph.initializer.append(tensor)
    if len(kept) < len(graph.node):
        replace_nodes(graph, kept)


def drop_unread(graph: GraphProto) -> None:
    """Remove nodes and constants whose values nobody reads."""
    wanted = {value.name for value in graph.output}
    kept: list[NodeProto] = []
    for node in reversed(graph.node):
        if wanted & set(node.output):
            wanted |= reads_of(node)
            kept.append(node)
    if len(kept) < len(graph.node):
        replace_nodes(graph, kept[::-1])
    inputs = {value.name for value in graph.input}
    replace_constants(graph, [t for t in graph.initializer if t.name in wanted or t.name in inputs])


def _constant(node: NodeProto) -> TensorProto | None:
    """What a Constant node holds, None when that is no plain tensor."""
    (attribute,) = node.attribute if len(node.attribute) == 1 else (AttributeProto(),)
    if attribute.name == "value":
        tensor = TensorProto()
        tensor.CopyFrom(attribute.t)
        return tensor
    kinds = {"value_float": "float32", "value_floats": "float32", "value_int": "int64", "value_ints": "int64"}
    if attribute.name not in kinds:
        return None
    single = {"value_float": attribute.f, "value_int": attribute.i}
    several = attribute.floats if attribute.name == "value_floats" else attribute.ints
    values = single.get(attribute.name, list(several))
    return numpy_helper.from_array(np.asarray(values, kinds[attribute.name]))


def _share_constants(graph: GraphProto) -> None:
    """Small equal constants become one."""
    first: dict[bytes, str] = {}
    renamed: dict[str, str] = {}
    outputs = {value.name for value in graph.output}
    for name, tensor in constants_of(graph).items():
        if len(tensor.raw_data) > SHARED_BYTES or name in outputs or tensor.data_type == TensorProto.STRING:
            continue
        key = bytes([tensor.data_type]) + repr(tuple(tensor.dims)).encode() + tensor.raw_data
        if first.setdefault(key, name) != name:
            renamed[name] = first[key]
    _rename(graph, renamed)


def _merge_same(work: Work) -> None:
    """Nodes that do the same with the same become one."""
    graph, first, renamed = work.graph, dict[tuple[object, ...], NodeProto](), dict[str, str]()
    outputs = {value.name for value in graph.output}
    for node in graph.node:
        rename_reads(node, renamed)
        if not repeats(node) or outputs & set(node.output):
            continue
        key = (node.op_type, node.domain, tuple(node.input), attributes_bytes(node))
        same = first.setdefault(key, node)
        if same is not node and len(same.output) == len(node.output) and all(same.output) and all(node.output):
            renamed |= dict(zip(node.output, same.output, strict=True))
            work.done["same work twice"] += 1
    _rename(graph, renamed)


def _skip_copies(work: Work) -> None:
    """Identity nodes leave; where one gives an output of the graph, the node before it gives that."""
    graph = work.graph
    outputs = {value.name for value in graph.output}
    makers = {name: node for node in graph.node for name in node.output if name}
    renamed: dict[str, str] = {}
    kept = []
    for node in graph.node:
        rename_reads(node, renamed)
        if node.op_type != "Identity" or node.domain not in STANDARD:
            kept.append(node)
        elif node.output[0] not in outputs:
            renamed[node.output[0]] = node.input[0]
        elif node.input[0] in makers and node.input[0] not in outputs:
            source, target = node.input[0], node.output[0]
            maker = makers[source]
            maker.output[list(maker.output).index(source)] = target
            makers[target] = maker
            renamed = {old: target if new == source else new for old, new in renamed.items()} | {source: target}
        else:
            kept.append(node)
    if len(kept) < len(graph.node):
        replace_nodes(graph, kept)
    _rename(graph, renamed)


def _rename(graph: GraphProto, renamed: dict[str, str]) -> None:
    if renamed:
        for node in graph.node:
            rename_reads(node, renamed)
