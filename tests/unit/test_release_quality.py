"""A release is refused when the model is worse than asked, and its manifests tell figures and where it comes from."""

import json
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from checkpoint_fixtures import tiny_llama
from encoder_fixtures import CHECKPOINT, encoder_version
from forge_command import forge

from forge.artifact import artifacts_in
from forge.bounds import parse_bounds
from forge.provenance import Provenance, chain_of, digest_of_file, read_provenance
from host.keys import create_key
from wire.errors import ArtifactError, Code, ConfigError
from wire.manifest import Manifest


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A tiny checkpoint, windows for it, and a key."""
    tiny_llama(tmp_path / "tiny")
    (tmp_path / "windows.json").write_text(json.dumps({"tokens": [[5, 9, 300, 41, 7, 1200, 88] * 4, [17, 4] * 9]}))
    create_key(tmp_path / "key.pem")
    return tmp_path


def build(place: Path, *options: object) -> Path:
    forge("build", place / "tiny", "--name", "m", "--version", "1", "--out", place / "version", *options)
    return place / "version"


def release(place: Path, *options: object, version: Path | None = None) -> Manifest:
    forge(
        "release", version or place / "version", "--key", place / "key.pem", "--sequence", 1, "--out", place / "r",
        *options,
    )  # fmt: skip
    return artifacts_in(place / "r")[0].manifest


def measured(place: Path) -> tuple[object, ...]:
    return ("--windows", place / "windows.json", "--checkpoint", place / "tiny")


def test_good_model_is_released_with_its_figures(place: Path) -> None:
    build(place)
    manifest = release(place, *measured(place), "--min-quality", "kl=0.5, top1=0.3,perplexity-ratio=1.5")
    quality = manifest.quality
    assert quality.perplexity is not None
    assert quality.perplexity_reference is not None
    assert quality.evaluation is not None
    told = dict(part.split("=") for part in quality.evaluation.split(","))
    assert (told["windows"], told["tokens"]) == ("2", "46")
    assert 0 < float(told["kl"]) < 0.5
    assert float(told["perplexity-ratio"]) == pytest.approx(quality.perplexity / quality.perplexity_reference, rel=1e-3)


@pytest.mark.parametrize("bound", ["kl=1e-9", "top1=0.9999", "perplexity=1.5", "perplexity-ratio=0.5"])
def test_worse_model_is_refused_by_figure_bound_and_value_and_nothing_is_left(bound: str, place: Path) -> None:
    build(place, "--precision", "binary")
    before = sorted(place.iterdir())
    with pytest.raises(ArtifactError) as refused:
        release(place, *measured(place), "--min-quality", bound)
    assert refused.value.code is Code.REGRESSION
    name, value = bound.split("=")
    assert refused.value.message.startswith(f"{name} (")
    assert f"the bound of {float(value):g}" in refused.value.message
    assert "train it for its precision" in refused.value.message
    assert sorted(place.iterdir()) == before


def test_encoder_is_bounded_by_its_least_cosine(place: Path) -> None:
    version = Path(shutil.copytree(encoder_version().directory, place / "encoder"))
    with pytest.raises(ArtifactError, match=r"cosine .* below the bound of 0\.999999"):
        release(place, "--checkpoint", CHECKPOINT, "--min-quality", "cosine=0.999999", version=version)
    manifest = release(place, "--checkpoint", CHECKPOINT, "--min-quality", "cosine=0.99", version=version)
    assert manifest.quality.evaluation is not None
    assert manifest.quality.evaluation.startswith("texts=9,cosine=0.99")


@pytest.mark.parametrize(
    ("text", "said"),
    [("kl", "no number"), ("kl=much", "no number"), ("kl=-1", "above 0"), ("kl=nan", "above 0"), ("bleu=3", "bleu")],
)
def test_bound_that_is_none_is_refused(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_bounds(text)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--min-quality", "kl=1", "--windows", "{}/windows.json"), "--checkpoint"),
        (("--min-quality", "perplexity=9"), "--windows"),
        (("--min-quality", "cosine=0.9"), "a decoder, which has no cosine"),
    ],
)
def test_bound_without_what_it_is_measured_by_is_refused(options: tuple[str, ...], said: str, place: Path) -> None:
    build(place)
    with pytest.raises(ConfigError, match=said):
        release(place, *(option.format(place) for option in options))


def test_release_tells_every_step_from_the_first_checkpoint_on(place: Path) -> None:
    forge("prune", place / "tiny", place / "a", "--magnitude", 0.5, "--per-layer")
    forge("prune", place / "a", place / "b", "--mlp", 0.3, "--calibration", place / "windows.json")
    options = ("--precision", "int8", "--kv-cache", "int8", "--calibration", place / "windows.json")
    forge("build", place / "b", "--name", "m", "--version", "1", "--out", place / "version", *options)
    told = release(place).provenance
    windows = digest_of_file(place / "windows.json")
    assert told["source model.safetensors"] == digest_of_file(place / "tiny" / "model.safetensors")
    assert told["source tokenizer.json"] == digest_of_file(place / "tiny" / "tokenizer.json")
    assert told["step 1"] == "prune --magnitude 0.5 --per-layer"
    assert told["step 2"] == f"prune --mlp 0.3 --calibration {windows[:12]}…"
    assert told["step 2 calibration"] == windows
    assert told["step 3"] == f"build --kv-cache int8 --precision int8 --calibration {windows[:12]}…"
    assert "numpy " in told["step 3 tools"]
    assert "times the tolerance" in told["least noticed damage"]
    assert str(place) not in json.dumps(told)


def test_inspect_shows_figures_and_history_of_a_version_and_of_its_release(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    forge("inspect", build(place, "--precision", "int8"))
    assert "build --precision int8" in capsys.readouterr().out
    release(place, *measured(place))
    capsys.readouterr()
    forge("inspect", place / "r")
    shown = capsys.readouterr().out
    assert "build --precision int8" in shown
    assert "windows=2,tokens=46,perplexity=" in shown
    forge("inspect", place / "r", "--json")
    told = json.loads(capsys.readouterr().out)
    assert told["provenance"]["step 1"] == "build --precision int8"
    assert told["quality"]["perplexity"] > 1


def test_history_is_the_same_whoever_makes_it_where_and_when(place: Path) -> None:
    for name in ("a", "b"):
        (place / name).mkdir()
        forge("prune", place / "tiny", place / name / "pruned", "--n-m", "2:4")
        forge("build", place / name / "pruned", "--name", "m", "--version", "1", "--out", place / name / "version")
    for folder in ("pruned", "version"):
        first, second = (place / name / folder / "amperage.json" for name in ("a", "b"))
        assert first.read_bytes() == second.read_bytes()


def test_history_does_not_hold_for_files_that_were_changed_since(place: Path) -> None:
    forge("prune", place / "tiny", place / "a", "--n-m", "2:4")
    config = json.loads((place / "a" / "config.json").read_text())
    (place / "a" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match=r"other files than its amperage\.json"):
        forge("build", place / "a", "--name", "m", "--version", "1", "--out", place / "version")
    assert not (place / "version").exists()
    (place / "a" / "amperage.json").unlink()
    assert chain_of(place / "a") == Provenance(source=chain_of(place / "a").source)


@pytest.mark.parametrize(
    "document", [b"{", b'{"schema":2}', b'{"schema":1,"more":1}', b'{"schema":1,"steps":[1]}', b" " * 70_000]
)
def test_history_that_is_none_is_refused(document: bytes, place: Path) -> None:
    (place / "tiny" / "amperage.json").write_bytes(document)
    with pytest.raises(Exception, match=r"amperage|Provenance") as refused:
        build(place)
    assert type(refused.value).__module__ == "wire.errors"
    assert not (place / "version").exists()


def test_version_that_was_changed_and_sealed_anew_has_no_history(place: Path) -> None:
    version = build(place)
    assert read_provenance(version) is not None
    (version / "amperage.json").write_bytes((version / "amperage.json").read_bytes().replace(b"version.json", b"other"))
    with pytest.raises(ArtifactError, match="has other files"):
        release(place)
