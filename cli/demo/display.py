"""The demo's live display: steps with their checks, transfer bars, lifecycle lines; plain lines where no terminal is.

The display only shows; it decides nothing. All methods may be called from any thread.
"""

import threading
from collections import deque
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.text import Text

from cli.demo.facts import Step

LIFECYCLE_LINES = 8


class Display:
    """Shows a run on `console`; a context manager."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._lock = threading.Lock()
        self._steps: list[Step] = []
        self._lifecycle: deque[Text] = deque(maxlen=LIFECYCLE_LINES)
        self._transfers = Progress(
            TextColumn("  {task.description:<26}"), BarColumn(bar_width=36), MofNCompleteColumn(), TextColumn("frames"),
            auto_refresh=False,
        )  # fmt: skip
        self._bars: dict[tuple[str, str], TaskID] = {}
        self._totals: dict[TaskID, int] = {}
        self._live = Live(get_renderable=self._render, console=console, refresh_per_second=6, transient=True)

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.console.is_terminal:
            self._live.stop()

    def begin(self, step: Step) -> None:
        """Show that `step` has begun."""
        with self._lock:
            self._steps.append(step)
        self.say(f"[bold]{step.number}. {step.title}[/bold]")

    def end(self, step: Step) -> None:
        """Show how `step` ended."""
        for check in step.checks:
            mark = "[green]✓[/green]" if check.held else "[red]✗[/red]"
            seen = f" [dim]({check.seen})[/dim]" if check.seen else ""
            self.say(f"   {mark} {check.claim}{seen}")
        if step.error:
            self.say(f"   [red]✗ {step.error}[/red]")
        with self._lock:
            self._steps.remove(step)
            self._lifecycle.clear()
            for key in list(self._bars):
                self._transfers.remove_task(self._bars.pop(key))

    def say(self, markup: str) -> None:
        """Print one line above the live part."""
        self.console.print(markup, highlight=False, soft_wrap=not self.console.is_terminal and not self.console.record)

    def show(self, renderable: RenderableType) -> None:
        """Print a table or panel above the live part."""
        self.console.print(renderable)

    def lifecycle(self, node: str, version: str, state: str, detail: str) -> None:
        """A node's release moved to `state`."""
        colour = {"committed": "green", "failed": "red", "rolled_back": "red"}.get(state, "cyan")
        line = Text.assemble(
            ("  ", ""), (f"{node:<8}", "bold"), (f"{version:<7}", ""), (f"{state:<12}", colour), detail[:80]
        )
        with self._lock:
            self._lifecycle.append(line)
            bar = self._bars.get((node, version))
            if state == "decoding" and bar is not None:  # all frames are there, whatever the last report said
                self._transfers.update(bar, completed=self._totals[bar])
        if not self.console.is_terminal:
            self.console.print(line, soft_wrap=True)

    def transfer(self, node: str, version: str, done: int, total: int) -> None:
        """`done` of `total` frames are verified on `node`."""
        with self._lock:
            key = (node, version)
            if key not in self._bars:
                self._bars[key] = self._transfers.add_task(f"{node} fetches {version}", total=total)
            self._totals[self._bars[key]] = total
            self._transfers.update(self._bars[key], completed=done, total=total)

    def _render(self) -> RenderableType:
        with self._lock:
            parts: list[RenderableType] = [
                Text.from_markup(f"[bold]{s.number}. {s.title}[/bold] …") for s in self._steps
            ]
            if self._bars:
                parts.append(self._transfers)
            if self._lifecycle:
                parts.append(Panel(Group(*self._lifecycle), title="lifecycle", title_align="left", border_style="dim"))
            return Group(*parts)
