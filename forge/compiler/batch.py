"""Products of slices become slices of one product: what an unrolled Scan does to its input in every turn.

MatMul(Gather(x, turn), W) for many turns is Gather(MatMul(x, W), turn), and so with the Add of a constant to every
column after it. The sum of each column is as before; a larger product may be computed by another kernel.
"""

from dataclasses import dataclass

from onnx import NodeProto, helper

from forge.compiler.shapes import Shape, infer_shapes
from forge.compiler.work import STANDARD, Work, array_of, attribute_of, replace_nodes

LEAST_TURNS = 2
LEAST_SHARE = 0.5
"""Of the slices along the axis that must be wanted: the others are computed for nothing."""
RANKS = {"MatMul": (2,), "Add": (1,)}
"""Of the constant, by operator."""


@dataclass(slots=True)
class _Slice:
    """`node` does something to the slice `source`[index] with a constant."""

    node: NodeProto
    gather: NodeProto
    constant: str


def batch_slices(work: Work) -> None:
    """In the main graph, as long as there is something."""
    while _batch(work):
        continue


def _batch(work: Work) -> bool:
    graph, shapes = work.graph, infer_shapes(work)
    outputs = {value.name for value in graph.output}
    stored = work.constants
    gathers = {node.output[0]: node for node in graph.node if node.op_type == "Gather" and node.domain in STANDARD}
    groups: dict[tuple[str, str, str, int], list[_Slice]] = {}
    for node in graph.node:
        for source, constant in (tuple(node.input), tuple(node.input)[::-1]) if len(node.input) == 2 else ():
            gather = gathers.get(source)
            ranks = RANKS.get(node.op_type, ()) if node.domain in STANDARD else ()
            fits = gather is not None and constant in stored and len(stored[constant].dims) in ranks
            if not fits or gather is None or (node.op_type == "MatMul" and source != node.input[0]):
                continue
            axis = attribute_of(gather, "axis", 0)
            if gather.input[1] in stored and not stored[gather.input[1]].dims and node.output[0] not in outputs:
                groups.setdefault((node.op_type, gather.input[0], constant, axis), []).append(
                    _Slice(node, gather, constant)
                )
    for (kind, source, constant, axis), slices in groups.items():
        turns = {int(array_of(stored[found.gather.input[1]])) for found in slices}
        shape = shapes.get(source, (0, ()))[1]
        if _worth(shape, axis, turns) and _same_width(kind, shape, list(stored[constant].dims)):
            _replace(work, slices, axis % len(shape))
            work.done[f"{kind} of slices batched"] += len(slices)
            return True
    return False


def _worth(shape: Shape, axis: int, turns: set[int]) -> bool:
    """Whether enough slices along an axis before the last are wanted."""
    if not -len(shape) <= axis < len(shape) or axis % len(shape) == len(shape) - 1:
        return False
    size = shape[axis]
    return isinstance(size, int) and len(turns) >= max(LEAST_TURNS, LEAST_SHARE * size)


def _same_width(kind: str, shape: Shape, constant: list[int]) -> bool:
    """An Add must not widen its input, which slicing would undo."""
    return kind == "MatMul" or shape[-1] == constant[0]


def _replace(work: Work, slices: list[_Slice], axis: int) -> None:
    first = slices[0]
    whole = work.fresh(f"{first.node.output[0]}/whole")
    source = first.gather.input[0]
    gone = {found.node.output[0]: found for found in slices}
    nodes: list[NodeProto] = []
    for node in work.graph.node:
        found = gone.get(node.output[0])
        if found is None:
            nodes.append(node)
            continue
        if found is first:
            made = helper.make_node(node.op_type, [source, first.constant], [whole], name=whole)
            nodes.append(made)
        index = found.gather.input[1]
        nodes.append(helper.make_node("Gather", [whole, index], [node.output[0]], name=node.name, axis=axis))
    replace_nodes(work.graph, nodes)
