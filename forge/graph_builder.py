"""Collecting an ONNX graph: nodes, initializers in weights.bin, and the operations that both kinds of model have.

Ops beyond the ONNX standard are onnxruntime's (domain com.microsoft, docs/ContribOperators.md there): MatMulNBits and
GatherBlockQuantized here.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from forge.quantise import BLOCK
from forge.weights import Placed

CONTRIB = "com.microsoft"
OPSET = 21
IR_VERSION = 10  # of ONNX 1.16: what onnxruntime >= 1.18 reads
INT8_ACTIVATIONS = 4
"""MatMulNBits accuracy_level: activations are quantised to int8, which the fast kernels of every CPU need."""


@dataclass(frozen=True, slots=True)
class Matrix:
    """A matrix [rows, columns] in weights.bin: quantised (`packed`, `scales`) or float32 (`dense`), which is stored
    transposed unless its rows are looked up."""

    rows: int
    columns: int
    bits: int = 4
    """Of a quantised weight."""
    block: int = BLOCK
    """Quantised weights that share a scale."""
    packed: Placed | None = None
    scales: Placed | None = None
    dense: Placed | None = None


@dataclass(slots=True)
class GraphBuilder:
    """Collects nodes and initializers; names of values are the names of the modules in the checkpoint."""

    nodes: list[NodeProto] = field(default_factory=list)
    initializers: list[TensorProto] = field(default_factory=list)

    def node(self, kind: str, inputs: list[str], outputs: list[str], domain: str = "", **attributes: Any) -> str:
        """Add a node; returns its first output."""
        name = f"{outputs[0]}/{kind}"
        self.nodes.append(helper.make_node(kind, inputs, outputs, name=name, domain=domain, **attributes))
        return outputs[0]

    def constant(self, name: str, value: Any, dtype: Any) -> str:
        """Add a small constant inside the graph file."""
        self.initializers.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def vector(self, name: str, placed: Placed) -> str:
        """Add a float32 vector from weights.bin."""
        self.initializers.append(placed.initializer(name, TensorProto.FLOAT, placed.shape))
        return name

    def matmul(self, name: str, source: str, matrix: Matrix) -> str:
        """source [..., columns] times the transposed matrix: [..., rows]."""
        if matrix.packed is None or matrix.scales is None:
            assert matrix.dense is not None  # noqa: S101  a Matrix has one form or the other
            shape = (matrix.columns, matrix.rows)
            self.initializers.append(matrix.dense.initializer(f"{name}.weight", TensorProto.FLOAT, shape))
            return self.node("MatMul", [source, f"{name}.weight"], [name])
        blocks = matrix.columns // matrix.block
        stored = (matrix.rows, blocks, matrix.block * matrix.bits // 8)
        quantised = matrix.packed.initializer(f"{name}.packed", TensorProto.UINT8, stored)
        scales = matrix.scales.initializer(f"{name}.scales", TensorProto.FLOAT, (matrix.rows, blocks))
        self.initializers += [quantised, scales]
        return self.node(
            "MatMulNBits", [source, quantised.name, scales.name], [name], CONTRIB, K=matrix.columns, N=matrix.rows,
            bits=matrix.bits, block_size=matrix.block, accuracy_level=INT8_ACTIVATIONS,
        )  # fmt: skip

    def embed(self, name: str, ids: str, matrix: Matrix) -> str:
        """Rows of the matrix by `ids` [B, S]: [B, S, columns]. Quantised data is read where the LM head reads it."""
        if matrix.packed is None or matrix.scales is None:
            assert matrix.dense is not None  # noqa: S101  a Matrix has one form or the other
            table = matrix.dense.initializer(f"{name}.table", TensorProto.FLOAT, matrix.dense.shape)
            self.initializers.append(table)
            return self.node("Gather", [table.name, ids], [name], axis=0)
        stored = (matrix.rows, matrix.columns * matrix.bits // 8)
        packed = matrix.packed.initializer(f"{name}.packed", TensorProto.UINT8, stored)
        blocks = matrix.columns // matrix.block
        scales = matrix.scales.initializer(f"{name}.scales", TensorProto.FLOAT, (matrix.rows, blocks))
        self.initializers += [packed, scales]
        return self.node(
            "GatherBlockQuantized", [packed.name, ids, scales.name], [name], CONTRIB, bits=matrix.bits,
            block_size=matrix.block, gather_axis=0, quantize_axis=1,
        )  # fmt: skip

    def model(self, name: str, inputs: list[ValueInfoProto], outputs: list[ValueInfoProto]) -> ModelProto:
        """The graph of everything that was added."""
        graph = helper.make_graph(self.nodes, name, inputs, outputs, self.initializers)
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="amperage")
