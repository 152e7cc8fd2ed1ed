"""Which files an ONNX graph reads beside itself, found without a protobuf library.

A graph names its external data by path. The one file that a version may read is weights.bin of its own directory, and
that is checked here before onnxruntime opens anything. Invariant: every place of the format that can hold a tensor is
walked (onnx/onnx.proto, IR version 10); bytes that are not protobuf raise ArtifactError.
"""

from collections.abc import Iterator
from pathlib import Path

from wire.errors import ArtifactError, Code

DEPTH_LIMIT = 64
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

_CHILDREN: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "tensor": {13: "entry"},
}
"""Fields of each message that lead to a tensor; an `entry` is one key and value of a tensor's external_data."""


def check_external_data(graph: Path, allowed: str, limit_bytes: int) -> None:
    """Raise ArtifactError(corrupt) unless the only file that `graph` reads beside itself is `allowed`."""
    data = graph.read_bytes()
    if len(data) > limit_bytes:
        raise ArtifactError(Code.CORRUPT, f"{graph} has {len(data)} bytes; weights belong into {allowed}")
    others = sorted(external_locations(data) - {allowed})
    if others:
        raise ArtifactError(Code.CORRUPT, f"{graph} reads {others[0][:200]!r}; a version may read only {allowed}")


def external_locations(graph: bytes) -> set[str]:
    """Every `location` of external data in the bytes of a ModelProto; raises ArtifactError(corrupt)."""
    locations: set[str] = set()
    pending: list[tuple[str, memoryview, int]] = [("model", memoryview(graph), 0)]
    while pending:
        kind, data, depth = pending.pop()
        if depth > DEPTH_LIMIT:
            raise ArtifactError(Code.CORRUPT, f"graph is nested deeper than {DEPTH_LIMIT}; build the version again")
        for number, value in _fields(data):
            child = _CHILDREN[kind].get(number)
            if child == "entry":
                locations |= _location(value)
            elif child is not None:
                pending.append((child, value, depth + 1))
    return locations


def _location(entry: memoryview) -> set[str]:
    fields = {number: bytes(value) for number, value in _fields(entry)}
    return {fields.get(2, b"").decode(errors="replace")} if fields.get(1) == b"location" else set()


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """(number, bytes) of the length-delimited fields of one message; numbers are passed over."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, form = key >> 3, key & 7
        if form == _BYTES:
            size, at = _varint(data, at)
            if at + size > len(data):
                raise _not_protobuf()
            yield number, data[at : at + size]
            at += size
        elif form == _VARINT:
            _, at = _varint(data, at)
        elif form in (_FIXED64, _FIXED32):
            at += 8 if form == _FIXED64 else 4
        else:
            raise _not_protobuf()
    if at != len(data):
        raise _not_protobuf()


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(data) and shift < 70:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise _not_protobuf()


def _not_protobuf() -> ArtifactError:
    return ArtifactError(Code.CORRUPT, "graph is not an ONNX model; fetch the version again, or build it again")
