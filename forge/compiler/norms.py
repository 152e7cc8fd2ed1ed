"""Norms that hold a sum become the sum and the norm, which onnxruntime's CPU kernels do faster apart.

Exporters write SkipLayerNormalization and SkipSimplifiedLayerNormalization because GPUs want them (onnxruntime,
docs/ContribOperators.md). Measured with onnxruntime 1.32 on x86, 64 rows of 576 float32, in one and apart:
SkipSimplifiedLayerNormalization 41 and 16 us, SkipLayerNormalization 186 and 25 us; one row is alike. Norms that are
spelt out are left to onnxruntime, which makes single nodes of them when it loads a model.
"""

from onnx import NodeProto, TensorProto, helper

from forge.compiler.work import CONTRIB, Work, attribute_of, readers_of, replace_nodes

APART = {
    "SkipLayerNormalization": ("LayerNormalization", 3, 1e-12),
    "SkipSimplifiedLayerNormalization": ("SimplifiedLayerNormalization", 2, 1e-12),
}
"""By operator, the norm without the sum, how many inputs come before the bias of the sum, and the default epsilon."""
GAMMA, SUM_OUTPUT = 2, 3


def part_norms(work: Work) -> None:
    """In the main graph, float32; left alone when something reads the mean or the deviation."""
    graph, readers = work.graph, readers_of(work.graph)
    outputs = {value.name for value in graph.output}
    stored = work.constants
    nodes: list[NodeProto] = []
    for node in graph.node:
        parted = None
        if node.op_type in APART and node.domain == CONTRIB:
            gamma = stored.get(node.input[GAMMA])
            statistics = [name for name in node.output[1:SUM_OUTPUT] if name in readers or name in outputs]
            if gamma is not None and gamma.data_type == TensorProto.FLOAT and not statistics:
                parted = _parted(work, node)
                work.done["sum and norm parted"] += 1
        nodes += [node] if parted is None else parted
    replace_nodes(graph, nodes)


def _parted(work: Work, node: NodeProto) -> list[NodeProto]:
    kind, weights, epsilon = APART[node.op_type]
    inputs = list(node.input)
    total = node.output[SUM_OUTPUT] if len(node.output) > SUM_OUTPUT and node.output[SUM_OUTPUT] else ""
    total = total or work.fresh(f"{node.output[0]}/sum")
    bias = inputs[1 + weights] if len(inputs) > 1 + weights else ""
    first = work.fresh(f"{total}/unbiased") if bias else total
    nodes = [helper.make_node("Add", inputs[:2], [first], name=first)]
    if bias:
        nodes.append(helper.make_node("Add", [first, bias], [total], name=total))
    norm = [name for name in (total, *inputs[2 : 1 + weights]) if name]
    name = f"{node.output[0]}/{kind}"
    epsilon = attribute_of(node, "epsilon", epsilon)
    return [*nodes, helper.make_node(kind, norm, [node.output[0]], name=name, axis=-1, epsilon=epsilon)]
