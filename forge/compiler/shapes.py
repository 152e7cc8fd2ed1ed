"""Shapes of the main graph's values, by onnx's own inference; onnxruntime's operators are shown to it as ONNX ones."""

from collections.abc import Callable

import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from forge.compiler.work import CONTRIB, Work, attribute_of, graphs_of
from forge.onnx_file import size_bytes_of

Shape = tuple[int | str | None, ...]
"""Sizes as numbers or as names, which mean the same everywhere; None is unknown."""
SHOWN_BYTES = 1024


def infer_shapes(work: Work) -> dict[str, tuple[int, Shape]]:
    """By value, its ONNX element type and shape, in all graphs; values of unknown rank are left out."""
    shown = ModelProto(ir_version=work.model.ir_version, opset_import=work.model.opset_import)
    shown.graph.CopyFrom(_without_weights(work.graph))
    for index, node in enumerate(shown.graph.node):
        stand_in = _STAND_INS.get(node.op_type)
        if stand_in is not None and not (node.domain in ("", CONTRIB) and stand_in(shown.graph, index, node)):
            continue
    try:
        inferred = onnx.shape_inference.infer_shapes(shown)
    except Exception:  # noqa: BLE001  onnx raises several unrelated types for what it cannot infer
        inferred = shown
    found: dict[str, tuple[int, Shape]] = {}
    for graph in graphs_of(inferred.graph):
        for value in (*graph.input, *graph.output, *graph.value_info):
            if value.type.tensor_type.HasField("shape"):
                found[value.name] = (value.type.tensor_type.elem_type, _shape(value))
        found |= {tensor.name: (tensor.data_type, tuple(tensor.dims)) for tensor in graph.initializer}
    return found


def _shape(value: ValueInfoProto) -> Shape:
    return tuple(
        size.dim_value if size.HasField("dim_value") else size.dim_param or None
        for size in value.type.tensor_type.shape.dim
    )


def _without_weights(graph: GraphProto) -> GraphProto:
    """The graph with large constants as shapes alone."""
    copy = GraphProto()
    copy.CopyFrom(graph)
    for inner in graphs_of(copy):
        large = [tensor for tensor in inner.initializer if size_bytes_of(tensor) > SHOWN_BYTES]
        for tensor in large:
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            tensor.external_data.add(key="location", value="nowhere")
    return copy


def _matrix(graph: GraphProto, index: int, node: NodeProto) -> bool:
    """MatMulNBits is a MatMul with a matrix [K, N] of the scales' type."""
    sizes = [attribute_of(node, "K"), attribute_of(node, "N")]
    name = f"{node.output[0]}/matrix"
    scales = next((tensor.data_type for tensor in graph.initializer if tensor.name == node.input[2]), 1)
    graph.input.append(helper.make_tensor_value_info(name, scales, sizes))
    graph.node[index].CopyFrom(helper.make_node("MatMul", [node.input[0], name], [node.output[0]]))
    return True


def _same(graph: GraphProto, index: int, node: NodeProto) -> bool:
    """What keeps type and shape of its first input."""
    graph.node[index].CopyFrom(helper.make_node("Identity", [node.input[0]], [node.output[0]]))
    return True


def _rows(graph: GraphProto, index: int, node: NodeProto) -> bool:
    """GatherBlockQuantized is a Gather of float32 rows."""
    packed = next((tensor for tensor in graph.initializer if tensor.name == node.input[0]), None)
    if packed is None or len(packed.dims) != 2 or attribute_of(node, "gather_axis", 0):
        return False
    columns = packed.dims[1] * 8 // attribute_of(node, "bits", 4)
    name = f"{node.output[0]}/table"
    graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [packed.dims[0], columns]))
    graph.node[index].CopyFrom(helper.make_node("Gather", [name, node.input[1]], [node.output[0]], axis=0))
    return True


_STAND_INS: dict[str, Callable[[GraphProto, int, NodeProto], bool]] = {
    "MatMulNBits": _matrix, "GatherBlockQuantized": _rows, "SimplifiedLayerNormalization": _same, "QuickGelu": _same,
    "FastGelu": _same,
}  # fmt: skip
