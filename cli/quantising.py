"""`amperage forge quantise`: a version within a budget of bytes or of divergence."""

import json
import re
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from cli.building import ModelName, VersionName, VersionOut
from cli.recording import recorded
from cli.shrinking import Source
from cli.terminal import AsJson, console, print_figures, progress
from forge.allocation import Allocation, Goal, quantise_within
from forge.windows import read_windows
from wire.errors import ConfigError

_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?(B|kB|MB|GB|KiB|MiB|GiB)?", re.IGNORECASE)
_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@recorded("quantise")
def quantise(
    source: Source,
    name: ModelName,
    version: VersionName,
    out: VersionOut,
    target_wire: Annotated[
        str | None, typer.Option(help="Most that a full artifact may take on the wire, for example 2MB.")
    ] = None,
    target_bpw: Annotated[float | None, typer.Option(help="Most bits per weight on the wire.")] = None,
    max_kl: Annotated[
        float | None,
        typer.Option(help="Most divergence from the checkpoint, in nats per token; as small as that allows."),
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Token windows as in samples/eval; else the model writes its own.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Give every matrix of a decoder the bits that it is worth, within a budget, and write the version directory."""
    wire_bytes = parse_size(target_wire) if target_wire is not None else None
    windows = read_windows(calibration) if calibration is not None else None
    with progress() as report:
        found = quantise_within(Goal(wire_bytes, target_bpw, max_kl), source, out, (name, version), windows, report)
    if as_json:
        print(json.dumps({**found.figures(), "matrices": _matrices(found)}))
        return
    _show(found)
    print_figures(found.figures(), as_json, f"{name} {version}")


def parse_size(text: str) -> int:
    """Bytes of a size like 2MB, 1.5 MiB or 900000. Raises ConfigError."""
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise ConfigError(f"{text!r} is no size; write it as 2MB, 1.5MiB or 2000000")
    return int(float(found[1]) * _UNITS[(found[2] or "b").lower()])


def _matrices(found: Allocation) -> list[dict[str, object]]:
    sizes = dict(zip(found.version.tensors.name, found.version.tensors.shape, strict=True))
    rows: list[dict[str, object]] = []
    for name, option in found.options.items():
        rows_, columns = sizes[f"{name}.packed"]
        rows.append(
            {
                "matrix": name, "precision": option.grid.precision.value, "step": option.grid.step,
                "bits_on_the_wire": round(option.wire_bits / (rows_ * columns), 3), "kl_expected": option.loss,
            }
        )  # fmt: skip
    return rows


def _show(found: Allocation) -> None:
    table = Table("matrix", "levels of", "step", "bits per weight on the wire", "expected KL, nats")
    for row in _matrices(found):
        step = row["step"]
        table.add_row(
            str(row["matrix"]), str(row["precision"]), f"{step:.4f}" if isinstance(step, float) else "by block",
            f"{row['bits_on_the_wire']:.2f}", f"{row['kl_expected']:.5f}",
        )  # fmt: skip
    console().print(table)
