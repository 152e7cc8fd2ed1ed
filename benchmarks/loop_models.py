"""Small models with loops, as exporters write them: a GRU cell as Scan, and a refinement of eight turns as Loop."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from onnx import GraphProto, ModelProto, TensorProto, ValueInfoProto, helper

from forge.graph_builder import GraphBuilder

HIDDEN, WIDTH = 64, 32
STEPS, TURNS = 32, 8

Array = np.ndarray[Any, Any]


@dataclass(slots=True)
class _Graph(GraphBuilder):
    """A graph, or the body of a loop."""

    chance: np.random.Generator = field(default_factory=lambda: np.random.default_rng(5))

    def weights(self, name: str, *shape: int) -> str:
        """A matrix of small numbers."""
        return self.constant(name, 0.1 * self.chance.standard_normal(shape), np.float32)

    def then(self, kind: str, inputs: str, output: str, **attributes: Any) -> str:
        """A node; names between spaces."""
        return self.node(kind, inputs.split(), output.split(), **attributes)

    def body(self, inputs: list[ValueInfoProto], outputs: list[ValueInfoProto]) -> GraphProto:
        """As the attribute of a loop."""
        return helper.make_graph(self.nodes, "body", inputs, outputs, self.initializers)


def gru_scan() -> tuple[ModelProto, dict[str, Array]]:
    """A GRU over STEPS inputs of WIDTH, one at a time, and its inputs."""
    cell = _Graph()
    cell.weights("R", HIDDEN, 3 * HIDDEN)
    cell.then("MatMul", "x W", "seen")
    cell.then("MatMul", "h R", "kept")
    cell.then("Split", "seen", "xz xr xn", axis=-1, num_outputs=3)
    cell.then("Split", "kept", "hz hr hn", axis=-1, num_outputs=3)
    for gate in ("z", "r"):
        cell.then("Add", f"x{gate} h{gate}", f"{gate}.sum")
        cell.then("Sigmoid", f"{gate}.sum", gate)
    cell.then("Mul", "r hn", "reset")
    cell.then("Add", "xn reset", "n.sum")
    cell.then("Tanh", "n.sum", "n")
    cell.then("Sub", "h n", "difference")
    cell.then("Mul", "z difference", "part")
    cell.then("Add", "n part", "h.next")
    cell.then("Identity", "h.next", "y.one")
    row = [_value("h", 1, HIDDEN), _value("x", 1, WIDTH)]
    body = cell.body(row, [_value("h.next", 1, HIDDEN), _value("y.one", 1, HIDDEN)])
    whole = _Graph()
    whole.weights("W", WIDTH, 3 * HIDDEN)
    whole.then("Scan", "h.first xs", "h.last ys", num_scan_inputs=1, body=body)
    inputs = [_value("h.first", 1, HIDDEN), _value("xs", STEPS, 1, WIDTH)]
    outputs = [_value("h.last", 1, HIDDEN), _value("ys", STEPS, 1, HIDDEN)]
    feeds = {"h.first": np.zeros((1, HIDDEN), np.float32), "xs": _random(STEPS, 1, WIDTH)}
    return whole.model("gru", inputs, outputs), feeds


def refinement_loop() -> tuple[ModelProto, dict[str, Array]]:
    """An estimate that TURNS turns refine by a small network, less each time, and its input."""
    turn = _Graph()
    turn.constant("one", 1, np.float32)
    turn.then("MatMul", "estimate A", "hidden")
    turn.then("Tanh", "hidden", "bent")
    turn.then("MatMul", "bent B", "change")
    turn.then("Cast", "number", "count", to=TensorProto.FLOAT)
    turn.then("Add", "count one", "share")
    turn.then("Div", "change share", "less")
    turn.then("Add", "estimate less", "better")
    turn.then("Identity", "go", "going")
    number = helper.make_tensor_value_info("number", TensorProto.INT64, [])
    conditions = [helper.make_tensor_value_info(name, TensorProto.BOOL, []) for name in ("go", "going")]
    body = turn.body([number, conditions[0], _value("estimate", 1, WIDTH)], [conditions[1], _value("better", 1, WIDTH)])
    whole = _Graph()
    whole.weights("A", WIDTH, HIDDEN)
    whole.weights("B", HIDDEN, WIDTH)
    whole.constant("turns", TURNS, np.int64)
    whole.node("Loop", ["turns", "", "x"], ["y"], body=body)
    model = whole.model("refinement", [_value("x", 1, WIDTH)], [_value("y", 1, WIDTH)])
    return model, {"x": _random(1, WIDTH)}


def _value(name: str, *shape: int) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def _random(*shape: int) -> Array:
    return np.random.default_rng(6).standard_normal(shape, np.float32)
