"""`amperage forge compile` and `import`: an ONNX model in, a faster one or a version to serve it out."""

import json
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.table import Table

from cli.building import ModelName, VersionName, VersionOut
from cli.terminal import AsJson, console, print_figures, progress
from forge.build import parameters_of
from forge.compiler.compilation import ROUNDS, TOLERANCE, Choices, Report, compile_model
from forge.compiler.trial import Sampling
from forge.compiler.work import Array, Limits
from forge.graph_golden import Examples
from forge.graph_import import GraphChoices, import_graph
from forge.quantise import Precision
from wire.errors import ConfigError

ARRAYS_LIMIT_BYTES = 1 << 30


def compile_(
    source: Annotated[Path, typer.Argument(help="An .onnx file; its external data beside it.")],
    out: Annotated[Path, typer.Argument(help="New .onnx file; external data, if any, goes to OUT.data.")],
    shape: Annotated[
        list[str] | None, typer.Option(help="Sizes of an input while it is judged, as name=1,16; repeatable.")
    ] = None,
    fix: Annotated[
        list[str] | None,
        typer.Option(help="Sizes that an input has from now on, as name=1,16, so that loops over it unroll."),
    ] = None,
    inputs: Annotated[Path | None, typer.Option(help="NPZ file with inputs by name, instead of random ones.")] = None,
    tolerance: Annotated[float, typer.Option(min=0, help="Largest relative RMS difference of an output.")] = TOLERANCE,
    max_nodes: Annotated[int, typer.Option(min=1, help="Loops are unrolled up to so many nodes.")] = Limits().nodes,
    grow: Annotated[
        int, typer.Option(min=0, help="Bytes that folded constants may add to the file.")
    ] = Limits().grown_bytes,
    threads: Annotated[int, typer.Option(min=0, help="Of the measurement; 0 is every core that is allowed.")] = 0,
    rounds: Annotated[int, typer.Option(min=5, help="Of the measurement.")] = ROUNDS,
    as_json: AsJson = False,
) -> None:
    """Fold constants, unroll loops, merge nodes; compare outputs and speed; write nothing that answers otherwise."""
    fixed = _shapes(fix)
    sampling = Sampling(_shapes(shape) | fixed, _arrays(inputs) if inputs is not None else {})
    choices = Choices(tolerance, Limits(max_nodes, grow), sampling, fixed, threads, rounds)
    with progress() as report:
        found = compile_model(source, out, choices, report)
    if as_json:
        print(json.dumps(found.as_json()))
    else:
        _show(found, out)


def import_(
    source: Annotated[Path, typer.Argument(help="An .onnx file of any model; its external data beside it.")],
    name: ModelName,
    version: VersionName,
    out: VersionOut,
    size: Annotated[
        list[str] | None, typer.Option(help="How large a size that may differ gets, as batch=8; repeatable.")
    ] = None,
    range_: Annotated[
        list[str] | None,
        typer.Option("--range", help="Numbers of an input in golden vectors, as pixels=0,1; repeatable."),
    ] = None,
    inputs: Annotated[Path | None, typer.Option(help="NPZ file with inputs by name, for the golden vectors.")] = None,
    precision: Annotated[
        Precision | None, typer.Option(help="Store matrices of MatMul and Gemm in int8 or int4; else all as they are.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a version of an ONNX model as it is, which nodes serve at /v2/models/MODEL/infer."""
    largest = {named: sizes[0] for named, sizes in _shapes(size).items() if len(sizes) == 1}
    if len(largest) < len(size or ()):
        raise ConfigError("--size is one number by name; write it as batch=8")
    examples = Examples(_ranges(range_), _arrays(inputs) if inputs is not None else {})
    with progress() as report:
        document = import_graph(source, out, (name, version), GraphChoices(largest, examples, precision), report)
    figures = {
        "model": name, "version": version, "decoded": document.decoded_digest(),
        "parameters": parameters_of(document), "raw_bytes": sum(entry.size_bytes for entry in document.files),
    }  # fmt: skip
    print_figures(figures, as_json, f"{name} {version}")


def _ranges(texts: list[str] | None) -> dict[str, tuple[float, float]]:
    ranges = {}
    for text in texts or ():
        name, _, numbers = text.rpartition("=")
        try:
            low, high = map(float, numbers.split(","))
        except ValueError:
            low = high = 0.0
        if not name or not low < high:
            raise ConfigError(f"{text!r} is no range; write it as pixels=0,255")
        ranges[name] = (low, high)
    return ranges


def _shapes(texts: list[str] | None) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for text in texts or ():
        name, _, sizes = text.rpartition("=")
        numbers = [size for size in sizes.split(",") if size]
        if not name or not all(number.isdecimal() and len(number) < 10 for number in numbers):
            raise ConfigError(f"{text!r} is no shape; write it as input_ids=1,16")
        shapes[name] = tuple(map(int, numbers))
    return shapes


def _arrays(path: Path) -> dict[str, Array]:
    try:
        if path.stat().st_size > ARRAYS_LIMIT_BYTES:
            raise ConfigError(f"{path} is over {ARRAYS_LIMIT_BYTES} bytes; give smaller inputs")
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); write it with numpy.savez") from error


def _show(found: Report, out: Path) -> None:
    nodes = Table("operator", "before", "after", title=str(out), title_justify="left")
    for name in sorted(found.nodes_before | found.nodes_after):
        nodes.add_row(name, *(str(counts.get(name, 0)) for counts in (found.nodes_before, found.nodes_after)))
    nodes.add_section()
    nodes.add_row("all", str(sum(found.nodes_before.values())), str(sum(found.nodes_after.values())))
    nodes.add_row("bytes", f"{found.bytes_before:,}", f"{found.bytes_after:,}")
    nodes.add_row("ms per run", f"{1e3 * found.before_s:.4g}", f"{1e3 * found.after_s:.4g}")
    nodes.add_row("spread", f"{found.before_spread:.0%}", f"{found.after_spread:.0%}")
    console().print(nodes)
    for what, count in found.done.items():
        print(f"{what}: {count}")
    for name, why in found.left.items():
        print(f"left alone: {name}: {why}")
    print(f"{found.gain:.2f} times as fast; outputs differ by {found.difference:.2g} relative RMS at most")
