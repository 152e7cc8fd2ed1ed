"""Reading ONNX files that anybody may have written: what does not fit ends in one sentence with a remedy."""

import sys
from pathlib import Path

import numpy as np
import pytest
from onnx import GraphProto, ModelProto, TensorProto

sys.path.insert(0, str(Path(__file__).parents[1]))

from onnx_fixtures import BOOL, graph, model, node, random, refinement, run_plainly, save, value

from forge.onnx_file import read_onnx, write_onnx
from wire.errors import ConfigError


def product() -> ModelProto:
    return model(graph([node("MatMul", "x w", "y")], [value("x", [2, 32])], [value("y")], w=random(32, 16)))


def outside(whole: ModelProto, **entries: str) -> ModelProto:
    """The first weight said to be outside, as `entries` say."""
    tensor = whole.graph.initializer[0]
    tensor.data_location = TensorProto.EXTERNAL
    tensor.ClearField("raw_data")
    for key, text in entries.items():
        tensor.external_data.add(key=key, value=text)
    return whole


def refuse(whole: ModelProto, home: Path) -> str:
    with pytest.raises(ConfigError) as refused:
        read_onnx(save(whole, home / "model.onnx"))
    assert "\n" not in refused.value.message
    assert ";" in refused.value.message, "a remedy follows"
    return refused.value.message


def test_weights_beside_the_graph_are_read_and_written_alike(tmp_path: Path) -> None:
    whole = product()
    write_onnx(whole, tmp_path / "a.onnx", beside=True)
    read = read_onnx(tmp_path / "a.onnx")
    assert (tmp_path / "a.onnx.data").stat().st_size == 32 * 16 * 4
    write_onnx(read, tmp_path / "b.onnx")
    assert not (tmp_path / "b.onnx.data").exists()
    feeds = {"x": random(2, 32)}
    np.testing.assert_array_equal(run_plainly(read, feeds)[0], run_plainly(whole, feeds)[0])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.onnx", "a.onnx.data", "b.onnx"]


@pytest.mark.parametrize("location", ["../weights.bin", "/etc/hostname", "", "link/weights.bin", "there.bin"])
def test_external_data_outside_of_the_folder_is_refused(location: str, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (tmp_path / "weights.bin").write_bytes(bytes(32 * 16 * 4))
    (home / "link").symlink_to(tmp_path)
    (home / "there.bin").symlink_to(tmp_path / "weights.bin")
    assert "outside the model's folder" in refuse(outside(product(), location=location), home)


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"location": "gone.bin"}, "not there"),
        ({"location": "weights.bin", "offset": "64"}, "do not fit"),
        ({"location": "weights.bin", "offset": "-64"}, "do not fit"),
        ({"location": "weights.bin", "length": "12"}, "do not fit"),
        ({"location": "weights.bin", "offset": "many"}, "no proper offset"),
    ],
)
def test_external_data_that_does_not_fit_is_refused(entries: dict[str, str], said: str, tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(bytes(32 * 16 * 4))
    assert said in refuse(outside(product(), **entries), tmp_path)


def cycle() -> GraphProto:
    nodes = [node("Add", "x b", "a"), node("Neg", "a", "b"), node("Neg", "b", "y")]
    return graph(nodes, [value("x", [2])], [value("y")])


def lost_in_a_body() -> GraphProto:
    whole = refinement()
    whole.initializer.remove(next(tensor for tensor in whole.initializer if tensor.name == "matrix"))
    return whole


@pytest.mark.parametrize(
    ("whole", "said"),
    [
        (cycle(), "cycle"),
        (lost_in_a_body(), "'matrix', which nothing gives"),
        (graph([node("Add", "x lost", "y")], [value("x", [2])], [value("y")]), "'lost', which nothing gives"),
        (graph([node("Neg", "x", "y")], [value("x", [2])], [value("z")]), "output 'z'"),
        (graph([node("Neg", "x", "y"), node("Exp", "x", "y")], [value("x", [2])], [value("y")]), "made twice"),
        (graph([node("Neg", "x", "x")], [value("x", [2])], [value("x")]), "made twice"),
    ],
)
def test_graph_that_cannot_run_is_refused_with_its_value(whole: GraphProto, said: str, tmp_path: Path) -> None:
    assert said in refuse(model(whole), tmp_path)


def claims(**fields: object) -> ModelProto:
    whole = product()
    tensor = whole.graph.initializer[0]
    for name, content in fields.items():
        tensor.ClearField(name)
        if isinstance(content, list):
            getattr(tensor, name).extend(content)
        else:
            setattr(tensor, name, content)
    return whole


@pytest.mark.parametrize(
    ("whole", "said"),
    [
        (claims(dims=[1 << 40, 1 << 40]), "claims"),
        (claims(dims=[32, 17]), "its shape and type mean 2176"),
        (claims(dims=[-1, 16]), "negative size"),
        (claims(data_type=99), "unknown type"),
        (claims(raw_data=b"", dims=[64]), "its shape and type mean 256"),
    ],
)
def test_tensor_that_is_not_what_it_claims_is_refused(whole: ModelProto, said: str, tmp_path: Path) -> None:
    assert said in refuse(whole, tmp_path)


def test_numbers_in_typed_fields_are_read_and_too_few_of_them_refused(tmp_path: Path) -> None:
    whole = product()
    tensor, numbers = whole.graph.initializer[0], random(32, 16)
    tensor.ClearField("raw_data")
    tensor.float_data.extend(numbers.ravel().tolist())
    read = read_onnx(save(whole, tmp_path / "good.onnx"))
    assert read.graph.initializer[0].raw_data == numbers.tobytes()
    tensor.dims[0] = 1 << 20
    assert "fewer numbers" in refuse(whole, tmp_path)


def test_nodes_out_of_order_are_sorted(tmp_path: Path) -> None:
    nodes = [node("Neg", "a", "y"), node("Exp", "x", "a")]
    read = read_onnx(save(model(graph(nodes, [value("x", [2])], [value("y")])), tmp_path / "model.onnx"))
    assert [entry.op_type for entry in read.graph.node] == ["Exp", "Neg"]


@pytest.mark.parametrize("content", [b"", b"not a model", bytes(1000), b"\x08\x0a\x3a\xff\xff\xff\xff\x0f"])
def test_file_that_is_no_model_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(ConfigError, match=";"):
        read_onnx(tmp_path / "model.onnx")
    with pytest.raises(ConfigError, match=r"name an \.onnx file"):
        read_onnx(tmp_path / "gone.onnx")


def test_graph_nested_without_end_is_refused(tmp_path: Path) -> None:
    inner = graph([node("Neg", "x", "z")], [], [value("z")])
    for depth in range(22):
        branch = node("If", "c", f"o{depth}", then_branch=inner, else_branch=graph([], [], [value("x")]))
        inner = graph([branch], [], [value(f"o{depth}")])
    whole = model(graph([node("If", "c", "y", then_branch=inner, else_branch=inner)],
                        [value("x", [2]), value("c", [], BOOL)], [value("y")]))  # fmt: skip
    assert "no ONNX model" in refuse(whole, tmp_path)
