"""Reading ONNX files that anybody may have written, with their external data, and writing them.

Invariants of a model that was read: every tensor is inside it and as long as its shape and type say, nodes stand in an
order in which they can run, and whatever they read is there. No path leads out of the folder, nothing is allocated from
a claim, and what does not fit ends in one sentence that names the tensor or the node. A crash leaves `.NAME.writing`.
"""

import math
import shutil
from collections import Counter
from collections.abc import Iterator
from heapq import heappop, heappush
from pathlib import Path
from typing import NoReturn

from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper

from runtime.external import external_locations
from wire.errors import ArtifactError, Code, ConfigError

GRAPH_LIMIT_BYTES = (1 << 31) - 1
"""Of one protobuf message."""
WEIGHTS_LIMIT_BYTES = 32 << 30
INSIDE_LIMIT_BYTES = 1 << 30
"""Weights beyond this are written beside the graph."""
SMALL_BYTES = 1024
"""Tensors below this stay in the graph, where shape inference reads them."""
ALIGNMENT = 64
EXPORT = "export the model again"

_BYTES_OF = {
    1: ("UINT8", "INT8", "BOOL", "FLOAT8E4M3FN", "FLOAT8E4M3FNUZ", "FLOAT8E5M2", "FLOAT8E5M2FNUZ", "FLOAT8E8M0"),
    2: ("UINT16", "INT16", "FLOAT16", "BFLOAT16"),
    4: ("UINT32", "INT32", "FLOAT"),
    8: ("UINT64", "INT64", "DOUBLE", "COMPLEX64"),
    16: ("COMPLEX128",),
}
BITS_OF: dict[int, int] = {
    number: 8 * size
    for size, names in _BYTES_OF.items()
    for name, number in TensorProto.DataType.items()
    if name in names
} | {
    number: 2 if name.endswith("2") else 4
    for name, number in TensorProto.DataType.items()
    if name in ("INT4", "UINT4", "FLOAT4E2M1", "INT2", "UINT2")
}
BITS_OF[TensorProto.FLOAT4E2M1] = 4
"""Bits of an element by its ONNX type, without strings."""


def read_onnx(path: Path) -> ModelProto:
    """The model in `path`, its tensors inside it. Raises ConfigError with a remedy."""
    try:
        size = path.stat().st_size
        if size > GRAPH_LIMIT_BYTES:
            raise ConfigError(f"{path} has {size} bytes, over {GRAPH_LIMIT_BYTES}; export it with external data")
        data = path.read_bytes()
        external_locations(data)  # refuses what is nested without end before protobuf sees it
        model = _parsed(data)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error}); name an .onnx file") from error
    except ArtifactError as error:
        raise ConfigError(f"{path} is no ONNX model; {EXPORT}") from error
    if not model.HasField("graph") or not model.opset_import:
        _refuse(f"{path} holds no graph or no operator set")
    if model.training_info:
        _refuse(f"{path} holds a graph for training; export it for inference")
    room = WEIGHTS_LIMIT_BYTES
    for tensor in tensors_of(model):
        room -= _take_in(tensor, path.parent, room)
    _check_graph(model.graph, frozenset())
    return model


def write_onnx(model: ModelProto, path: Path, *, beside: bool = False) -> None:
    """Write `model` to `path`, which must not exist; weights to `path`.data when `beside`, or when they are many.

    The bytes are the same for the same model. `model` keeps its tensors. Raises ConfigError.
    """
    weights = Path(f"{path}.data")
    for place in (path, weights):
        if place.exists():
            raise ConfigError(f"{place} exists; remove it or choose another place")
    scratch = path.with_name(f".{path.name}.writing")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    written = ModelProto()
    written.CopyFrom(model)
    large = [tensor for tensor in tensors_of(written) if len(tensor.raw_data) >= SMALL_BYTES]
    if beside or sum(len(tensor.raw_data) for tensor in large) > INSIDE_LIMIT_BYTES:
        with (scratch / weights.name).open("wb") as sink:
            for tensor in large:
                sink.write(b"\0" * (-sink.tell() % ALIGNMENT))
                place_outside(tensor, weights.name, sink.tell(), len(tensor.raw_data))
                sink.write(tensor.raw_data)
                tensor.ClearField("raw_data")
    (scratch / path.name).write_bytes(written.SerializeToString(deterministic=True))
    for name in (weights.name, path.name):
        if (scratch / name).exists():
            (scratch / name).rename(path.with_name(name))
    scratch.rmdir()


def place_outside(tensor: TensorProto, location: str, offset: int, size_bytes: int) -> None:
    """Let `tensor` be these bytes of the file `location`; its data inside stays until it is cleared."""
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(size_bytes))):
        tensor.external_data.add(key=key, value=value)


def has_external_data(path: Path) -> bool:
    """Whether the model in `path`, which was read before, has files beside it."""
    return bool(external_locations(path.read_bytes()))


def bodies_of(node: NodeProto) -> Iterator[GraphProto]:
    """The graphs that `node` has as attributes."""
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g
        elif attribute.type == AttributeProto.GRAPHS:
            yield from attribute.graphs


def tensors_of(part: ModelProto | GraphProto | FunctionProto) -> Iterator[TensorProto]:
    """Every tensor of a model or graph, in the order of the file."""
    if isinstance(part, ModelProto):
        yield from tensors_of(part.graph)
        for function in part.functions:
            yield from tensors_of(function)
        return
    if isinstance(part, GraphProto):
        yield from part.initializer
        for sparse in part.sparse_initializer:
            yield from (sparse.values, sparse.indices)
    attributes = [attribute for node in part.node for attribute in node.attribute]
    if isinstance(part, FunctionProto):
        attributes += part.attribute_proto
    for attribute in attributes:
        yield from _tensors_of_attribute(attribute)


def size_bytes_of(tensor: TensorProto) -> int:
    """Bytes that shape and type mean; strings count as they are."""
    if tensor.data_type == TensorProto.STRING:
        return sum(map(len, tensor.string_data))
    return int(math.prod(tensor.dims) * BITS_OF[tensor.data_type] + 7) // 8


def reads_of(node: NodeProto) -> set[str]:
    """Names of values that `node` and the graphs in it read from outside."""
    names = {name for name in node.input if name}
    for body in bodies_of(node):
        names |= free_names(body)
    return names


def free_names(graph: GraphProto) -> set[str]:
    """Names that `graph` reads and does not define."""
    read = {value.name for value in graph.output}
    defined = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
    defined |= {sparse.values.name for sparse in graph.sparse_initializer}
    for node in graph.node:
        read |= reads_of(node)
        defined.update(node.output)
    return read - defined


def sort_nodes(graph: GraphProto, known: set[str]) -> None:
    """Put nodes in an order in which they can run, as they stand where they can; `known` is there before any of them.

    Raises ConfigError when the graph has a cycle.
    """
    lacking = [reads_of(node) - known for node in graph.node]
    readers: dict[str, list[int]] = {}
    for index, names in enumerate(lacking):
        for name in names:
            readers.setdefault(name, []).append(index)
    ready = [index for index, names in enumerate(lacking) if not names]
    order: list[int] = []
    while ready:
        index = heappop(ready)
        order.append(index)
        for name in graph.node[index].output:
            for reader in readers.pop(name, ()):
                lacking[reader].discard(name)
                if not lacking[reader]:
                    heappush(ready, reader)
    if len(order) < len(graph.node):
        node = graph.node[min(set(range(len(graph.node))) - set(order))]
        _refuse(f"node {node.name or node.op_type!r} waits for itself: the graph has a cycle")
    if order != sorted(order):
        nodes = [NodeProto.FromString(graph.node[index].SerializeToString()) for index in order]
        del graph.node[:]
        graph.node.extend(nodes)


def _tensors_of_attribute(attribute: AttributeProto) -> Iterator[TensorProto]:
    if attribute.HasField("t"):
        yield attribute.t
    yield from attribute.tensors
    if attribute.HasField("g"):
        yield from tensors_of(attribute.g)
    for graph in attribute.graphs:
        yield from tensors_of(graph)
    single = [attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else []
    for sparse in (*single, *attribute.sparse_tensors):
        yield from (sparse.values, sparse.indices)


def _parsed(data: bytes) -> ModelProto:
    model = ModelProto()
    try:
        model.ParseFromString(data)
    except Exception as error:  # protobuf's own type is not for import here
        raise ArtifactError(Code.CORRUPT, str(error)) from error
    return model


def _take_in(tensor: TensorProto, folder: Path, room: int) -> int:
    """Have the tensor's bytes inside it, in one form; returns how many there are."""
    known = tensor.data_type in BITS_OF or tensor.data_type == TensorProto.STRING
    if not known or any(size < 0 for size in tensor.dims):
        _refuse(f"tensor {tensor.name!r} has an unknown type or a negative size")
    size = size_bytes_of(tensor)
    if size > room:
        _refuse(f"tensor {tensor.name!r} claims {size} bytes; models may have {WEIGHTS_LIMIT_BYTES} of weights")
    if tensor.data_location == TensorProto.EXTERNAL:
        tensor.raw_data = _outside(tensor, folder, size)
        tensor.ClearField("external_data")
        tensor.ClearField("data_location")
    elif tensor.data_type != TensorProto.STRING and not tensor.HasField("raw_data"):
        _take_typed(tensor)
    if tensor.data_type != TensorProto.STRING and len(tensor.raw_data) != size:
        _refuse(f"tensor {tensor.name!r} has {len(tensor.raw_data)} bytes, its shape and type mean {size}")
    return size


def _take_typed(tensor: TensorProto) -> None:
    """Numbers that stand in a field of their type become raw data."""
    fields = (tensor.float_data, tensor.int32_data, tensor.int64_data, tensor.double_data, tensor.uint64_data)
    if math.prod(tensor.dims) > 2 * sum(map(len, fields)) * 8:  # packed types have several to a number
        _refuse(f"tensor {tensor.name!r} has fewer numbers than its shape says")
    try:
        raw = numpy_helper.from_array(numpy_helper.to_array(tensor), tensor.name)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"tensor {tensor.name!r} does not fit its shape ({error}); {EXPORT}") from error
    tensor.CopyFrom(raw)


def _outside(tensor: TensorProto, folder: Path, size: int) -> bytes:
    """The tensor's bytes in a file of the model's folder."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    path = folder / location
    if not location or not path.resolve().is_relative_to(folder.resolve()):
        _refuse(f"tensor {tensor.name!r} lies in {location!r}, outside the model's folder")
    if not path.is_file():
        _refuse(f"tensor {tensor.name!r} lies in {location!r}, which is not there; put it beside the model")
    try:
        offset, length = int(entries.get("offset", "0")), int(entries.get("length", str(size)))
    except ValueError:
        _refuse(f"tensor {tensor.name!r} has no proper offset or length")
    if length != size or not 0 <= offset <= path.stat().st_size - length:
        _refuse(f"tensor {tensor.name!r} wants bytes {offset} to {offset + length} of {location!r}, which do not fit")
    with path.open("rb") as file:
        file.seek(offset)
        data: bytes = file.read(length)
    return data


def _check_graph(graph: GraphProto, outer: frozenset[str]) -> None:
    """Sort the nodes of `graph` and of the graphs in it; refuse what is missing, there twice, or goes round."""
    given = [value.name for value in graph.input]
    stored = {tensor.name for tensor in graph.initializer} | {s.values.name for s in graph.sparse_initializer}
    made = [name for node in graph.node for name in node.output if name]
    counted = Counter([*made, *(stored | set(given))])
    if twice := sorted(name for name, count in counted.items() if count > 1):
        _refuse(f"value {twice[0]!r} is made twice")
    known = {*outer, *given, *stored}
    for node in graph.node:
        lost = sorted(reads_of(node) - known - set(made))
        if lost:
            _refuse(f"node {node.name or node.op_type!r} reads {lost[0]!r}, which nothing gives")
    sort_nodes(graph, known)
    inside = frozenset({*known, *made})
    lost = sorted({value.name for value in graph.output} - inside)
    if lost:
        _refuse(f"output {lost[0]!r} is made by no node")
    for node in graph.node:
        for body in bodies_of(node):
            _check_graph(body, inside)


def _refuse(message: str) -> NoReturn:
    raise ConfigError(message if ";" in message else f"{message}; {EXPORT}")
