"""Loops of a known number of turns become their bodies, one after the other; a branch of a known condition its body.

onnxruntime runs every turn of Loop and Scan as a session of its own, with a cost per turn that a small body does not
outweigh, and optimises nothing across turns. A Loop is unrolled when its trip count is a constant and its condition is
always true, a Scan (operator set 9 and later) when the length of what it scans is known. Left alone, with the reason in
the notes: anything else, loops without a turn, and what would make the model larger than the limit of nodes.

Semantics: onnx/docs/Operators.md, Loop, Scan and If. A body's values get the loop's name and the number of their turn;
constants of a body are stored once. Scan inputs are sliced by Gather, scan outputs stacked by Concat.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from onnx import GraphProto, NodeProto, TensorProto, helper

from forge.compiler.shapes import Shape, infer_shapes
from forge.compiler.work import (
    STANDARD,
    Work,
    array_of,
    attribute_of,
    called,
    constants_of,
    count_nodes,
    rename_reads,
    replace_nodes,
)
from forge.onnx_file import bodies_of

SCAN_OPSET = 9
"""Scan of operator set 8 scans batches."""
Known = Mapping[str, TensorProto]
Shapes = Mapping[str, tuple[int, Shape]]


class _Left(Exception):  # noqa: N818  it is a finding, not an error
    """Why a node is left alone."""


@dataclass(slots=True)
class _Place:
    """Where a node is opened: the graph around it, the constants that are seen from there, and shapes."""

    work: Work
    graph: GraphProto
    known: Known
    shapes: Shapes
    turns_left: int
    """Nodes that may still be added."""


def unroll(work: Work) -> bool:
    """Open every node of every graph that can be opened; returns whether there was one."""
    total = sum(count_nodes(work.graph).values())
    return _unroll(_Place(work, work.graph, work.constants, infer_shapes(work), work.limits.nodes - total))


def _unroll(place: _Place) -> bool:
    nodes: list[NodeProto] = []
    changed = False
    for node in place.graph.node:
        for body in bodies_of(node):
            inner = _Place(place.work, body, {**place.known, **constants_of(body)}, place.shapes, place.turns_left)
            changed |= _unroll(inner)
            place.turns_left = inner.turns_left
        open_one = _OPENED.get(node.op_type) if node.domain in STANDARD else None
        opened = None
        if open_one is not None:
            try:
                opened = open_one(place, node)
            except _Left as reason:
                place.work.left[called(node)] = f"{node.op_type}: {reason}"
        if opened is None:
            nodes.append(node)
        else:
            nodes += opened
            place.work.done[f"{node.op_type} unrolled" if node.op_type != "If" else "If decided"] += 1
            place.work.left.pop(called(node), None)
            changed = True
    if changed:
        replace_nodes(place.graph, nodes)
    return changed


def _open_loop(place: _Place, node: NodeProto) -> list[NodeProto]:
    """Body inputs: turn, condition, carried values; outputs: condition, carried values, scan outputs."""
    body: GraphProto = attribute_of(node, "body")
    trips = _scalar(place.known, node.input[0] if node.input else "")
    if trips is None:
        raise _Left("its number of turns is computed")
    first = node.input[1] if len(node.input) > 1 else ""
    if first and _scalar(place.known, first) != 1:
        raise _Left("its first condition is computed or false")
    if not _always(body, place.known):
        raise _Left("its condition is computed")
    _check_cost(place, body, trips)
    carried = list(node.input[2:])
    stem, turns, stacks = called(node), [], [list[str]() for _ in node.output[len(carried) :]]
    held = _hold(place, stem, body)
    for turn in range(trips):
        given = {body.input[0].name: _index(place, turn), body.input[1].name: first or _truth(place)}
        given |= {value.name: name for value, name in zip(body.input[2:], carried, strict=True)}
        nodes, made = _turn(place, f"{stem}/{turn}", body, held | given)
        turns += nodes
        carried = made[1 : 1 + len(carried)]
        for stack, name in zip(stacks, made[1 + len(carried) :], strict=True):
            stack.append(name)
    turns += _copies(carried, node.output[: len(carried)])
    for stack, name in zip(stacks, node.output[len(carried) :], strict=True):
        turns += _stack(place, stack, name, 0)
    return turns


def _open_scan(place: _Place, node: NodeProto) -> list[NodeProto]:
    """Body inputs: carried values, slices; outputs: carried values, what is stacked."""
    body: GraphProto = attribute_of(node, "body")
    if place.work.opset < SCAN_OPSET:
        raise _Left(f"operator set {place.work.opset} scans batches; convert the model to {SCAN_OPSET} or later")
    scanned = attribute_of(node, "num_scan_inputs")
    carried, inputs = list(node.input[:-scanned]), list(node.input[-scanned:])
    axes = list(attribute_of(node, "scan_input_axes", [0] * scanned))
    trips = _length(place.shapes, inputs, axes)
    _check_cost(place, body, trips)
    backwards = list(attribute_of(node, "scan_input_directions", [0] * scanned))
    results = node.output[len(carried) :]
    stem, turns, stacks = called(node), [], [list[str]() for _ in results]
    held = _hold(place, stem, body)
    for turn in range(trips):
        given = {value.name: name for value, name in zip(body.input[: len(carried)], carried, strict=True)}
        for value, name, axis, back in zip(body.input[len(carried) :], inputs, axes, backwards, strict=True):
            taken = place.work.fresh(f"{stem}/{turn}/{value.name}")
            index = _index(place, trips - 1 - turn if back else turn)
            turns.append(helper.make_node("Gather", [name, index], [taken], name=taken, axis=axis))
            given[value.name] = taken
        nodes, made = _turn(place, f"{stem}/{turn}", body, held | given)
        turns += nodes
        carried = made[: len(carried)]
        for stack, name in zip(stacks, made[len(carried) :], strict=True):
            stack.append(name)
    turns += _copies(carried, node.output[: len(carried)])
    out_axes = attribute_of(node, "scan_output_axes", [0] * len(results))
    directions = attribute_of(node, "scan_output_directions", [0] * len(results))
    for stack, name, axis, back in zip(stacks, results, out_axes, directions, strict=True):
        turns += _stack(place, stack[::-1] if back else stack, name, axis)
    return turns


def _open_branch(place: _Place, node: NodeProto) -> list[NodeProto]:
    """The branch that a constant condition chooses."""
    condition = _scalar(place.known, node.input[0])
    if condition is None:
        raise _Left("its condition is computed")
    body: GraphProto = attribute_of(node, "then_branch" if condition else "else_branch")
    _check_cost(place, body, 1)
    nodes, made = _turn(place, called(node), body, _hold(place, called(node), body))
    return nodes + _copies(made, node.output)


_OPENED = {"Loop": _open_loop, "Scan": _open_scan, "If": _open_branch}


def _turn(place: _Place, stem: str, body: GraphProto, given: Mapping[str, str]) -> tuple[list[NodeProto], list[str]]:
    """The body's nodes once, under names of their own; returns them and the names of the body's outputs."""
    renamed, nodes = dict(given), []
    for name in (name for node in body.node for name in node.output if name):
        renamed[name] = place.work.fresh(f"{stem}/{name}")
    for node in body.node:
        copy = NodeProto()
        copy.CopyFrom(node)
        copy.name = place.work.fresh(f"{stem}/{node.name or node.op_type}")
        rename_reads(copy, renamed)
        for index, name in enumerate(copy.output):
            copy.output[index] = renamed.get(name, name)
        nodes.append(copy)
    return nodes, [renamed.get(value.name, value.name) for value in body.output]


def _hold(place: _Place, stem: str, body: GraphProto) -> dict[str, str]:
    """Store the body's constants in the graph around it; returns their names there."""
    renamed = {}
    for tensor in body.initializer:
        copy = place.graph.initializer.add()
        copy.CopyFrom(tensor)
        renamed[tensor.name] = copy.name = place.work.fresh(f"{stem}/{tensor.name}")
    return renamed


def _stack(place: _Place, names: Sequence[str], output: str, axis: int) -> list[NodeProto]:
    """`names` stacked along a new axis."""
    nodes = []
    for turn, name in enumerate(names):
        nodes.append(
            place.work.axes_node(place.graph, "Unsqueeze", name, axis, place.work.fresh(f"{output}/{turn}/row"))
        )
    rows = [node.output[0] for node in nodes]
    return [*nodes, helper.make_node("Concat", rows, [output], name=output, axis=axis)] if output else []


def _copies(sources: Sequence[str], targets: Sequence[str]) -> list[NodeProto]:
    return [
        helper.make_node("Identity", [source], [target], name=target)
        for source, target in zip(sources, targets, strict=True)
        if target
    ]


def _index(place: _Place, turn: int) -> str:
    return place.work.constant(place.graph, f"turn.{turn}", np.asarray(turn, np.int64))


def _truth(place: _Place) -> str:
    return place.work.constant(place.graph, "true", np.asarray(True))


def _scalar(known: Known, name: str) -> int | None:
    """The one number of a constant, None when it is no constant."""
    if name not in known or array_of(known[name]).size != 1:
        return None
    return int(array_of(known[name]).reshape(()))


def _always(body: GraphProto, known: Known) -> bool:
    """Whether the body's condition stays true."""
    makers = {name: node for node in body.node for name in node.output}
    inside = {**known, **constants_of(body)}
    name = body.output[0].name
    while name in makers and makers[name].op_type in ("Identity", "Cast"):
        name = makers[name].input[0]
    return name == body.input[1].name or _scalar(inside, name) == 1


def _length(shapes: Shapes, inputs: Sequence[str], axes: Sequence[int]) -> int:
    """How long the scanned inputs are."""
    for name, axis in zip(inputs, axes, strict=True):
        shape = shapes.get(name, (0, ()))[1]
        size = shape[axis] if -len(shape) <= axis < len(shape) else None
        if isinstance(size, int):
            return size
    raise _Left("the length of what it scans is not known; give the input a fixed shape with --fix")


def _check_cost(place: _Place, body: GraphProto, turns: int) -> None:
    if turns < 1:
        raise _Left("it makes no turn")
    if len(body.sparse_initializer):
        raise _Left("its body holds a sparse constant")
    added = turns * (sum(count_nodes(body).values()) + len(body.output))
    if added > place.turns_left:
        raise _Left(f"{turns} turns are {added} nodes, over what is left of the limit of {place.work.limits.nodes}")
    place.turns_left -= added
