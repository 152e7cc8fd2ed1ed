"""The terminal that commands print on: tables at its own width, or a fixed one where nothing sets it, and progress."""

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

PLAIN_COLUMNS = 132
"""Width in pipes and logs, where rich would assume 80 and cut every table."""

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
"""The option of every command that prints figures or rows."""


def console() -> Console:
    """A console on standard output."""
    return Console(width=None if sys.stdout.isatty() else PLAIN_COLUMNS)


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on a terminal's standard error, gone at the end; nothing elsewhere. It follows calls with (what, done, of),
    and only moves where `of` is 0."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    watched = sys.stderr.isatty()
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not watched) as bars:
        task = bars.add_task("start", total=None)

        def report(what: str, done: int, total: int) -> None:
            bars.update(task, description=what, completed=done, total=total or None)

        yield report


def print_figures(figures: Mapping[str, Any], as_json: bool, title: str) -> None:
    """Figures by name, as one JSON document or as a table."""
    if as_json:
        print(json.dumps(figures))
        return
    table = Table("figure", "value", title=title)
    for key, value in figures.items():
        table.add_row(key, f"{value:,}" if isinstance(value, int) else str(value))
    console().print(table)
