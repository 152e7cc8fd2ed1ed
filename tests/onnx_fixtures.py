"""Small ONNX models for the tests, and how to run them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
Array = np.ndarray[Any, Any]
Shape = Sequence[int | str | None] | None


def value(name: str, shape: Shape = None, kind: int = FLOAT) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def node(kind: str, inputs: str, outputs: str, **attributes: Any) -> NodeProto:
    """`inputs` and `outputs` are names between spaces; - is left out."""
    names = [["" if name == "-" else name for name in text.split()] for text in (inputs, outputs)]
    return helper.make_node(kind, *names, name=f"{names[1][0]}.node", **attributes)


def graph(
    nodes: list[NodeProto], inputs: list[ValueInfoProto], outputs: list[ValueInfoProto], **constants: Any
) -> GraphProto:
    stored = [numpy_helper.from_array(np.asarray(values), name) for name, values in constants.items()]
    return helper.make_graph(nodes, "test", inputs, outputs, stored)


def model(whole: GraphProto, opset: int = 18) -> ModelProto:
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(whole, opset_imports=opsets, ir_version=10)


def save(whole: ModelProto, path: Path) -> Path:
    path.write_bytes(whole.SerializeToString())
    return path


def run_plainly(whole: ModelProto, feeds: dict[str, Array]) -> list[Array]:
    """By onnxruntime without its optimisations."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    session = ort.InferenceSession(whole.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found: list[Array] = session.run(None, feeds)
    return found


def random(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape, np.float32)


def refinement(turns: Any = 8, condition: str = "go") -> GraphProto:
    """A Loop of `turns` that refines x [1, 8] and keeps every step; the matrix lies outside of it."""
    body = graph(
        [
            node("MatMul", "held matrix", "product"), node("Tanh", "product", "bent"),
            node("Cast", "turn", "number", to=FLOAT), node("Add", "number one", "next"),
            node("Div", "bent next", "share"), node("Add", "held share", "kept"), node("Identity", condition, "going"),
        ],
        [value("turn", [], INT64), value("go", [], BOOL), value("held")],
        [value("going", [], BOOL), value("kept"), value("share")], one=np.float32(1),
    )  # fmt: skip
    return graph(
        [node("Loop", "turns - x", "refined steps", body=body)], [value("x", [1, 8])],
        [value("refined"), value("steps")], turns=np.int64(turns), matrix=random(8, 8),
    )  # fmt: skip


def recurrence(length: Shape = None, **attributes: Any) -> GraphProto:
    """A Scan over x [length, 1, 4] of h' = tanh(x W + h R + b), whose W and b lie outside of it."""
    body = graph(
        [
            node("MatMul", "slice W", "seen"), node("Add", "seen b", "shifted"), node("MatMul", "held R", "kept"),
            node("Add", "shifted kept", "sum"), node("Tanh", "sum", "after"), node("Identity", "after", "told"),
        ],
        [value("held", [1, 8]), value("slice", [1, 4])], [value("after", [1, 8]), value("told", [1, 8])],
        R=random(8, 8) / 4,
    )  # fmt: skip
    scan = node("Scan", "h x", "last all", num_scan_inputs=1, body=body, **attributes)
    return graph(
        [scan], [value("h", [1, 8]), value("x", length or [5, 1, 4])], [value("last"), value("all")],
        W=random(4, 8), b=random(8),
    )  # fmt: skip
