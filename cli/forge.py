"""`amperage forge`: build, judge, pack and sign models."""

import json
from pathlib import Path
from typing import Annotated

import typer

from cli.building import build, release
from cli.compilation import compile_, import_
from cli.inspection import artifact_tables, artifacts_table, provenance_table, version_table
from cli.quantising import quantise
from cli.recipe import recipe
from cli.shrinking import distil, prune, train_quantised, trim_vocabulary
from cli.terminal import AsJson, console, print_figures, progress
from codec.versions import VERSION_FILE, read_version
from forge.artifact import Artifact, artifacts_in, read_artifact
from forge.evaluate import evaluate_version
from forge.extract import extract_artifact
from forge.inspect import inspect_artifact
from forge.picture import draw_layers
from forge.provenance import provenance_texts
from forge.verify import verify_artifact, verify_release
from host.files import write_atomically
from wire.errors import ConfigError
from wire.manifest import VersionDocument

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def _forge() -> None:
    """Turn a checkpoint into a signed release."""


app.command("prune")(prune)
app.command("quantise")(quantise)
app.command("trim-vocabulary")(trim_vocabulary)
app.command("distil")(distil)
app.command("train-quantised")(train_quantised)
app.command("build")(build)
app.command("release")(release)
app.command("recipe")(recipe)
app.command("compile")(compile_)
app.command("import")(import_)


@app.command()
def evaluate(
    version_dir: Annotated[Path, typer.Argument(help="Version directory.")],
    windows: Annotated[Path, typer.Option(help="JSON file with token windows, as in samples/eval.")],
    limit: Annotated[int, typer.Option(min=1, help="How many windows.")] = 16,
    checkpoint: Annotated[
        Path | None, typer.Option(help="What it was built from, to tell what its precision costs.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Perplexity, KL divergence and top-1 agreement against the float32 twin."""
    with progress() as report:
        figures = evaluate_version(version_dir, windows, limit, report, checkpoint=checkpoint)
    print_figures(figures, as_json, "quality against the float32 twin")


@app.command()
def verify(
    target: Annotated[Path, typer.Argument(help="Release directory, or one artifact: its *.manifest.json.")],
    trust: Annotated[Path | None, typer.Option(help="Trust policy that nodes use; a release needs it.")] = None,
    base: Annotated[Path | None, typer.Option(help="Version directory that deltas apply to.")] = None,
    as_json: AsJson = False,
) -> None:
    """Check as a node would: signature, every frame, every section, every decoded file."""
    with progress() as report:
        if not target.is_dir():
            figures, title = verify_artifact(target, trust, base, report), "artifact verified"
        elif trust is None:
            raise ConfigError("a release is checked against the keys that nodes trust; give --trust trust.json")
        else:
            figures, title = verify_release(target, trust, base, report), "release verified"
    print_figures(figures, as_json, title)


@app.command()
def inspect(
    target: Annotated[Path, typer.Argument(help="Version or release directory, or one artifact: its *.manifest.json.")],
    plot: Annotated[Path | None, typer.Option(help="PNG to draw: bits per weight of every layer.")] = None,
    entropy: Annotated[bool, typer.Option(help="Decode, to tell how far every plane is from its entropy.")] = True,
    as_json: AsJson = False,
) -> None:
    """Show what a version, a release or an artifact is made of, and what each part costs."""
    found = _find_one(target)
    if isinstance(found, Artifact):
        _inspect_artifact(found, plot, entropy, as_json)
    elif plot is not None:
        raise ConfigError("a picture is drawn of one artifact; name its *.manifest.json")
    elif isinstance(found, VersionDocument):
        _show_version(found, target, as_json)
    elif as_json:
        with progress() as report:
            reports = [inspect_artifact(artifact, entropy=entropy, progress=report).as_json() for artifact in found]
        print(json.dumps(reports))
    else:
        console().print(artifacts_table(found))
        print(f"look into one: amperage forge inspect {target}/NAME.manifest.json")


@app.command()
def extract(
    artifact: Annotated[Path, typer.Argument(help="The artifact: its *.manifest.json, the pack beside it.")],
    into: Annotated[Path, typer.Option(help="New directory.")],
    base: Annotated[Path | None, typer.Option(help="Version directory that a delta applies to.")] = None,
    file: Annotated[
        list[str] | None, typer.Option(help="Only this file, for example tokenizer.json; repeatable.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Decode an artifact to a version directory as a node does, or only some of its files. Checks no signature."""
    with progress() as report:
        names = extract_artifact(read_artifact(artifact), into, base=base, files=file or (), progress=report)
    if as_json:
        print(json.dumps({"directory": str(into), "files": names}))
        return
    for name in names:
        print(into / name)


def _find_one(target: Path) -> VersionDocument | Artifact | tuple[Artifact, ...]:
    """What `target` is; a release directory with one artifact is that artifact."""
    if not target.is_dir():
        return read_artifact(target)
    if (target / VERSION_FILE).exists():
        return read_version(target)
    artifacts = artifacts_in(target)
    return artifacts[0] if len(artifacts) == 1 else artifacts


def _show_version(version: VersionDocument, directory: Path, as_json: bool) -> None:
    if as_json:
        print(version.model_dump_json(by_alias=True))
        return
    console().print(version_table(version))
    if texts := provenance_texts(directory):
        console().print(provenance_table(texts))


def _inspect_artifact(artifact: Artifact, plot: Path | None, entropy: bool, as_json: bool) -> None:
    with progress() as report:
        figures = inspect_artifact(artifact, entropy=entropy, progress=report)
        if plot is not None:
            report("draw", 0, 0)
            write_atomically(plot, draw_layers(figures), mode=0o644)
    if as_json:
        print(json.dumps(figures.as_json()))
    else:
        console().print(artifact_tables(figures))
