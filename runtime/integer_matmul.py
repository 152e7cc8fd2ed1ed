"""The function of an ONNX model by which prompts are multiplied with an int8 matrix. Pure.

Each row of the activations is rounded to int8 by its own largest number as the graph runs, so that it depends on no
neighbour. onnxruntime inlines functions when it loads (onnx/IR.md, Model-Local Functions). Ops are of opset 21;
MatMulIntegerToFloat is onnxruntime's (docs/ContribOperators.md there).
"""

from dataclasses import dataclass, field

from runtime.protobuf import encoded

NAME, DOMAIN, CONTRIB = "MatMulIntegerRows", "amperage", "com.microsoft"
OPSETS = {"": 21, CONTRIB: 1, DOMAIN: 1}
INPUTS, OUTPUT = ("source", "matrix", "scales"), "product"
COLUMNS = "K"
"""Attribute of a call: how long a row of activations is."""
LARGEST, ZERO_POINT = 127, 128
"""Steps to the largest of a row, and the zero point: uint8, because x86 has no fast kernel for int8 times int8."""
TINY = 1e-20
"""Scale of a row of zeros."""
UINT8, INT64 = 2, 7
_AS_FLOAT, _AS_INT, _AS_TENSOR = 1, 2, 4


@dataclass(slots=True)
class _Body:
    """Nodes of the function, in order."""

    nodes: list[bytes] = field(default_factory=list)

    def node(self, kind: str, inputs: list[str], output: str, *attributes: bytes, domain: str = "") -> None:
        """Add one."""
        texts = [encoded(1, name) for name in inputs] + [encoded(2, output), encoded(4, kind), encoded(7, domain)]
        self.nodes.append(b"".join([*texts, *(encoded(5, attribute) for attribute in attributes)]))

    def constant(self, name: str, value: float | bytes) -> None:
        """A float32, or a tensor's bytes."""
        if isinstance(value, float):
            self.node("Constant", [], name, _attribute("value_float", 2, value, _AS_FLOAT))
        else:
            self.node("Constant", [], name, _attribute("value", 5, value, _AS_TENSOR))


def function() -> bytes:
    """The bytes of its FunctionProto: `source` float32 [..., K] times `matrix` int8 [K, N], whose columns have `scales`
    float32 [N]; `product` float32 [..., N]."""
    b = _Body()
    b.constant("last", encoded(1, 1) + encoded(2, INT64) + encoded(9, (-1).to_bytes(8, "little", signed=True)))
    b.constant("tiny", TINY)
    b.constant("step", 1 / LARGEST)
    b.constant("one", 1.0)
    zero_point = encoded(2, UINT8) + encoded(9, bytes([ZERO_POINT]))
    b.constant("zero_point", zero_point)
    keep = _attribute("keepdims", 3, 1, _AS_INT)
    b.node("ReduceMax", ["source", "last"], "highest", keep)  # from both sides: faster than among the sizes
    b.node("ReduceMin", ["source", "last"], "lowest", keep)
    b.node("Neg", ["lowest"], "negated")
    b.node("Max", ["highest", "negated", "tiny"], "largest")
    b.node("Mul", ["largest", "step"], "row_scales")
    b.node("Shape", ["row_scales"], "sizes")
    b.node("ConstantOfShape", ["sizes"], "zero_points", _attribute("value", 5, encoded(1, 1) + zero_point, _AS_TENSOR))
    by_row = (_attribute("axis", 3, -1, _AS_INT), _attribute("block_size", 21, COLUMNS, _AS_INT))
    b.node("QuantizeLinear", ["source", "row_scales", "zero_points"], "integers", *by_row)
    factors = ["integers", "matrix", "one", "scales", "zero_point"]
    b.node("MatMulIntegerToFloat", factors, "steps", domain=CONTRIB)
    b.node("Mul", ["steps", "row_scales"], OUTPUT)
    parts = [encoded(1, NAME), *(encoded(4, name) for name in INPUTS), encoded(5, OUTPUT), encoded(6, COLUMNS)]
    opsets = [encoded(9, encoded(1, domain) + encoded(2, version)) for domain, version in OPSETS.items()]
    return b"".join([*parts, *(encoded(7, node) for node in b.nodes), *opsets, encoded(10, DOMAIN)])


def _attribute(name: str, field_number: int, value: bytes | str | float, kind: int) -> bytes:
    """Of a node, whose value is in the field of that number; field 21 refers to an attribute of the call."""
    return encoded(1, name) + encoded(field_number, value) + encoded(20, kind)
