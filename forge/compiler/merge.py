"""Matrices that multiply the same input become one: queries, keys and values; gate and up.

One product has one start of the thread pool and reads its input once. onnxruntime's CPU provider does not merge them.
MatMul, Gemm and MatMulNBits of constant matrices that nothing else reads are merged, their biases with them, and the
result is cut by Split. Rounding stays that of each column, but kernels may add in another order.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from onnx import NodeProto, TensorProto, helper

from forge.compiler.work import (
    CONTRIB,
    STANDARD,
    Array,
    Work,
    array_of,
    attribute_of,
    attributes_bytes,
    called,
    readers_of,
    replace_nodes,
)

SPLIT_OPSET = 13
"""The operator set that made sizes an input of Split."""


@dataclass(slots=True)
class _Product:
    """A node that multiplies `source` with constants; of several the columns can stand side by side."""

    node: NodeProto
    index: int
    columns: int
    parts: tuple[str, ...]
    """The constants."""
    axis: int
    """Along which the constants of several are joined."""
    bias: NodeProto | None = None
    """An Add of one constant per column that alone reads the product."""


def merge_products(work: Work) -> None:
    """Merge what can be merged in the main graph."""
    graph, readers = work.graph, readers_of(work.graph)
    outputs = {value.name for value in graph.output}
    groups: dict[tuple[object, ...], list[_Product]] = {}
    stored = work.constants
    for index, node in enumerate(graph.node):
        found = _product(node, index, stored, readers)
        if found is not None and node.output[0] not in outputs:
            found.bias = _bias(graph.node, found, stored, readers, outputs)
            groups.setdefault(_key(found, stored), []).append(found)
    replaced: dict[int, list[NodeProto]] = {}
    dropped: set[str] = set()
    for products in groups.values():
        if len(products) > 1:
            replaced[products[0].index] = _merge(work, products, stored)
            dropped |= {called(product.node) for product in products}
            dropped |= {called(product.bias) for product in products if product.bias is not None}
            work.done[f"{products[0].node.op_type} merged"] += len(products)
    if replaced:
        kept: list[NodeProto] = []
        for index, node in enumerate(graph.node):
            kept += replaced.get(index, [])
            if called(node) not in dropped:
                kept.append(node)
        replace_nodes(graph, kept)


def _product(
    node: NodeProto, index: int, stored: dict[str, TensorProto], readers: dict[str, list[int]]
) -> _Product | None:
    """`node` as a product of constants that only it reads."""
    parts = tuple(node.input[1:])
    alone = all(name in stored and len(readers[name]) == 1 for name in parts if name)
    if not parts or not alone or len(node.output) != 1:
        return None
    first = stored[parts[0]]
    if node.op_type == "MatMul" and node.domain in STANDARD and len(first.dims) == 2:
        return _Product(node, index, first.dims[1], parts, 1)
    if node.op_type == "MatMulNBits" and node.domain == CONTRIB and len(parts) <= 3 and all(parts):
        return _Product(node, index, attribute_of(node, "N"), parts, 0)
    return None


def _key(product: _Product, stored: dict[str, TensorProto]) -> tuple[object, ...]:
    """Equal for products that can be merged."""
    node, rest = product.node, NodeProto()
    rest.attribute.extend(attribute for attribute in node.attribute if attribute.name != "N")
    shapes = tuple(
        (stored[name].data_type, *(size for axis, size in enumerate(stored[name].dims) if axis != product.axis))
        for name in product.parts
    )
    return node.op_type, node.input[0], attributes_bytes(rest), shapes, product.bias is not None


def _bias(
    nodes: Sequence[NodeProto], product: _Product, stored: dict[str, TensorProto], readers: dict[str, list[int]],
    outputs: set[str],
) -> NodeProto | None:  # fmt: skip
    """The Add after a product when it adds a constant to every column."""
    name = product.node.output[0]
    found = readers.get(name, [])
    add = nodes[found[0]] if len(found) == 1 else None
    if add is None or add.op_type != "Add" or add.domain not in STANDARD or add.output[0] in outputs:
        return None
    other = next((value for value in add.input if value != name), "")
    if other not in stored or list(stored[other].dims) != [product.columns] or name in outputs:
        return None
    return add


def _merge(work: Work, products: list[_Product], stored: dict[str, TensorProto]) -> list[NodeProto]:
    """One product, its bias, and the Split that gives the old names."""
    first = products[0]
    stem, graph = called(first.node), work.graph
    joined = []
    for position, _ in enumerate(first.parts):
        arrays = [array_of(stored[product.parts[position]]) for product in products]
        joined.append(work.constant(graph, f"{stem}/merged", _joined(arrays, first.axis)))
    whole = work.fresh(f"{stem}/merged.product")
    node = helper.make_node(first.node.op_type, [first.node.input[0], *joined], [whole], name=whole)
    node.domain = first.node.domain
    node.attribute.extend(first.node.attribute)
    for attribute in node.attribute:
        if attribute.name == "N":
            attribute.i = sum(product.columns for product in products)
    nodes, targets = [node], [product.node.output[0] for product in products]
    if first.bias is not None:
        adds = [product.bias for product in products if product.bias is not None]
        targets = [add.output[0] for add in adds]
        biases = [next(array_of(stored[name]) for name in add.input if name in stored) for add in adds]
        bias = work.constant(graph, f"{stem}/merged.bias", _joined(biases, 0))
        whole = work.fresh(f"{stem}/merged.biased")
        nodes.append(helper.make_node("Add", [node.output[0], bias], [whole], name=whole))
    return [*nodes, _split(work, whole, [product.columns for product in products], targets)]


def _joined(arrays: list[Array], axis: int) -> Array:
    joined: Array = np.concatenate(arrays, axis=axis if arrays[0].ndim > axis else 0)
    return joined


def _split(work: Work, whole: str, columns: list[int], targets: list[str]) -> NodeProto:
    if work.opset < SPLIT_OPSET:
        return helper.make_node("Split", [whole], targets, name=f"{whole}/Split", axis=-1, split=columns)
    sizes = work.constant(work.graph, f"{whole}.sizes", np.asarray(columns, np.int64))
    return helper.make_node("Split", [whole, sizes], targets, name=f"{whole}/Split", axis=-1)
