"""`amperage forge`: build, judge, pack and sign models."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from cli.terminal import console
from codec.versions import read_version
from forge.build import Progress as Report
from forge.build import build_version, parameters_of
from forge.evaluate import evaluate_version
from forge.release import ReleaseSummary, make_release
from forge.verify import verify_release
from host.keys import load_signer

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
PROGRESS = Console(stderr=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")]


@app.callback()
def _forge() -> None:
    """Turn a checkpoint into a signed release."""


@app.command()
def build(
    source: Annotated[Path, typer.Argument(help="Folder with config.json, model.safetensors, tokenizer.json.")],
    name: Annotated[str, typer.Option(help="Name of the model, as applications will ask for it.")],
    version: Annotated[str, typer.Option(help="Version for people, for example 1.0.")],
    out: Annotated[Path, typer.Option(help="New version directory.")],
    scales_of: Annotated[Path | None, typer.Option(help="Version whose scales are kept for a small delta.")] = None,
    as_json: AsJson = False,
) -> None:
    """Import a checkpoint, quantise it to int4, write the version directory."""
    with _progress() as report:
        document = build_version(source, out, (name, version), scales_of=scales_of, progress=report)
    figures = {
        "model": name, "version": version, "decoded": document.decoded_digest(),
        "parameters": parameters_of(document), "raw_bytes": sum(entry.size_bytes for entry in document.files),
    }  # fmt: skip
    _print(figures, as_json, f"{name} {version}")


@app.command()
def release(
    version_dir: Annotated[Path, typer.Argument(help="Version directory made by `forge build`.")],
    key: Annotated[Path, typer.Option(help="Release key (PEM).")],
    sequence: Annotated[int, typer.Option(min=1, help="Counts up with every release of the model.")],
    out: Annotated[Path, typer.Option(help="New release directory.")],
    base: Annotated[Path | None, typer.Option(help="Version directory to make a delta from.")] = None,
    as_json: AsJson = False,
) -> None:
    """Pack and sign a version; with --base also as a delta."""
    summary = make_release(version_dir, out, load_signer(key), sequence=sequence, base_dir=base)
    if as_json:
        print(json.dumps(summary.as_json()))
        return
    _show_release(summary)


@app.command()
def evaluate(
    version_dir: Annotated[Path, typer.Argument(help="Version directory.")],
    windows: Annotated[Path, typer.Option(help="JSON file with token windows, as in samples/eval.")],
    limit: Annotated[int, typer.Option(min=1, help="How many windows.")] = 16,
    as_json: AsJson = False,
) -> None:
    """Perplexity, KL divergence and top-1 agreement against the float32 twin."""
    with _progress() as report:
        figures = evaluate_version(version_dir, windows, limit, report)
    _print(figures, as_json, "quality against the float32 twin")


@app.command()
def verify(
    release_dir: Annotated[Path, typer.Argument(help="Release directory.")],
    trust: Annotated[Path, typer.Option(help="Trust policy that nodes use.")],
    base: Annotated[Path | None, typer.Option(help="Version directory that deltas apply to.")] = None,
    as_json: AsJson = False,
) -> None:
    """Check a release as a node would: signature, every frame, decoding, every file."""
    _print(verify_release(release_dir, trust, base), as_json, "release verified")


@app.command()
def inspect(version_dir: Annotated[Path, typer.Argument(help="Version directory.")], as_json: AsJson = False) -> None:
    """List the files and tensors of a version."""
    document = read_version(version_dir)
    if as_json:
        print(document.model_dump_json(by_alias=True))
        return
    table = Table("tensor", "type", "shape", "bytes", "layout", title=f"{document.model} {document.version}")
    columns = document.tensors
    for row, name in enumerate(columns.name):
        shape = " x ".join(str(size) for size in columns.shape[row])
        table.add_row(name, columns.dtype[row], shape, f"{columns.size_bytes(row):,}", columns.layout[row])
    console().print(table)


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


def _print(figures: dict[str, Any], as_json: bool, title: str) -> None:
    if as_json:
        print(json.dumps(figures))
        return
    table = Table("figure", "value", title=title)
    for key, value in figures.items():
        table.add_row(key, f"{value:,}" if isinstance(value, int) else str(value))
    console().print(table)


@contextmanager
def _progress() -> Iterator[Report]:
    """A progress bar on standard error that follows (what, done, of)."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=PROGRESS, transient=True) as bars:
        task = bars.add_task("start", total=None)

        def report(what: str, done: int, total: int) -> None:
            bars.update(task, description=what, completed=done, total=total)

        yield report
