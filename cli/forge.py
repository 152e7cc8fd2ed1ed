"""`amperage forge`: build, judge, pack and sign models."""

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from cli.compilation import compile_, import_
from cli.inspection import artifact_tables, artifacts_table, provenance_table, version_table
from cli.quantising import quantise
from cli.recording import recorded
from cli.shrinking import distil, prune, train_quantised, trim_vocabulary
from cli.terminal import AsJson, console, print_figures, progress
from codec.versions import VERSION_FILE, read_version
from forge.artifact import Artifact, artifacts_in, read_artifact
from forge.bounds import WINDOWS, Demand, parse_bounds
from forge.build import build_version, parameters_of
from forge.cache_scales import Int8Cache
from forge.calibrated import round_checkpoint
from forge.evaluate import evaluate_version, read_windows
from forge.extract import extract_artifact
from forge.inspect import inspect_artifact
from forge.picture import draw_layers
from forge.provenance import provenance_texts, read_provenance
from forge.quantise import Precision
from forge.release import ReleaseSummary, make_release
from forge.rounding import Rounding
from forge.verify import verify_artifact, verify_release
from host.files import write_atomically
from host.keys import load_signer
from wire.errors import ConfigError
from wire.manifest import VersionDocument

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


class CacheType(StrEnum):
    """How keys and values are cached."""

    FLOAT32 = "float32"
    INT8 = "int8"


@app.callback()
def _forge() -> None:
    """Turn a checkpoint into a signed release."""


app.command("prune")(recorded("prune")(prune))
app.command("quantise")(recorded("quantise")(quantise))
app.command("trim-vocabulary")(recorded("trim-vocabulary")(trim_vocabulary))
app.command("distil")(recorded("distil")(distil))
app.command("train-quantised")(recorded("train-quantised")(train_quantised))
app.command("compile")(compile_)
app.command("import")(import_)


@app.command()
@recorded("build")
def build(
    source: Annotated[Path, typer.Argument(help="Folder with config.json, model.safetensors, tokenizer.json.")],
    name: Annotated[str, typer.Option(help="Name of the model, as applications will ask for it.")],
    version: Annotated[str, typer.Option(help="Version for people, for example 1.0.")],
    out: Annotated[Path, typer.Option(help="New version directory.")],
    precision: Annotated[
        Precision | None, typer.Option(help="How matrices are stored; else int4, of encoders int8.")
    ] = None,
    rounding: Annotated[
        Rounding, typer.Option(help="How weights of a decoder find their levels; k-quant and gptq read text for it.")
    ] = Rounding.NEAREST,
    scales_of: Annotated[Path | None, typer.Option(help="Version whose scales are kept for a small delta.")] = None,
    kv_cache: Annotated[
        CacheType, typer.Option(help="How the runtime keeps keys and values; int8 takes a quarter of the memory.")
    ] = CacheType.FLOAT32,
    calibration: Annotated[
        Path | None, typer.Option(help="Token windows for both of these, as in samples/eval; else its own text.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Import a checkpoint of a decoder or a sentence encoder, quantise it, write the version directory."""
    calibrated = rounding is not Rounding.NEAREST or precision is Precision.INT8_STATIC
    if calibration is not None and not calibrated and kv_cache is CacheType.FLOAT32:
        raise ConfigError("nothing here is calibrated; leave --calibration out, or add --rounding or --kv-cache int8")
    if calibrated and scales_of is not None:
        raise ConfigError("weights on a base's scales are rounded to the nearest; leave --rounding or --scales-of out")
    windows = read_windows(calibration) if calibration is not None else None
    with progress() as report:
        rounded = round_checkpoint(source, precision, rounding, windows, report) if calibrated else None
        document = build_version(
            source, out, (name, version), precision=precision, rounded=rounded, scales_of=scales_of,
            cache=Int8Cache(windows) if kv_cache is CacheType.INT8 else None, progress=report,
        )  # fmt: skip
    figures = {
        "model": name, "version": version, "decoded": document.decoded_digest(),
        "parameters": parameters_of(document), "raw_bytes": sum(entry.size_bytes for entry in document.files),
    }  # fmt: skip
    if (provenance := read_provenance(out)) is not None:
        figures["least_noticed_damage"] = str(provenance.least_noticed)
    print_figures(figures, as_json, f"{name} {version}")


@app.command()
def release(
    version_dir: Annotated[Path, typer.Argument(help="Version directory made by `forge build`.")],
    key: Annotated[Path, typer.Option(help="Release key (PEM).")],
    sequence: Annotated[int, typer.Option(min=1, help="Counts up with every release of the model.")],
    out: Annotated[Path, typer.Option(help="New release directory.")],
    base: Annotated[Path | None, typer.Option(help="Version directory to make a delta from.")] = None,
    min_quality: Annotated[
        str | None, typer.Option(help="Refuse a worse one, for example kl=0.05,top1=0.85,perplexity-ratio=1.05.")
    ] = None,
    windows: Annotated[
        Path | None, typer.Option(help="Token windows to measure on, as in samples/eval, for the manifest.")
    ] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="What it was built from, to measure against.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="How many windows.")] = WINDOWS,
    as_json: AsJson = False,
) -> None:
    """Pack and sign a version; with --base also as a delta."""
    demand = Demand(windows, checkpoint, parse_bounds(min_quality) if min_quality is not None else None, limit)
    with progress() as report:
        summary = make_release(
            version_dir, out, load_signer(key), sequence=sequence, base_dir=base, demand=demand, progress=report
        )
    if as_json:
        print(json.dumps(summary.as_json()))
        return
    _show_release(summary)


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


def _show_release(summary: ReleaseSummary) -> None:
    table = Table("part", "plane", "raw bytes", "wire bytes", "entropy bytes", "codecs")
    table.title = f"{summary.model} {summary.version}: {summary.bits_per_weight:.3f} bits per weight"
    for row in summary.planes:
        table.add_row(
            row["kind"], row["plane"], f"{row['raw_bytes']:,}", f"{row['coded_bytes']:,}",
            f"{row['entropy_bytes']:,.0f}", ", ".join(row["codecs"]),
        )  # fmt: skip
    table.add_section()
    table.add_row("full artifact", "", f"{summary.raw_bytes:,}", f"{summary.wire_bytes:,}", "", "")
    if summary.delta_wire_bytes is not None:
        table.add_row("delta", "", "", f"{summary.delta_wire_bytes:,}", "", "")
    console().print(table)
    print(f"release {summary.release}")
