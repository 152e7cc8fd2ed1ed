"""Which files an ONNX graph reads beside itself, found without a protobuf library.

A graph names its external data by path. The one file that a version may read is weights.bin of its own directory, and
that is checked here before onnxruntime opens anything. Invariant: every place of the format that can hold a tensor is
walked (onnx/onnx.proto, IR version 10); bytes that are not protobuf raise ArtifactError.
"""

from pathlib import Path

from runtime.protobuf import parts
from wire.errors import ArtifactError, Code

DEPTH_LIMIT = 64

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
        for number, value in parts(data):
            child = _CHILDREN[kind].get(number)
            if child == "entry":
                locations |= _location(value)
            elif child is not None:
                pending.append((child, value, depth + 1))
    return locations


def _location(entry: memoryview) -> set[str]:
    found = {number: bytes(value) for number, value in parts(entry)}
    return {found.get(2, b"").decode(errors="replace")} if found.get(1) == b"location" else set()
