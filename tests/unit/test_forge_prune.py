"""Pruning: the right weights become zero and stay it in int4; the right heads and columns leave a model that works."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[1]))

from checkpoint_fixtures import HEAD, KV_HEADS, LAYERS, MLP, PROJECT, tiny_llama

from cli.main import main
from codec.inspection import measure_planes, open_pack
from codec.versions import read_version
from forge.artifact import artifacts_in
from forge.build import build_version
from forge.checkpoint import Checkpoint
from forge.checkpoint_folder import read_folder, write_folder
from forge.golden import row_error
from forge.prune import Magnitude, Pattern, Rule, Scope, Threshold, masks, prune_checkpoint
from forge.quantise import quantise_blocks
from forge.reference import checkpoint_judge, shipped_judge
from forge.release import make_release
from forge.shrink import Shrinking, shrink_checkpoint
from host.keys import create_key, load_signer
from wire.errors import ConfigError
from wire.golden import GoldenSet

PARITY = PROJECT / "tests" / "fixtures" / "parity"

SAMPLE = PROJECT / "samples" / "tales-5m-base"
PRUNED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny_llama(tmp_path / "source")


def matrices(folder: Path) -> dict[str, np.ndarray]:
    stored = load_file(folder / "model.safetensors")
    return {name: values for name, values in stored.items() if name.split(".")[-2] in PRUNED}


def test_smallest_weights_of_all_matrices_become_zero_and_the_rest_stays(source: Path, tmp_path: Path) -> None:
    figures = prune_checkpoint(source, tmp_path / "out", Magnitude(0.5))
    before, after = matrices(source), matrices(tmp_path / "out")
    assert len(before) == 7 * LAYERS
    old = np.concatenate([values.ravel() for values in before.values()])
    new = np.concatenate([after[name].ravel() for name in before])
    assert np.count_nonzero(new == 0) == round(old.size / 2) == figures["zeros"]
    assert np.abs(old[new == 0]).max() <= np.abs(old[new != 0]).min()
    assert np.array_equal(new[new != 0], old[new != 0])
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for name, values in load_file(source / "model.safetensors").items():
        assert stored[name].dtype == values.dtype == np.float16
        if name not in before:
            assert np.array_equal(stored[name], values), f"{name} is no matrix to prune"
    assert "no sparse kernels" in figures["gain"]


def test_share_per_matrix_is_the_same_in_each(source: Path, tmp_path: Path) -> None:
    stored = load_file(source / "model.safetensors")
    stored["model.layers.0.mlp.up_proj.weight"] *= np.float16(8)  # which a global share would spare
    save_file(stored, source / "model.safetensors")
    prune_checkpoint(source, tmp_path / "each", Magnitude(0.75, Scope.MATRIX))
    prune_checkpoint(source, tmp_path / "all", Magnitude(0.75))
    assert {np.mean(values == 0) for values in matrices(tmp_path / "each").values()} == {0.75}
    assert np.mean(matrices(tmp_path / "all")["model.layers.0.mlp.up_proj.weight"] == 0) < 0.25


@pytest.mark.parametrize(("kept", "group"), [(2, 4), (1, 4), (4, 8)])
def test_pattern_keeps_the_largest_of_every_group_along_the_input(kept: int, group: int) -> None:
    weights = np.random.default_rng(1).standard_normal((8, 64)).astype(np.float32)
    mask = masks({"w": weights}, Pattern(kept, group))["w"].reshape(8, -1, group)
    sizes = np.abs(weights).reshape(8, -1, group)
    assert (mask.sum(axis=2) == kept).all()
    assert (np.where(mask, sizes, np.inf).min(axis=2) > np.where(mask, 0, sizes).max(axis=2)).all()


def test_equal_weights_are_pruned_to_the_exact_share_and_always_alike() -> None:
    weights = np.full((16, 32), 0.5, np.float32)
    for rule in (Magnitude(0.25), Magnitude(0.25, Scope.MATRIX)):
        mask = masks({"w": weights}, rule)["w"]
        assert np.count_nonzero(~mask) == weights.size // 4
        assert not mask.ravel()[: weights.size // 4].any()


def test_threshold_is_a_size(tmp_path: Path, source: Path) -> None:
    prune_checkpoint(source, tmp_path / "out", Threshold(0.1))
    left = np.concatenate([np.abs(values[values != 0]) for values in matrices(tmp_path / "out").values()])
    assert left.min() >= 0.0999
    assert left.size == sum(np.count_nonzero(np.abs(v.astype(np.float32)) >= 0.1) for v in matrices(source).values())


def test_zeros_are_exactly_zero_in_int4(source: Path, tmp_path: Path) -> None:
    prune_checkpoint(source, tmp_path / "out", Magnitude(0.9))
    for name, values in matrices(tmp_path / "out").items():
        shipped = quantise_blocks(name, values.astype(np.float32)).dequantise()
        assert not shipped[values == 0].any()


@pytest.mark.parametrize("rule", [Magnitude(0.5), Pattern(2, 4), Threshold(0.05)])
def test_pruning_twice_gives_the_same_bytes(source: Path, tmp_path: Path, rule: Rule) -> None:
    for name in ("one", "two"):
        prune_checkpoint(source, tmp_path / name, rule)
    for file in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "source", "two"], "nothing is left behind"


def test_ninety_per_cent_pruned_int4_is_a_fifth_of_its_bits_on_the_wire(tmp_path: Path) -> None:
    prune_checkpoint(SAMPLE, tmp_path / "pruned", Magnitude(0.9))
    build_version(tmp_path / "pruned", tmp_path / "version", ("m", "1"))
    create_key(tmp_path / "key.pem")
    make_release(tmp_path / "version", tmp_path / "release", load_signer(tmp_path / "key.pem"), sequence=1)
    artifact = artifacts_in(tmp_path / "release")[0]
    with open_pack(artifact.manifest, artifact.pack) as pack:
        planes = [plane for plane in measure_planes(pack, entropy=False) if plane.stream.name.startswith("layers.")]
    packed = [plane for plane in planes if plane.stream.name.endswith(".packed")]
    assert len({plane.stream.name for plane in packed}) == 6 * 4
    weights = sum(values.size for values in matrices(SAMPLE).values())
    assert weights / 2 / sum(plane.coded_bytes for plane in packed) >= 4.75, "of four bits per weight"


def golden_errors(directory: Path) -> tuple[float, float]:
    """The tolerance, and the largest error of the golden vectors as shipped."""
    golden = GoldenSet.model_validate_json((directory / "golden.json").read_bytes())
    judge = shipped_judge(directory, read_version(directory))
    rows = [judge.logits(vector.input_ids, [len(vector.input_ids) - 1])[0] for vector in golden.vectors]
    return golden.tolerance, max(row_error(vector, row) for vector, row in zip(golden.vectors, rows, strict=True))


@pytest.mark.parametrize("calibrated", [False, True])
def test_model_of_fewer_heads_and_columns_is_smaller_and_right_by_its_golden_vectors(
    source: Path, tmp_path: Path, calibrated: bool
) -> None:
    windows = [list(range(5, 60)), list(range(900, 1000))] if calibrated else None
    figures = shrink_checkpoint(source, tmp_path / "out", Shrinking(heads=0.5, mlp=0.3), windows)
    a = Checkpoint(tmp_path / "out").architecture
    assert (a.heads, a.kv_heads, a.head_size, a.mlp_size) == (2, 1, HEAD, 64)
    assert figures["parameters"] < figures["parameters_before"]
    build_version(tmp_path / "out", tmp_path / "version", ("m", "1"))
    tolerance, error = golden_errors(tmp_path / "version")
    assert error < tolerance


def deadened(source: Path) -> None:
    """The second group of heads and every third MLP column write nothing any more, however large their own weights."""
    stored = load_file(source / "model.safetensors")
    for i in range(LAYERS):
        stored[f"model.layers.{i}.self_attn.o_proj.weight"][:, 2 * HEAD :] = 0
        stored[f"model.layers.{i}.mlp.down_proj.weight"][:, ::3] = 0
        stored[f"model.layers.{i}.mlp.gate_proj.weight"][::3] *= np.float16(0.5)
    save_file(stored, source / "model.safetensors")


@pytest.mark.parametrize("calibrated", [False, True])
def test_parts_that_write_nothing_leave_and_the_logits_stay(source: Path, tmp_path: Path, calibrated: bool) -> None:
    deadened(source)
    text = list(range(100, 164))
    choice = Shrinking(heads=1 / KV_HEADS, mlp=1 / 3)
    shrink_checkpoint(source, tmp_path / "out", choice, [text] if calibrated else None)
    assert Checkpoint(tmp_path / "out").architecture.mlp_size == MLP * 2 // 3
    logits = []
    for folder in (source, tmp_path / "out"):
        scratch = tmp_path / f"{folder.name}-scratch"
        scratch.mkdir()
        logits.append(checkpoint_judge(Checkpoint(folder), scratch).logits(text))
    assert np.abs(logits[0] - logits[1]).max() < 1e-4


def test_heads_with_biases_leave_and_the_logits_stay(tmp_path: Path) -> None:
    source = Path(shutil.copytree(PARITY / "tiny-qwen2", tmp_path / "source"))
    tensors = read_folder(source).tensors
    for i in range(2):
        tensors[f"model.layers.{i}.self_attn.o_proj.weight"][:, 2 * HEAD :] = 0
    write_folder(source, tmp_path / "dead", json.loads((source / "config.json").read_text()), tensors)
    shrink_checkpoint(tmp_path / "dead", tmp_path / "out", Shrinking(heads=0.5), [list(range(40))])
    logits = []
    for folder in (tmp_path / "dead", tmp_path / "out"):
        scratch = tmp_path / f"{folder.name}-scratch"
        scratch.mkdir()
        logits.append(checkpoint_judge(Checkpoint(folder), scratch).logits(list(range(64))))
    assert np.abs(logits[0] - logits[1]).max() < 1e-4


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (["--magnitude", "1.5"], "choose one between 0 and 1"),
        (["--magnitude", "0.5", "--n-m", "2:4"], "choose one of"),
        ([], "choose one of"),
        (["--n-m", "4:4"], "2:4 or 4:8"),
        (["--n-m", "two"], "write it as 2:4"),
        (["--n-m", "2:5"], "no multiple of 5"),
        (["--heads", "0.1"], "ask for 0.50"),
        (["--mlp", "1"], "choose below 1"),
        (["--threshold", "0"], "over 0"),
        (["--per-layer", "--mlp", "0.5"], "add --magnitude"),
        (["--magnitude", "0.5", "--calibration", "x.json"], "leave --calibration out"),
    ],
)
def test_choice_that_does_not_fit_is_refused_with_a_remedy(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], remedy: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["forge", "prune", str(source), str(tmp_path / "out"), *arguments])
    assert ended.value.code == 78
    assert remedy in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_command_prints_figures_and_refuses_a_place_that_is_taken(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["forge", "prune", str(source), str(tmp_path / "out"), "--n-m", "2:4", "--json"])
    assert not ended.value.code
    assert json.loads(capsys.readouterr().out)["sparsity"] == 0.5
    with pytest.raises(ConfigError, match="remove it"):
        prune_checkpoint(source, tmp_path / "out", Pattern(2, 4))
