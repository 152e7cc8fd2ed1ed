"""Any ONNX model as a version that the runtime serves as it is: tensors in, tensors out.

Weights move to weights.bin, where the codec sees their types, the graph stays what it is. Inputs that have a default
become constants, and doc strings leave. With a precision, matrices that MatMul and Gemm multiply with are stored in
blocks of 32 (forge/quantise.py) for MatMulNBits. The directory gets its name at the end, as in forge/build.py.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from codec.versions import VERSION_FILE
from forge.build import describe_version
from forge.compiler.clean import drop_unread, store_constants
from forge.compiler.work import CONTRIB, STANDARD, Array, array_of, constants_of, graphs_of, replace_nodes
from forge.graph_builder import INT8_ACTIVATIONS
from forge.graph_golden import Examples, make_tensor_set
from forge.onnx_file import SMALL_BYTES, read_onnx, size_bytes_of
from forge.placer import place_quantised
from forge.progress import Progress, silent
from forge.quantise import BLOCK, Precision, quantise_blocks
from forge.reference import MODEL_FILE
from forge.weights import WEIGHTS_FILE, WeightsWriter, writing_weights
from runtime.external import check_external_data
from runtime.made import DTYPES
from runtime.tensors import REQUEST_LIMIT_BYTES
from runtime.version import GRAPH_LIMIT_BYTES
from wire.documents import encode_document
from wire.errors import ConfigError
from wire.golden import GOLDEN_FILE
from wire.manifest import Datatype, Dtype, GraphConfig, GraphTensor, Layout, VersionDocument

FILES = (MODEL_FILE, WEIGHTS_FILE, GOLDEN_FILE)
PRECISIONS = (Precision.INT8, Precision.INT4)
LEAST_BLOCKED = 64 * BLOCK
"""Weights of a matrix that is worth blocks."""
NAME_LIMIT = 200
"""Characters of a tensor's name in a manifest (wire/manifest.py)."""

DATATYPES: dict[int, Datatype] = {
    helper.np_dtype_to_tensor_dtype(dtype.newbyteorder("=")): datatype for datatype, dtype in DTYPES.items()
}
STORED: dict[int, tuple[Dtype, Layout]] = {
    TensorProto.FLOAT: (Dtype.F32, Layout.F32), TensorProto.FLOAT16: (Dtype.F16, Layout.F16),
    TensorProto.BFLOAT16: (Dtype.BF16, Layout.BF16), TensorProto.INT8: (Dtype.I8, Layout.BYTES),
    TensorProto.UINT8: (Dtype.U8, Layout.BYTES), TensorProto.INT32: (Dtype.I32, Layout.BYTES),
    TensorProto.UINT32: (Dtype.I32, Layout.BYTES), TensorProto.INT64: (Dtype.I64, Layout.BYTES),
    TensorProto.UINT64: (Dtype.I64, Layout.BYTES), TensorProto.DOUBLE: (Dtype.I64, Layout.BYTES),
    TensorProto.INT16: (Dtype.F16, Layout.BYTES), TensorProto.UINT16: (Dtype.F16, Layout.BYTES),
    TensorProto.INT4: (Dtype.U4, Layout.BYTES), TensorProto.UINT4: (Dtype.U4, Layout.BYTES),
}  # fmt: skip
"""By ONNX type, the type of the same width and the layout that a tensor is stored as; others stay in the graph."""


@dataclass(frozen=True, slots=True)
class GraphChoices:
    """What the caller knows of the model: `largest` by named size, and how its inputs look."""

    largest: Mapping[str, int] = field(default_factory=dict)
    examples: Examples = field(default_factory=Examples)
    precision: Precision | None = None


def import_graph(
    source: Path, out: Path, named: tuple[str, str], choices: GraphChoices | None = None, progress: Progress = silent
) -> VersionDocument:
    """Make the version directory `out` of the ONNX model `source`; `named` is (model, version).

    Raises ConfigError with a remedy when the model cannot be read, run or served.
    """
    choices = choices or GraphChoices()
    if out.exists():
        raise ConfigError(f"{out} exists; remove it or choose another place for the version")
    if choices.precision not in (None, *PRECISIONS):
        raise ConfigError(f"a graph is not stored as {choices.precision}; use one of {', '.join(PRECISIONS)}")
    progress("read", 0, 1)
    model = read_onnx(source)
    tidy_graph(model)
    config = read_config(model, choices.largest)
    twin = ModelProto()
    twin.CopyFrom(model)
    temporary = out.with_name(f".{out.name}.building")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    with writing_weights(temporary) as writer:
        if choices.precision is not None:
            quantise_products(model, twin, writer, choices.precision)
        place_tensors(model.graph, writer)
    if not writer.placed:
        raise ConfigError(f"{source} holds no weights of {SMALL_BYTES} bytes or more; serve it by your program")
    (temporary / MODEL_FILE).write_bytes(model.SerializeToString(deterministic=True))
    _check_size(temporary / MODEL_FILE)
    progress("golden vectors", 0, 1)
    golden = make_tensor_set(twin, temporary / MODEL_FILE, config, choices.examples)
    (temporary / GOLDEN_FILE).write_bytes(encode_document(golden))
    columns = writer.columns(FILES.index(WEIGHTS_FILE))
    document = describe_version(temporary, (*named, config), columns, FILES)
    (temporary / VERSION_FILE).write_bytes(encode_document(document))
    temporary.rename(out)
    return document


def tidy_graph(model: ModelProto) -> None:
    """Constants of nodes and defaults of inputs become initializers, doc strings leave, so does what nobody reads."""
    stored = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in stored]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    model.ClearField("doc_string")
    del model.metadata_props[:]
    for graph in graphs_of(model.graph):
        store_constants(graph)
        graph.ClearField("doc_string")
        for node in graph.node:
            node.ClearField("doc_string")
            del node.metadata_props[:]
    drop_unread(model.graph)


def read_config(model: ModelProto, largest: Mapping[str, int]) -> GraphConfig:
    """Inputs and outputs as the graph declares them. Raises ConfigError when one cannot be served or has no bound."""
    inputs = tuple(_tensor(value, "input") for value in model.graph.input)
    outputs = tuple(_tensor(value, "output") for value in model.graph.output)
    named = {size for tensor in inputs for size in tensor.shape if isinstance(size, str)}
    if unknown := sorted(largest.keys() - named):
        raise ConfigError(f"no size is called {unknown[0]!r}; the model has {', '.join(sorted(named)) or 'none'}")
    if missing := sorted(named - largest.keys()):
        raise ConfigError(f"size {missing[0]!r} may differ; say how large it gets: --size {missing[0]}=8")
    if not 0 < len(inputs) <= 16 or not 0 < len(outputs) <= 16:
        raise ConfigError(f"the model has {len(inputs)} inputs and {len(outputs)} outputs; 1 to 16 can be served")
    config = GraphConfig(inputs=inputs, outputs=outputs, largest=dict(largest))
    size = sum(_most_bytes(config, tensor) for tensor in inputs)
    if size > REQUEST_LIMIT_BYTES:
        raise ConfigError(f"inputs may take {size} bytes, requests {REQUEST_LIMIT_BYTES}; choose smaller sizes")
    return config


def quantise_products(model: ModelProto, twin: ModelProto, writer: WeightsWriter, precision: Precision) -> None:
    """Store constant matrices of MatMul and Gemm that nothing else reads in blocks; `twin` gets what they mean then.

    Left alone: matrices whose columns have other than a multiple of 32 numbers, and small ones. Raises ConfigError when
    there is no other.
    """
    graph, exact = model.graph, {tensor.name: tensor for tensor in twin.graph.initializer}
    stored = constants_of(graph)
    reads = [name for inner in graphs_of(graph) for node in inner.node for name in node.input]
    nodes: list[NodeProto] = []
    gone: set[str] = set()
    for node in graph.node:
        weights = _product_weights(node, stored)
        if (
            weights is None
            or weights.shape[1] % BLOCK
            or weights.size < LEAST_BLOCKED
            or reads.count(node.input[1]) > 1
        ):
            nodes.append(node)
            continue
        name = node.input[1]
        blocks = quantise_blocks(name, weights, precision=precision)
        placed = place_quantised(writer, name[-NAME_LIMIT + 10 :], blocks)
        meant = blocks.dequantise() if _is_transposed(node) else np.ascontiguousarray(blocks.dequantise().T)
        exact[name].CopyFrom(numpy_helper.from_array(meant, name))
        assert placed.packed is not None and placed.scales is not None  # noqa: S101, PT018  place_quantised fills both
        shape = (placed.rows, placed.columns // BLOCK, BLOCK * placed.bits // 8)
        graph.initializer.append(placed.packed.initializer(f"{name}.packed", TensorProto.UINT8, shape))
        scales = placed.scales.initializer(f"{name}.scales", TensorProto.FLOAT, placed.scales.shape)
        graph.initializer.append(scales)
        nodes += _multiplied(node, placed.columns, placed.rows, placed.bits)
        gone.add(name)
    if not gone:
        raise ConfigError(
            f"no matrix fits blocks: they want {LEAST_BLOCKED} float32 weights in columns of a multiple of {BLOCK}; "
            "leave --precision out"
        )
    replace_nodes(graph, nodes)
    drop_unread(graph)
    if not any(entry.domain == CONTRIB for entry in model.opset_import):
        model.opset_import.add(domain=CONTRIB, version=1)


def place_tensors(graph: GraphProto, writer: WeightsWriter) -> None:
    """Move the constants of the main graph to weights.bin but for small ones, which shape inference reads."""
    taken: set[str] = {placed.name for placed in writer.placed}
    for tensor in graph.initializer:
        size = size_bytes_of(tensor) if tensor.data_location != TensorProto.EXTERNAL else 0
        if size < SMALL_BYTES or tensor.data_type not in STORED:
            continue
        dtype, layout = STORED[tensor.data_type]
        data = np.frombuffer(tensor.raw_data, np.uint8)
        if layout is Layout.F32 and not data.view("<u2")[0::2].any():
            layout = Layout.F32_BF16_GRID
        name = _unique(tensor.name, taken)
        placed = writer.add(name, data, layout, dtype=dtype, shape=tuple(tensor.dims))
        tensor.CopyFrom(placed.initializer(tensor.name, tensor.data_type, tuple(tensor.dims)))


def _tensor(value: object, kind: str) -> GraphTensor:
    """An input or output by its declaration."""
    name, told = value.name, value.type.tensor_type  # type: ignore[attr-defined]
    if not told.HasField("shape"):
        raise ConfigError(f"{kind} {name!r} is no tensor of a known rank; export the model with shapes")
    if told.elem_type not in DATATYPES:
        raise ConfigError(
            f"{kind} {name!r} is {TensorProto.DataType.Name(told.elem_type)}, which requests cannot hold; add a Cast"
        )
    shape = [
        size.dim_value if size.dim_value > 0 else size.dim_param[:64] or f"{name}.{axis}"[:64]
        for axis, size in enumerate(told.shape.dim)
    ]
    if len(name) > 128 or len(shape) > 8 or any(isinstance(size, int) and size > 1 << 24 for size in shape):
        raise ConfigError(
            f"{kind} {name[:64]!r} has a long name, over 8 axes or over {1 << 24} on one; change the model"
        )
    return GraphTensor(name=name, datatype=DATATYPES[told.elem_type], shape=tuple(shape))


def _most_bytes(config: GraphConfig, tensor: GraphTensor) -> int:
    size = DTYPES[tensor.datatype].itemsize
    for axis in tensor.shape:
        size *= config.largest[axis] if isinstance(axis, str) else axis
    return size


def _is_transposed(node: NodeProto) -> bool:
    return any(attribute.name == "transB" and attribute.i for attribute in node.attribute)


def _product_weights(node: NodeProto, stored: Mapping[str, TensorProto]) -> Array | None:
    """The float32 matrix [columns of the output, columns of the input] that `node` multiplies with."""
    if node.op_type not in ("MatMul", "Gemm") or node.domain not in STANDARD or node.input[1] not in stored:
        return None
    tensor = stored[node.input[1]]
    plain = all(
        (attribute.name == "transB") or (attribute.name == "transA" and not attribute.i)
        or (attribute.name in ("alpha", "beta") and attribute.f == 1.0)
        for attribute in node.attribute
    )  # fmt: skip
    if not plain or tensor.data_type != TensorProto.FLOAT or len(tensor.dims) != 2:
        return None
    array = array_of(tensor)
    return array if _is_transposed(node) else np.ascontiguousarray(array.T)


def _multiplied(node: NodeProto, columns: int, rows: int, bits: int) -> list[NodeProto]:
    """MatMulNBits, and the Add of what a Gemm adds."""
    source, weights, *added = node.input
    added = [name for name in added if name]
    product = f"{node.output[0]}.product" if added else node.output[0]
    nodes = [
        helper.make_node(
            "MatMulNBits", [source, f"{weights}.packed", f"{weights}.scales"], [product], name=f"{node.name}.blocks",
            domain=CONTRIB, K=columns, N=rows, bits=bits, block_size=BLOCK, accuracy_level=INT8_ACTIVATIONS,
        )
    ]  # fmt: skip
    if added:
        nodes.append(helper.make_node("Add", [product, added[0]], [node.output[0]], name=f"{node.name}.add"))
    return nodes


def _unique(name: str, taken: set[str]) -> str:
    """A name that a manifest takes."""
    short, number = name[:NAME_LIMIT], 1
    while short in taken:
        short, number = f"{name[: NAME_LIMIT - 12]}.{number}", number + 1
    taken.add(short)
    return short


def _check_size(graph: Path) -> None:
    """A runtime opens no larger graph. Raises ConfigError."""
    size = graph.stat().st_size
    if size > GRAPH_LIMIT_BYTES:
        raise ConfigError(f"the graph has {size} bytes beside its weights, over {GRAPH_LIMIT_BYTES}; split the model")
    check_external_data(graph, WEIGHTS_FILE, GRAPH_LIMIT_BYTES)
