"""Training with torch: the same mathematics as the forge's, the same bits after a kill, and students that learn.

`scripts/test --full` runs these in the environment that has torch (scripts/train).
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from onnx.numpy_helper import to_array
from safetensors.numpy import load_file

sys.path.insert(0, str(Path(__file__).parents[1]))

from checkpoint_fixtures import HEAD, HIDDEN, LAYERS, PROJECT, tiny_llama

from cli.main import main
from forge.build import build_version
from forge.checkpoint import Checkpoint
from forge.quantise import Precision, quantise_blocks
from forge.reference import checkpoint_judge, float_twin
from wire.errors import ConfigError

pytestmark = pytest.mark.full
torch = pytest.importorskip("torch", reason="no torch here; scripts/test --full makes .venv-train, which has it")

TEXT = "".join(f"The {i}th traveller came by the road to the sea, and told {i % 7} others.\n" for i in range(600))
SAMPLE = PROJECT / "samples" / "tales-5m-base"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny_llama(tmp_path / "source")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["forge", *map(str, arguments)])
    return int(ended.value.code or 0)


def test_forward_pass_is_that_of_the_forges_float_graph(tmp_path: Path) -> None:
    from forge.training.llama import forward

    tokens = json.loads((PROJECT / "samples" / "eval" / "tales-5m-base.json").read_text())["tokens"][0][:200]
    checkpoint = Checkpoint(SAMPLE)
    expected = checkpoint_judge(checkpoint, tmp_path).logits(tokens)
    parameters = {name: torch.from_numpy(checkpoint.tensor(name, checkpoint.shape(name))) for name in checkpoint.names}
    with torch.no_grad():
        found = forward(checkpoint.architecture, parameters, torch.tensor([tokens])).logits[0].numpy()
    assert np.abs(found - expected).max() < 1e-4


@pytest.mark.parametrize("precision", [Precision.INT8, Precision.INT4, Precision.INT2, Precision.TERNARY])
def test_grid_is_what_the_forge_ships_and_lets_gradients_through(precision: Precision) -> None:
    from forge.training.grid import on_grid

    weights = np.random.default_rng(3).standard_normal((8, 64)).astype(np.float16).astype(np.float32)
    matrices = {"model.layers.0.mlp.up_proj.weight": precision, "lm_head.weight": precision.of_tables}
    for name, stored in matrices.items():
        value = torch.from_numpy(weights.copy()).requires_grad_()
        shipped = on_grid(precision, {name: value})[name]
        expected = quantise_blocks("w", weights, precision=stored).dequantise()
        assert np.abs(shipped.detach().numpy() - expected).max() < 1e-6
        (shipped * 3).sum().backward()
        assert (value.grad == 3).all()


DISTIL = ("--steps", 12, "--batch", 2, "--length", 32, "--save-every", 4, "--json")


def test_student_of_fewer_layers_and_less_width_learns_and_is_built(
    source: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = ("--layers", 1, "--hidden", 32, "--mlp", 64, "--learning-rate", 0.01, "--heldout", text)
    assert run("distil", source, tmp_path / "out", "--text", text, *DISTIL, *shape, "--steps", 40) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["loss_last"] < 0.9 * figures["loss_first"]
    a = Checkpoint(tmp_path / "out").architecture
    assert (a.layers, a.hidden_size, a.heads, a.kv_heads, a.head_size, a.mlp_size) == (1, 32, 2, 2, HEAD, 64)
    assert {value.dtype.name for value in load_file(tmp_path / "out" / "model.safetensors").values()} == {"float16"}
    build_version(tmp_path / "out", tmp_path / "version", ("m", "1"))


def test_student_of_the_teachers_width_begins_with_its_layers(source: Path) -> None:
    from forge.checkpoint_folder import read_folder
    from forge.training.distil import Distillation, chosen_layers, first_parameters, student_of

    folder = read_folder(source)
    parameters = first_parameters(folder, student_of(folder.architecture, Distillation(layers=1)), 0)
    name = "model.layers.0.mlp.down_proj.weight"
    assert np.array_equal(parameters[name].numpy(), folder.tensors[name])
    assert chosen_layers(6, 3) == [0, 2, 5]
    assert [chosen_layers(LAYERS, LAYERS), chosen_layers(4, 1)] == [[0, 1], [0]]


@pytest.mark.parametrize("command", [("distil", "--layers", 1), ("train-quantised", "--precision", "ternary")])
def test_run_that_was_killed_goes_on_and_ends_with_the_same_bits(
    source: Path, text: Path, tmp_path: Path, command: tuple[object, ...]
) -> None:
    name, *choice = command
    arguments = [*map(str, (*choice, "--text", text, *DISTIL, "--steps", 60))]
    assert run(name, source, tmp_path / "whole", *arguments) == 0
    code = "import sys; from cli.main import main; main(sys.argv[1:])"
    place = tmp_path / "killed"
    started = [sys.executable, "-c", code, "forge", str(name), str(source), str(place), *arguments]
    child = subprocess.Popen(started, cwd=PROJECT)
    state = tmp_path / ".killed.training"
    deadline = time.monotonic() + 120
    while not state.exists() and child.poll() is None and time.monotonic() < deadline:
        os.sched_yield()
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert state.exists(), "it was killed between its first state and its end"
    assert not place.exists()
    assert run(name, source, place, *arguments) == 78, "without --resume a state is not passed over in silence"
    assert run(name, source, place, *arguments, "--seed", 1, "--resume") == 78, "nor is that of another run taken"
    assert run(name, source, place, *arguments, "--resume") == 0
    assert not state.exists()
    for file in ("model.safetensors", "config.json"):
        assert (place / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


@pytest.mark.parametrize("precision", [Precision.INT4, Precision.INT2, Precision.TERNARY])
def test_training_on_the_grid_lowers_its_distance_to_the_float_model(
    source: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], precision: Precision
) -> None:
    arguments = ("--precision", precision, "--text", text, *DISTIL, "--steps", 60, "--learning-rate", 0.002)
    assert run("train-quantised", source, tmp_path / "out", *arguments) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["loss_last"] < figures["loss_first"]


@pytest.mark.parametrize("precision", [Precision.INT4, Precision.TERNARY])
def test_checkpoint_is_built_to_the_values_that_were_trained(
    source: Path, text: Path, tmp_path: Path, precision: Precision
) -> None:
    from forge.training.grid import on_grid

    assert run("train-quantised", source, tmp_path / "out", "--precision", precision, "--text", text, *DISTIL) == 0
    saved = load_file(tmp_path / "out" / "model.safetensors")
    trained = on_grid(precision, {name: torch.from_numpy(value.astype(np.float32)) for name, value in saved.items()})
    version = build_version(tmp_path / "out", tmp_path / "version", ("m", "1"), precision=precision)
    built = twin_matrices(tmp_path / "version")
    assert version.tensors.name
    assert np.abs(built["down"] - trained["model.layers.0.mlp.down_proj.weight"].numpy()).max() < 1e-6
    assert np.abs(built["embedding"] - trained["model.embed_tokens.weight"].numpy()).max() < 1e-6


def twin_matrices(directory: Path) -> dict[str, np.ndarray]:
    """Of the float32 twin of a version: the first layer's down matrix and the embedding, [rows, columns]."""
    graph = float_twin(directory).graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    inputs = {node.output[0]: node.input for node in graph.node}
    down, embedding = inputs["model.layers.0.mlp.down"][1], inputs["model.embed_tokens"][0]
    return {"down": to_array(stored[down]).T, "embedding": to_array(stored[embedding])}


def test_student_that_does_not_fit_is_refused_with_a_remedy(source: Path) -> None:
    from forge.training.distil import Distillation, student_of

    a = Checkpoint(source).architecture
    for recipe, remedy in (
        (Distillation(layers=LAYERS + 1), "choose fewer layers"),
        (Distillation(hidden_size=40), "no multiple of 32"),
        (Distillation(hidden_size=HIDDEN * 2), "less width"),
        (Distillation(mlp_size=50), "no multiple of 32"),
    ):
        with pytest.raises(ConfigError, match=remedy):
            student_of(a, recipe)
