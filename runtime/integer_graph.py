"""The graph that reads prompts with 8-bit matrices, derived from a version's own graph and weights. Pure.

The matrices of int4 and int8 versions are multiplied 3 times as fast once they are int8 with one scale for each output,
and rows of activations are, too (runtime/integer_matmul.py). A product, such as that of an MLP's gate, has few large
numbers among many small ones and would lose most by that: its matrix stays a MatMulNBits, with 8 bits in longer blocks.
The head stays as it is: it multiplies one row of a chunk.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.integer_matmul import COLUMNS, DOMAIN, NAME, OPSETS, function
from runtime.integer_weights import by_longer_blocks, by_output, longest_block
from runtime.protobuf import encoded, fields, parts, text
from wire.errors import ArtifactError, Code, DeployError
from wire.serving import IntegerReading

BITS = (4, 8)
"""Of the matrices that are rewritten; of fewer bits they would grow too much."""
ATTENTION = ".attention."
"""In the names of what attention's matrices make (docs/design.md, 6)."""
PLACE = "derived"
"""Where the new tensors say that they are: there is no such file, they are handed over with the graph."""
_TYPES: dict[int, Any] = {1: np.float32, 2: np.uint8, 3: np.int8}
"""By TensorProto.DataType."""

_GRAPH, _OPSET, _FUNCTION = 7, 8, 25
_NODE, _TENSOR, _RESULT = 1, 5, 12
_INPUT, _OUTPUT, _KIND, _ATTRIBUTE, _DOMAIN = 1, 2, 4, 5, 7
_INTEGER, _AS_INTEGER = 3, 2

Tensors = dict[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Derived:
    """A ModelProto's bytes, and by name the tensors that it has beside weights.bin."""

    model: bytes
    tensors: Tensors


@dataclass(slots=True)
class _Node:
    """A NodeProto, as far as it matters here."""

    whole: bytes
    kind: str = ""
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    integers: dict[str, int] = field(default_factory=dict)
    """Attributes."""
    kept: list[memoryview] = field(default_factory=list)
    """Its name and what else no rewriting touches."""


def integer_graph(model: bytes, weights: NDArray[np.uint8], what: IntegerReading) -> Derived:
    """`model`, whose weights.bin is `weights`, up to rounding.

    Raises ArtifactError(corrupt), and DeployError(load_failed) where it has no matrix to rewrite.
    """
    written: list[bytes] = []
    tensors: Tensors = {}
    for number, value, whole in fields(memoryview(model)):
        if number == _GRAPH and not isinstance(value, int):
            written.append(encoded(_GRAPH, _rewritten(value, weights, what, tensors)))
        else:
            written.append(bytes(whole))
    if not tensors:
        raise DeployError(Code.LOAD_FAILED, "the version has no matrix of 4 or 8 bits to read with 8-bit integers")
    opset = encoded(1, DOMAIN) + encoded(2, OPSETS[DOMAIN])
    return Derived(b"".join([*written, encoded(_OPSET, opset), encoded(_FUNCTION, function())]), tensors)


def _rewritten(graph: memoryview, weights: NDArray[np.uint8], what: IntegerReading, tensors: Tensors) -> bytes:
    """The bytes of a GraphProto; adds the new tensors to `tensors`."""
    values = list(parts(graph))
    stored = {text(value, 8): value for number, value in values if number == _TENSOR}
    results = {text(value, 1) for number, value in values if number == _RESULT}
    products: set[str] = set()
    nodes: list[bytes] = []
    for node in (_node(value) for number, value in values if number == _NODE):
        if node.kind == "Mul":
            products.update(node.outputs)
        name = node.outputs[0]
        left = name in results or (what is IntegerReading.MLP and ATTENTION in name)
        if left or not _is_matrix(node) or not stored.keys() >= set(node.inputs[1:]):
            nodes.append(node.whole)
            continue
        levels, scales = (_stored(stored[constant], weights) for constant in node.inputs[1:])
        make = _with_blocks if node.inputs[0] in products else _with_rows
        nodes.append(make(node, levels, scales, tensors))
    others = [whole for number, _, whole in fields(graph) if number != _NODE]
    added = [encoded(_TENSOR, _placed(name, tensor)) for name, tensor in tensors.items()]
    return b"".join([*others, *added, *(encoded(_NODE, node) for node in nodes)])


def _is_matrix(node: _Node) -> bool:
    """Whether it is a MatMulNBits with whole blocks and no zero points."""
    whole = node.integers.get("K", 1) % node.integers.get("block_size", 32) == 0
    return node.kind == "MatMulNBits" and len(node.inputs) == 3 and node.integers["bits"] in BITS and whole


def _with_rows(node: _Node, levels: NDArray[Any], scales: NDArray[Any], tensors: Tensors) -> bytes:
    names = _named(node, by_output(levels, scales, node.integers["bits"]), tensors)
    return _written(node, names, NAME, DOMAIN, {COLUMNS: node.integers["K"]})


def _with_blocks(node: _Node, levels: NDArray[Any], scales: NDArray[Any], tensors: Tensors) -> bytes:
    names = _named(node, by_longer_blocks(levels, scales, node.integers["bits"]), tensors)
    changed = {"bits": 8, "block_size": longest_block(node.integers["K"])}
    return _written(node, names, node.kind, "com.microsoft", node.integers | changed)


def _named(node: _Node, found: tuple[NDArray[Any], NDArray[Any]], tensors: Tensors) -> list[str]:
    """Put levels and scales among `tensors`; returns their names."""
    names = [f"{node.outputs[0]}.{part}" for part in ("integers", "integer_scales")]
    tensors.update(zip(names, found, strict=True))
    return names


def _written(node: _Node, constants: list[str], kind: str, domain: str, integers: dict[str, int]) -> bytes:
    """The bytes of a NodeProto in the place of `node`."""
    texts = [encoded(_INPUT, name) for name in (node.inputs[0], *constants)]
    texts += [*(encoded(_OUTPUT, name) for name in node.outputs), encoded(_KIND, kind), encoded(_DOMAIN, domain)]
    for name, value in integers.items():
        texts.append(encoded(_ATTRIBUTE, encoded(1, name) + encoded(_INTEGER, value) + encoded(20, _AS_INTEGER)))
    return b"".join([*node.kept, *texts])


def _placed(name: str, tensor: NDArray[Any]) -> bytes:
    """The bytes of a TensorProto whose data lies elsewhere."""
    number = next(number for number, dtype in _TYPES.items() if dtype == tensor.dtype)
    entry = encoded(1, "location") + encoded(2, PLACE)
    sizes = b"".join(encoded(1, size) for size in tensor.shape)
    return sizes + encoded(2, number) + encoded(8, name) + encoded(13, entry) + encoded(14, 1)


def _stored(tensor: memoryview, weights: NDArray[np.uint8]) -> NDArray[Any]:
    """What a TensorProto has in weights.bin."""
    numbers = [(number, value) for number, value, _ in fields(tensor) if isinstance(value, int)]
    shape = [value for number, value in numbers if number == 1]
    entries = {text(value, 1): text(value, 2) for number, value in parts(tensor) if number == 13}
    try:
        start, dtype = int(entries["offset"]), _TYPES[dict(numbers)[2]]
        found: NDArray[Any] = weights[start : start + int(entries["length"])].view(dtype).reshape(shape)
    except (KeyError, ValueError) as error:
        name = text(tensor, 8)
        raise ArtifactError(Code.CORRUPT, f"{name} is not in weights.bin; build the version again") from error
    return found


def _node(data: memoryview) -> _Node:
    node = _Node(bytes(data), integers={"bits": 4})
    for number, value, whole in fields(data):
        if isinstance(value, int):
            continue
        if number == _ATTRIBUTE:
            node.integers |= {text(value, 1): n for at, n, _ in fields(value) if at == _INTEGER and isinstance(n, int)}
        elif number in {_INPUT, _OUTPUT, _KIND}:
            word = bytes(value).decode(errors="replace")
            if number == _KIND:
                node.kind = word
            else:
                (node.inputs if number == _INPUT else node.outputs).append(word)
        elif number != _DOMAIN:
            node.kept.append(whole)
    return node
