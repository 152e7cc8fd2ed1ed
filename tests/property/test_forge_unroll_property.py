"""Unrolled loops of random small bodies against onnxruntime's own run of the loops."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import GraphProto, ModelProto, NodeProto

sys.path.insert(0, str(Path(__file__).parents[1]))

from onnx_fixtures import BOOL, FLOAT, INT64, graph, model, node, random, run_plainly, value

from forge.compiler.compilation import run_passes
from forge.compiler.work import Limits, Work

SHAPE = (2, 3)
ONE, TWO = ("Neg", "Tanh", "Abs", "Identity"), ("Add", "Sub", "Mul", "Min")
Steps = list[tuple[int, int, int]]

steps = st.lists(st.tuples(st.integers(0, 7), st.integers(0, 50), st.integers(0, 50)), min_size=1, max_size=5)


def straight(prefix: str, readable: list[str], wanted: Steps) -> tuple[list[NodeProto], list[str]]:
    """Nodes that do one thing after the other to what is readable; returns them and all values there are then."""
    nodes, names = [], list(readable)
    for number, (kind, first, second) in enumerate(wanted):
        left, right, made = names[first % len(names)], names[second % len(names)], f"{prefix}{number}"
        operator = (*ONE, *TWO)[kind]
        nodes.append(node(operator, left if operator in ONE else f"{left} {right}", made))
        names.append(made)
    return nodes, names


def loop_body(prefix: str, outer: list[str], wanted: Steps, inner: NodeProto | None = None) -> GraphProto:
    """Two carried values and a scan output; it reads values of the graph around it, and the number of its turn."""
    p = prefix
    begun = [node("Cast", f"{p}turn", f"{p}number", to=FLOAT)]
    readable = [f"{p}a", f"{p}b", f"{p}number", *outer]
    if inner is not None:
        begun.append(inner)
        readable.append(inner.output[0])
    nodes, names = straight(p, readable, wanted)
    middle = names[len(names) // 2]
    ends = [
        node("Add", f"{names[-1]} {p}zeros", f"{p}a.out"),
        node("Sub", f"{middle} {p}a.out", f"{p}b.out"), node("Max", f"{p}b.out {p}a", f"{p}told"),
        node("Identity", f"{p}go", f"{p}going"),
    ]  # fmt: skip
    inputs = [value(f"{p}turn", [], INT64), value(f"{p}go", [], BOOL), value(f"{p}a"), value(f"{p}b")]
    outputs = [value(f"{p}going", [], BOOL), *(value(f"{p}{name}") for name in ("a.out", "b.out", "told"))]
    return graph([*begun, *nodes, *ends], inputs, outputs, **{f"{p}zeros": np.zeros(SHAPE, np.float32)})


def check(whole: ModelProto, feeds: dict[str, Any], gone: str) -> None:
    copy = ModelProto()
    copy.CopyFrom(whole)
    work = Work(copy, Limits())
    run_passes(work)
    assert gone not in {entry.op_type for entry in work.graph.node}
    for expected, found in zip(run_plainly(whole, feeds), run_plainly(work.model, feeds), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(outer=steps, inner=steps, turns=st.integers(1, 4), inner_turns=st.integers(1, 3), nested=st.booleans())
def test_unrolled_loops_give_what_the_loops_give(
    outer: Steps, inner: Steps, turns: int, inner_turns: int, nested: bool
) -> None:
    inside = None
    if nested:
        body = loop_body("i.", ["o.a", "x"], inner)
        inside = node("Loop", "inner.turns - o.b x", "i.first i.second i.all", body=body)
    body = loop_body("o.", ["x", "y"], outer, inside)
    loop = node("Loop", "turns - x y", "first second all", body=body)
    stored = {"turns": np.int64(turns), "inner.turns": np.int64(inner_turns)}
    inputs, outputs = [value("x", SHAPE), value("y", SHAPE)], [value(name) for name in ("first", "second", "all")]
    feeds = {"x": random(*SHAPE), "y": random(*SHAPE, seed=1)}
    check(model(graph([loop], inputs, outputs, **stored)), feeds, "Loop")


@settings(max_examples=40, deadline=None)
@given(
    wanted=steps, length=st.integers(1, 4), axis=st.integers(0, 2), back=st.integers(0, 1), out_axis=st.integers(0, 2)
)
def test_unrolled_scans_give_what_the_scans_give(
    wanted: Steps, length: int, axis: int, back: int, out_axis: int
) -> None:
    nodes, names = straight("s", ["held", "slice", "y"], wanted)
    nodes += [node("Add", f"{names[-1]} slice", "after"), node("Mul", f"{names[len(names) // 2]} held", "told")]
    body = graph(nodes, [value("held", SHAPE), value("slice", SHAPE)], [value("after", SHAPE), value("told", SHAPE)])
    scan = node(
        "Scan", "y x", "last all", num_scan_inputs=1, body=body, scan_input_axes=[axis], scan_input_directions=[back],
        scan_output_axes=[out_axis], scan_output_directions=[1 - back],
    )  # fmt: skip
    shape = [*SHAPE[:axis], length, *SHAPE[axis:]]
    whole = model(graph([scan], [value("x", shape), value("y", SHAPE)], [value("last"), value("all")]))
    check(whole, {"x": random(*shape), "y": random(*SHAPE, seed=1)}, "Scan")
