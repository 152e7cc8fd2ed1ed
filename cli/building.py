"""`amperage forge build` and `release`: a checkpoint to a version directory, and that to a signed release."""

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from cli.recording import recorded
from cli.terminal import AsJson, console, print_figures, progress
from forge.bounds import WINDOWS, Demand, parse_bounds
from forge.build import DECODER_PRECISION, build_version, parameters_of
from forge.cache_scales import Int8Cache
from forge.calibrated import round_checkpoint
from forge.provenance import read_provenance
from forge.quantise import BLOCK, Precision
from forge.release import ReleaseSummary, make_release
from forge.rounding import Grid, Rounding
from forge.windows import read_windows
from host.keys import load_signer
from wire.errors import ConfigError

ModelName = Annotated[str, typer.Option(help="Name of the model, as applications will ask for it.")]
VersionName = Annotated[str, typer.Option(help="Version for people, for example 1.0.")]
VersionOut = Annotated[Path, typer.Option(help="New version directory.")]


class CacheType(StrEnum):
    """How keys and values are cached."""

    FLOAT32 = "float32"
    INT8 = "int8"


@recorded("build")
def build(
    source: Annotated[Path, typer.Argument(help="Folder with config.json, model.safetensors, tokenizer.json.")],
    name: ModelName,
    version: VersionName,
    out: VersionOut,
    precision: Annotated[
        Precision | None, typer.Option(help="How matrices are stored; else int4, of encoders int8.")
    ] = None,
    rounding: Annotated[
        Rounding, typer.Option(help="How weights of a decoder find their levels; k-quant and gptq read text for it.")
    ] = Rounding.NEAREST,
    block: Annotated[
        int | None,
        typer.Option(help="Most weights that share a scale, 32 to 256; the more the faster, and the coarser. Else 32."),
    ] = None,
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
        grid = Grid(precision or DECODER_PRECISION, longest=block or BLOCK)
        rounded = round_checkpoint(source, grid, rounding, windows, report) if calibrated else None
        document = build_version(
            source, out, (name, version), precision=precision, rounded=rounded, longest=block, scales_of=scales_of,
            cache=Int8Cache(windows) if kv_cache is CacheType.INT8 else None, progress=report,
        )  # fmt: skip
    figures = {
        "model": name, "version": version, "decoded": document.decoded_digest(),
        "parameters": parameters_of(document), "raw_bytes": sum(entry.size_bytes for entry in document.files),
    }  # fmt: skip
    if (provenance := read_provenance(out)) is not None:
        figures["least_noticed_damage"] = str(provenance.least_noticed)
    print_figures(figures, as_json, f"{name} {version}")


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
