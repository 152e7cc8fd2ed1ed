"""RMS norms that are spelt out become one node, with the sum before them where a residual is added.

onnxruntime fuses RMS norms by themselves when it loads a model; the sum before it does not fuse, as it does for
LayerNormalization. x * (1 / sqrt(mean(x^2) + epsilon)) * weight is SimplifiedLayerNormalization; with x = a + b of one
shape it is SkipSimplifiedLayerNormalization, which gives x too (docs/ContribOperators.md of onnxruntime).
"""

from collections.abc import Callable
from dataclasses import dataclass

from onnx import NodeProto, TensorProto, helper

from forge.compiler.shapes import Shape, infer_shapes
from forge.compiler.work import CONTRIB, STANDARD, Work, array_of, attribute_of, readers_of, replace_nodes
from forge.onnx_file import sort_nodes

SIMPLE, SKIP = "SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization"
SKIP_RANKS = (2, 3)


@dataclass(slots=True)
class _Graph:
    """The main graph by value: who makes it, who reads it."""

    work: Work
    makers: dict[str, NodeProto]
    readers: dict[str, list[int]]
    outputs: set[str]
    stored: dict[str, TensorProto]
    shapes: dict[str, tuple[int, Shape]]

    def size(self, name: str) -> int | str | None:
        """Of the last axis, of a float32 value."""
        kind, shape = self.shapes.get(name, (0, ()))
        return shape[-1] if shape and kind == TensorProto.FLOAT else None

    def maker(self, name: str, *kinds: str) -> NodeProto | None:
        """The node that makes `name` for one reader alone, when it is of these kinds."""
        node = self.makers.get(name)
        alone = len(self.readers.get(name, ())) == 1 and name not in self.outputs
        return node if node is not None and alone and node.op_type in kinds and node.domain in STANDARD else None

    def number(self, name: str) -> float | None:
        """A constant of one number."""
        if name not in self.stored or array_of(self.stored[name]).size != 1:
            return None
        return float(array_of(self.stored[name]).reshape(()))


def fuse_norms(work: Work) -> None:
    """In the main graph, float32."""
    _replace(work, _norm, "RMS norm fused")
    _replace(work, _skip_norm, "sum and norm fused")


Found = tuple[NodeProto, list[NodeProto]]
"""What stands for a node, and the other nodes that leave."""


def _replace(work: Work, match: Callable[[_Graph, NodeProto], Found | None], what: str) -> None:
    """Let what `match` makes of a node stand for it and for the nodes that it names."""
    graph = work.graph
    makers = {name: node for node in graph.node for name in node.output if name}
    outputs = {value.name for value in graph.output}
    view = _Graph(work, makers, readers_of(graph), outputs, work.constants, infer_shapes(work))
    gone: set[str] = set()
    fresh: dict[str, NodeProto] = {}
    for node in graph.node:
        found = match(view, node)
        if found is None:
            continue
        names = {name for leaving in (node, *found[1]) for name in leaving.output if name}
        if not names & gone:
            gone |= names
            fresh[node.output[0]] = found[0]
            work.done[what] += 1
    if not fresh:
        return
    kept = [
        fresh.get(node.output[0], node) for node in graph.node if node.output[0] in fresh or not gone & set(node.output)
    ]
    replace_nodes(graph, kept)
    sort_nodes(graph, {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer})


def _norm(view: _Graph, node: NodeProto) -> Found | None:
    """weight * (x * (1 / sqrt(mean(x * x) + epsilon))), or with x / sqrt(...)."""
    if node.op_type != "Mul" or node.domain not in STANDARD:
        return None
    for weight, scaled in (node.input, reversed(node.input)):
        shape = list(view.stored[weight].dims) if weight in view.stored else []
        inner = view.maker(scaled, "Mul", "Div")
        if len(shape) != 1 or inner is None or view.stored[weight].data_type != TensorProto.FLOAT:
            continue
        pairs = [tuple(inner.input)] if inner.op_type == "Div" else [tuple(inner.input), tuple(inner.input)[::-1]]
        for source, factor in pairs:
            found = _root(view, source, factor, divides=inner.op_type == "Div")
            if found is not None and view.size(source) == shape[0]:
                epsilon, nodes = found
                norm = helper.make_node(
                    SIMPLE, [source, weight], [node.output[0]], name=f"{node.output[0]}/{SIMPLE}", axis=-1,
                    epsilon=epsilon,
                )  # fmt: skip
                return norm, [inner, *nodes]
    return None


def _root(view: _Graph, source: str, factor: str, *, divides: bool) -> tuple[float, list[NodeProto]] | None:
    """epsilon and the nodes of sqrt(mean(source^2) + epsilon), or of its inverse when nothing divides by it."""
    nodes = []
    if not divides:
        inverse = view.maker(factor, "Div", "Reciprocal")
        if inverse is None or (inverse.op_type == "Div" and view.number(inverse.input[0]) != 1.0):
            return None
        nodes.append(inverse)
        factor = inverse.input[-1]
    root = view.maker(factor, "Sqrt")
    safe = view.maker(root.input[0], "Add") if root is not None else None
    if root is None or safe is None:
        return None
    epsilon = next((number for name in safe.input if (number := view.number(name)) is not None), None)
    mean = next((made for name in safe.input if (made := view.maker(name, "ReduceMean")) is not None), None)
    square = view.maker(mean.input[0], "Pow", "Mul") if mean is not None else None
    if epsilon is None or mean is None or square is None or square.input[0] != source or not _last_axis(view, mean):
        return None
    squares = view.number(square.input[1]) == 2.0 if square.op_type == "Pow" else square.input[1] == source
    return (epsilon, [*nodes, root, safe, mean, square]) if squares else None


def _last_axis(view: _Graph, mean: NodeProto) -> bool:
    axes = attribute_of(mean, "axes")
    if axes is None and len(mean.input) > 1 and mean.input[1] in view.stored:
        axes = array_of(view.stored[mean.input[1]]).tolist()
    rank = len(view.shapes.get(mean.input[0], (0, ()))[1])
    return attribute_of(mean, "keepdims", 1) == 1 and list(axes or ()) in ([-1], [rank - 1])


def _skip_norm(view: _Graph, node: NodeProto) -> Found | None:
    """The norm of a sum of two values of one shape, all of whose sizes are known by number or name."""
    if node.op_type != SIMPLE:
        return None
    add = view.makers.get(node.input[0])
    if add is None or add.op_type != "Add" or add.domain not in STANDARD or add.output[0] in view.outputs:
        return None
    first, second = (view.shapes.get(name, (0, ()))[1] for name in add.input)
    if first != second or None in first or len(first) not in SKIP_RANKS:
        return None
    fused = helper.make_node(
        SKIP, [*add.input, node.input[1]], [node.output[0], "", "", add.output[0]], domain=CONTRIB,
        name=f"{node.output[0]}/{SKIP}", epsilon=attribute_of(node, "epsilon", 1e-5),
    )  # fmt: skip
    return fused, [add]
