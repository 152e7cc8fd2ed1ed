"""The terminal that commands print on: tables at its own width, or a fixed one where nothing sets it, and progress."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

PLAIN_COLUMNS = 132
"""Width in pipes and logs, where rich would assume 80 and cut every table."""


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
