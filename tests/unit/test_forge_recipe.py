"""Recipes: checked before anything runs, the same bytes every time, and after a kill only what was not done."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from checkpoint_fixtures import PROJECT, tiny_llama
from forge_command import forge

from cli.recipe import Recipe, plan
from cli.recipe_steps import STEPS, read_options
from host.keys import create_key
from host.settings import load_settings
from wire.errors import ArtifactError, ConfigError

RECIPE = """
model = "m"
version = "1.0"
source = "tiny"

[[step]]
do = "prune"
mlp = 0.3
calibration = "windows.json"

[[step]]
do = "build"
precision = "int8"

[[step]]
do = "evaluate"
windows = "windows.json"
checkpoint = "tiny"
min-quality = "perplexity-ratio=2"

[[step]]
do = "release"
key = "key.pem"
sequence = 3
"""
RESULTS = ("01-prune", "02-build", "03-evaluate", "04-release")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    tiny_llama(tmp_path / "tiny")
    (tmp_path / "windows.json").write_text(json.dumps({"tokens": [[5, 9, 300, 41, 7, 1200, 88] * 4, [17, 4] * 9]}))
    create_key(tmp_path / "key.pem")
    (tmp_path / "recipe.toml").write_text(RECIPE)
    return tmp_path


def run(place: Path, capsys: pytest.CaptureFixture[str], work: str = "work", *options: str) -> list[str]:
    """The states of the steps."""
    capsys.readouterr()
    forge("recipe", place / "recipe.toml", "--work", place / work, "--json", *options)
    return [row["state"] for row in json.loads(capsys.readouterr().out)]


def files_of(work: Path) -> dict[str, bytes]:
    return {path.relative_to(work).as_posix(): path.read_bytes() for path in work.rglob("*") if path.is_file()}


def killed(place: Path, work: str, pattern: str) -> None:
    """Run the recipe in a process that is killed as soon as the work folder has what matches the pattern."""
    command = [sys.executable, "-c", "from cli.main import main; main()", "forge", "recipe", str(place / "recipe.toml")]
    child = subprocess.Popen([*command, "--work", str(place / work)], cwd=PROJECT, stderr=subprocess.DEVNULL)
    deadline_s = time.monotonic() + 120
    while not list((place / work).glob(pattern)):
        assert child.poll() is None
        assert time.monotonic() < deadline_s
    os.kill(child.pid, signal.SIGKILL)
    child.wait(10)


def change(place: Path, old: str, new: str) -> None:
    text = (place / "recipe.toml").read_text()
    assert old in text
    (place / "recipe.toml").write_text(text.replace(old, new))


def test_recipe_killed_in_the_middle_goes_on_to_the_same_bytes(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    killed(place, "killed", ".*02-build.making*")
    assert not (place / "killed" / "02-build").exists()
    assert run(place, capsys, "killed", "--dry-run") == ["before", "do", "do", "do"]
    assert run(place, capsys, "killed") == ["before", "made", "made", "made"]
    assert run(place, capsys) == ["made"] * 4
    assert files_of(place / "killed") == files_of(place / "work")
    assert {path.name for path in (place / "work").iterdir()} == {*RESULTS, *(f"{name}.note" for name in RESULTS)}


def test_only_what_a_change_decides_is_made_again(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(place, capsys, "work", "--dry-run") == ["do"] * 4
    assert not (place / "work").exists()
    assert run(place, capsys) == ["made"] * 4
    assert run(place, capsys) == ["before"] * 4
    change(place, "sequence = 3", "sequence = 4")
    assert run(place, capsys) == ["before", "before", "before", "made"]
    change(place, 'precision = "int8"', 'precision = "int4"')
    assert run(place, capsys) == ["before", "made", "made", "made"]
    weights = place / "work" / "02-build" / "weights.bin"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert run(place, capsys, "work", "--dry-run") == ["before", "do", "do", "do"]
    (place / "windows.json").write_text(json.dumps({"tokens": [[5, 9, 300]]}))
    assert run(place, capsys, "work", "--dry-run") == ["do"] * 4


def test_model_that_is_worse_ends_the_recipe_before_the_release(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(place, "perplexity-ratio=2", "perplexity-ratio=0.5")
    with pytest.raises(ArtifactError, match=r"perplexity-ratio .* above the bound of 0\.5"):
        run(place, capsys)
    assert {path.name for path in (place / "work").iterdir()} >= {"01-prune", "02-build"}
    assert not (place / "work" / "04-release").exists()


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("mlp = 0.3", "mpl = 0.3", r"step 1 \(prune\): mpl: no such setting"),
        ("mlp = 0.3", 'mlp = "much"', r"step 1 \(prune\): mlp: .*number"),
        ('precision = "int8"', 'precision = "int9"', r"step 2 \(build\): precision"),
        ("sequence = 3", "sequence = 0", r"step 4 \(release\): sequence: .*1"),
        ("sequence = 3", "", r"step 4 \(release\): sequence: Field required"),
        ('calibration = "windows.json"', 'calibration = "none.json"', r"step 1 \(prune\): calibration: .*none.json"),
        ("perplexity-ratio=2", "perplexity-ratio", "no number"),
        ('do = "prune"', 'do = "shrink"', "step 1: do = 'shrink' is no step; choose one of prune, "),
        ('do = "prune"\nmlp = 0.3\ncalibration = "windows.json"', 'do = "build"', r"step 2 \(build\) takes a c"),
        ('source = "tiny"', 'source = "none"', "source: .*none is no folder"),
        ('model = "m"', 'model = "M M"', "model: "),
        ('version = "1.0"', "", "version: "),
        ('version = "1.0"', 'version = "1.0"\nkey = 1', "key: no such setting"),
    ],
)
def test_fault_is_named_before_anything_runs(old: str, new: str, said: str, place: Path) -> None:
    change(place, old, new)
    with pytest.raises(ConfigError, match=said):
        forge("recipe", place / "recipe.toml", "--work", place / "work")
    assert not (place / "work").exists()


@pytest.mark.parametrize(
    ("step", "options"),
    [
        ("distil", {"text": ["windows.json"], "steps": 5, "learning-rate": 1e-3, "hidden-weight": 0.5}),
        ("train-quantised", {"text": ["windows.json"], "steps": 5, "precision": "ternary"}),
        ("trim-vocabulary", {"keep": 300}),
        ("quantise", {"target-wire": "2MB"}),
        ("build", {"kv-cache": "int8", "scales-of": "tiny", "rounding": "gptq"}),
    ],
)
def test_options_are_those_of_the_command_line(step: str, options: Mapping[str, Any], place: Path) -> None:
    found = read_options(step, options, "step", place)
    for name, value in options.items():
        read = found[name.replace("-", "_")]
        assert read == value or read in (place / "tiny", [place / "windows.json"])
    assert set(STEPS) >= {step}


@pytest.mark.parametrize("file", sorted((PROJECT / "samples" / "recipes").glob("*.toml")), ids=lambda path: path.stem)
def test_recipes_of_the_samples_can_be_planned(file: Path, tmp_path: Path) -> None:
    assert plan(load_settings(Recipe, file), file.parent, tmp_path)


@pytest.mark.full
def test_training_that_was_killed_goes_on_to_the_same_bytes(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch", reason="no torch here; scripts/test --full makes .venv-train, which has it")
    (place / "text.txt").write_text("The man went out into the rain and said that it was late. " * 400)
    training = 'do = "train-quantised"\ntext = ["text.txt"]\nsteps = 60\nbatch = 2\nlength = 32\nsave-every = 5'
    change(place, 'do = "prune"\nmlp = 0.3\ncalibration = "windows.json"', training)
    killed(place, "killed", ".*train-quantised.making.training")
    assert run(place, capsys, "killed", "--dry-run") == ["do"] * 4
    assert run(place, capsys, "killed") == ["made"] * 4
    assert run(place, capsys) == ["made"] * 4
    assert files_of(place / "killed") == files_of(place / "work")


@pytest.mark.full
@pytest.mark.parametrize("file", sorted((PROJECT / "samples" / "recipes").glob("*.toml")), ids=lambda path: path.stem)
def test_recipes_of_the_samples_run_to_their_end(file: Path, tmp_path: Path) -> None:
    forge("recipe", file, "--work", tmp_path / "work")
    assert list((tmp_path / "work").glob("*-evaluate"))
