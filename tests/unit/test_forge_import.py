"""Versions of any ONNX model: what they hold, that they run as the model does, and what is refused."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, TensorProto

sys.path.insert(0, str(Path(__file__).parents[1]))

from graph_fixtures import LARGEST, NETWORK, VISION, graph_version, network, pixels, vision
from onnx_fixtures import FLOAT, graph, model, node, random, run_plainly, save, value
from runtime_fixtures import shuffle_tensor

from codec.versions import read_version
from forge.build import build_version
from forge.graph_golden import Examples
from forge.graph_import import GraphChoices, import_graph
from forge.quantise import Precision
from forge.release import make_release
from forge.verify import verify_release
from host.keys import create_key, load_signer
from runtime.golden_graph import judge_graph, read_tensors_golden
from runtime.graph import Graph
from runtime.version import open_version
from wire.documents import encode_document
from wire.errors import AmperageError, ConfigError
from wire.manifest import Datatype, Dtype, GraphConfig, GraphTensor, Layout
from wire.serving import ExecutionOptions
from wire.signing import RoleKeys, TrustPolicy


def loaded(directory: Path) -> Graph:
    document, _ = open_version(directory)
    assert isinstance(document.config, GraphConfig)
    return Graph(directory, document.config, ExecutionOptions(threads=1))


def judged(directory: Path) -> Any:
    graph = loaded(directory)
    return judge_graph(graph.run, graph.config, read_tensors_golden(directory, graph.config))


def test_version_says_what_goes_in_and_out_and_its_weights_are_typed() -> None:
    document = graph_version(VISION).document
    assert document.config == GraphConfig(
        inputs=(GraphTensor(name="pixels", datatype=Datatype.FP32, shape=("batch", 3, "height", "width")),),
        outputs=(
            GraphTensor(name="shares", datatype=Datatype.FP32, shape=("batch", 10)),
            GraphTensor(name="best", datatype=Datatype.INT64, shape=("batch",)),
        ),
        largest=LARGEST,
    )
    assert document.tensors.name == ("kernel", "head")
    assert document.tensors.layout == (Layout.F32, Layout.F32)


def test_version_runs_as_the_model_does_and_passes_its_golden_runs_with_room() -> None:
    version = graph_version(VISION)
    found = loaded(version.directory).run({"pixels": pixels()})
    for name, expected in zip(("shares", "best"), run_plainly(vision(), {"pixels": pixels()}), strict=True):
        np.testing.assert_allclose(found[name], expected, rtol=1e-4, atol=1e-6)
    judgement = judged(version.directory)
    assert not judgement.fault
    assert judgement.worst_error < judgement.tolerance / 8
    golden = json.loads((version.directory / "golden.json").read_text())
    assert [run["inputs"]["pixels"]["shape"] for run in golden["runs"]] == [
        [1, 3, 1, 1],
        [2, 3, 16, 16],
        [4, 3, 32, 32],
    ]


def test_importing_twice_gives_the_same_version(tmp_path: Path) -> None:
    source = save(vision(), tmp_path / "model.onnx")
    again = import_graph(source, tmp_path / "again", (VISION, "1.0"), GraphChoices(LARGEST))
    assert again == graph_version(VISION).document


def test_default_of_an_input_becomes_a_constant() -> None:
    config = graph_version(NETWORK).document.config
    assert isinstance(config, GraphConfig)
    assert [tensor.name for tensor in config.inputs] == ["words"]


@pytest.mark.parametrize("name", [VISION, NETWORK])
def test_each_tensor_damaged_in_turn_is_caught(name: str, tmp_path: Path) -> None:
    version = graph_version(name)
    for row, tensor in enumerate(version.document.tensors.name):
        spoiled = Path(shutil.copytree(version.directory, tmp_path / tensor))
        shuffle_tensor(spoiled, row)
        assert "over the tolerance" in judged(spoiled).fault, tensor


@pytest.mark.parametrize(("precision", "dtype"), [(Precision.INT8, Dtype.U8), (Precision.INT4, Dtype.U4)])
def test_matrices_in_blocks_stay_near_the_model(precision: Precision, dtype: Dtype) -> None:
    version = graph_version(NETWORK, precision)
    columns = version.document.tensors
    assert [name for name, kind in zip(columns.name, columns.dtype, strict=True) if kind is dtype] == [
        "first.packed", "second.packed",
    ]  # fmt: skip
    words = np.arange(7)
    found = loaded(version.directory).run({"words": words})["y"]
    (expected,) = run_plainly(network(), {"words": words})
    error = np.sqrt(np.mean((found - expected) ** 2)) / expected.std()
    assert error < (0.02 if precision is Precision.INT8 else 0.2)
    assert not judged(version.directory).fault


def test_release_of_a_graph_verifies_as_a_node_would(tmp_path: Path) -> None:
    keys = RoleKeys(keys=(create_key(tmp_path / "key.pem"),))
    trust = tmp_path / "trust.json"
    trust.write_bytes(encode_document(TrustPolicy(release=keys, desired=keys)))
    for precision, name in ((None, "float32"), (Precision.INT8, "int8-block32")):
        out = tmp_path / name
        make_release(graph_version(NETWORK, precision).directory, out, load_signer(tmp_path / "key.pem"), sequence=1)
        assert verify_release(out, trust, None)[f"{name} full"] == "ok"


def typed() -> ModelProto:
    """Weights of many types, each cast to float32 and summed."""
    kinds = {"half": np.float16, "double": np.float64, "small": np.int8, "bytes": np.uint8, "long": np.int64}
    weights = {name: (10 * abs(random(1200))).astype(kind) for name, kind in kinds.items()}
    nodes = [node("Cast", name, f"{name}.cast", to=FLOAT) for name in weights]
    nodes += [node("Sum", " ".join(f"{name}.cast" for name in weights), "sum"), node("Mul", "sum x", "y")]
    return model(graph(nodes, [value("x", [1200])], [value("y", [1200])], **weights))


def test_weights_of_every_type_come_back_as_they_were(tmp_path: Path) -> None:
    document = import_graph(save(typed(), tmp_path / "in.onnx"), tmp_path / "version", ("typed", "1"))
    kinds = dict(zip(document.tensors.name, document.tensors.layout, strict=True))
    assert kinds["half"] is Layout.F16
    assert {kinds[name] for name in ("double", "small", "bytes", "long")} == {Layout.BYTES}
    x = random(1200, seed=1)
    found = loaded(tmp_path / "version").run({"x": x})["y"]
    np.testing.assert_allclose(found, run_plainly(typed(), {"x": x})[0], rtol=1e-5)


def with_input(**told: Any) -> ModelProto:
    whole = vision()
    whole.graph.input[0].CopyFrom(value("pixels", **told))
    return whole


def infinite() -> ModelProto:
    nodes = [node("Mul", "x zero", "nothing"), node("Div", "w nothing", "y")]
    return model(graph(nodes, [value("x", [600])], [value("y", [600])], w=random(600), zero=np.float32(0)))


@pytest.mark.parametrize(
    ("whole", "choices", "said"),
    [
        (vision(), GraphChoices(), "--size batch=8"),
        (vision(), GraphChoices(LARGEST | {"depth": 3}), "no size is called 'depth'"),
        (vision(), GraphChoices(LARGEST | {"height": 1 << 16}), "choose smaller sizes"),
        (vision(), GraphChoices(LARGEST, precision=Precision.INT4), "leave --precision out"),
        (vision(), GraphChoices(LARGEST, precision=Precision.TERNARY), "use one of int8, int4"),
        (vision(), GraphChoices(LARGEST, Examples({"image": (0, 1)})), "no input 'image'"),
        (vision(), GraphChoices(LARGEST, Examples(given={"pixels": random(1, 3, 64, 8)})), "numbers that fit"),
        (with_input(shape=None), GraphChoices(), "known rank"),
        (with_input(shape=["batch", 3, 8, 8], kind=TensorProto.STRING), GraphChoices({"batch": 1}), "add a Cast"),
        (model(graph([node("Neg", "x", "y")], [value("x", [2])], [value("y", [2])])), GraphChoices(), "no weights"),
        (infinite(), GraphChoices(), "nowhere finite"),
    ],
)
def test_model_that_cannot_be_served_is_refused_with_a_remedy(
    whole: ModelProto, choices: GraphChoices, said: str, tmp_path: Path
) -> None:
    with pytest.raises(AmperageError) as refused:
        import_graph(save(whole, tmp_path / "in.onnx"), tmp_path / "out", ("m", "1"), choices)
    assert said in refused.value.message
    assert not (tmp_path / "out").exists()


def test_given_inputs_become_a_golden_run(tmp_path: Path) -> None:
    given = {"words": np.asarray([3, 1, 2])}
    choices = GraphChoices({"n": 12}, Examples(given=given))
    import_graph(save(network(), tmp_path / "in.onnx"), tmp_path / "out", (NETWORK, "1"), choices)
    golden = json.loads((tmp_path / "out" / "golden.json").read_text())
    assert golden["runs"][0]["inputs"]["words"]["values"] == [3, 1, 2]
    assert not judged(tmp_path / "out").fault


def test_build_of_an_onnx_file_says_which_command_takes_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="forge import"):
        build_version(save(vision(), tmp_path / "in.onnx"), tmp_path / "out", ("m", "1"))


def test_golden_runs_that_do_not_fit_the_graph_are_refused(tmp_path: Path) -> None:
    directory = Path(shutil.copytree(graph_version(VISION).directory, tmp_path / "version"))
    config = read_version(directory).config
    assert isinstance(config, GraphConfig)
    golden = json.loads((directory / "golden.json").read_text())
    golden["runs"][0]["inputs"]["pixels"]["shape"] = [1, 3, 64, 64]
    (directory / "golden.json").write_text(json.dumps(golden))
    with pytest.raises(AmperageError, match="does not fit the model"):
        read_tensors_golden(directory, config)
