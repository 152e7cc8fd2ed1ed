"""What of a version directory is refused before anything opens it."""

import os
import shutil
import sys
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

sys.path.insert(0, str(Path(__file__).parents[1]))

from runtime_fixtures import base_version

from runtime.external import external_locations
from runtime.version import open_version
from wire.errors import ArtifactError, Code, StoreError


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(base_version().directory, tmp_path / "version"))


def outside(location: str) -> TensorProto:
    tensor = TensorProto(name="outside", dims=[1], data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=location)
    return tensor


def test_whole_version_is_opened(copy: Path) -> None:
    document, digest = open_version(copy, base_version().decoded)
    assert digest == base_version().decoded
    assert document == base_version().document


def test_version_under_another_digest_is_refused(copy: Path) -> None:
    with pytest.raises(ArtifactError) as refusal:
        open_version(copy, "0" * 64)
    assert refusal.value.code is Code.DIGEST_MISMATCH


@pytest.mark.parametrize("name", ["version.json", "weights.bin", "tokenizer.json"])
def test_missing_file_is_refused(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(StoreError) as refusal:
        open_version(copy)
    assert refusal.value.code is Code.CORRUPT
    assert name in refusal.value.message


def test_file_of_another_size_is_refused(copy: Path) -> None:
    os.truncate(copy / "weights.bin", 1000)
    with pytest.raises(StoreError, match="instead of"):
        open_version(copy)


def test_link_in_place_of_a_file_is_refused(copy: Path) -> None:
    (copy / "weights.bin").rename(copy.parent / "elsewhere.bin")
    (copy / "weights.bin").symlink_to(copy.parent / "elsewhere.bin")
    with pytest.raises(StoreError, match="no plain file"):
        open_version(copy)


def test_real_graph_reads_the_weights_alone() -> None:
    assert external_locations((base_version().directory / "model.onnx").read_bytes()) == {"weights.bin"}


def test_location_is_found_in_initializers_attributes_subgraphs_and_functions() -> None:
    model = onnx.load(str(base_version().directory / "model.onnx"), load_external_data=False)
    model.graph.initializer.append(outside("../initializer"))
    model.graph.node.append(helper.make_node("Constant", [], ["c"], value=outside("/attribute")))
    branch = helper.make_graph([], "branch", [], [], [outside("subgraph")])
    model.graph.node.append(helper.make_node("If", ["c"], ["d"], then_branch=branch, else_branch=branch))
    inner = helper.make_node("Constant", [], ["e"], value=outside("function"))
    model.functions.append(helper.make_function("our", "F", [], ["e"], [inner], []))
    found = external_locations(model.SerializeToString())
    assert found == {"weights.bin", "../initializer", "/attribute", "subgraph", "function"}


def test_graph_that_reads_another_file_is_refused(copy: Path) -> None:
    path = copy / "model.onnx"
    data = path.read_bytes().replace(b"weights.bin", b"../e/passwd", 1)
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match="passwd"):
        open_version(copy)


def test_bytes_that_are_no_protobuf_are_refused(copy: Path) -> None:
    path = copy / "model.onnx"
    data = bytearray(path.read_bytes())
    data[: len(data) // 2] = os.urandom(4) * (len(data) // 8) + bytes(len(data) // 2 - 4 * (len(data) // 8))
    path.write_bytes(b"\x3a\xff\xff\xff\xff\x7f" + bytes(data[6:]))
    with pytest.raises(ArtifactError) as refusal:
        open_version(copy)
    assert refusal.value.code is Code.CORRUPT


def test_endless_nesting_is_refused() -> None:
    node = b""
    for _ in range(100):
        graph = b"\x0a" + _length(node) + node if node else b""
        attribute = b"\x32" + _length(graph) + graph
        node = b"\x2a" + _length(attribute) + attribute
    graph = b"\x0a" + _length(node) + node
    with pytest.raises(ArtifactError, match="nested deeper"):
        external_locations(b"\x3a" + _length(graph) + graph)


def _length(data: bytes) -> bytes:
    size, out = len(data), bytearray()
    while size > 0x7F:
        out.append(size & 0x7F | 0x80)
        size >>= 7
    return bytes((*out, size))
