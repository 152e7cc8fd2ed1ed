"""The console that commands print on: a terminal's own width, or a fixed one where nothing sets it."""

import sys

from rich.console import Console

PLAIN_COLUMNS = 132
"""Width in pipes and logs, where rich would assume 80 and cut every table."""


def console() -> Console:
    """A console on standard output."""
    return Console(width=None if sys.stdout.isatty() else PLAIN_COLUMNS)
