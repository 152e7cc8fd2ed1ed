"""The pictures of docs/results.md: a cost against perplexity, one point per recipe, the Pareto front marked.

Colours and style are those of forge/picture.py. Each series has a shape of its own too, so that no colour is needed.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from benchmarks.results.figures import DecoderFigures, Results, front
from benchmarks.results.labels import draw_labels
from benchmarks.results.recipes import LINES, Series
from forge.picture import COLOURS, GRID_COLOUR, REST_COLOUR, draw_picture, entitle

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = ("o", "s", "^", "D", "P", "X", "v", "*")
PALETTE = (*COLOURS, REST_COLOUR, "#000000")
SIZE, RADIUS = 48, 8.5
"""Of a point: area in points squared, and about how many pixels it reaches."""
STEPS = (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)
"""Ticks of a decade."""
ROOM = 0.08
"""Of the axis beyond the outermost points, for their labels."""
INCHES = (12.5, 7.2)
Place = tuple[float, float]
Cost = Callable[[DecoderFigures], float]


def draw_wire(found: Results) -> bytes:
    """Bytes on the wire against perplexity."""
    return _draw(found, "on the wire", lambda row: row.wire_bytes / 1e6)


def draw_ram(found: Results) -> bytes:
    """Memory against perplexity."""
    return _draw(found, "of memory with a full context", lambda row: row.ram_bytes / 1e6)


PICTURES: dict[str, Callable[[Results], bytes]] = {"results-wire.png": draw_wire, "results-ram.png": draw_ram}
"""By file name."""


def _draw(found: Results, what: str, cost: Cost) -> bytes:
    rows = found.decoders
    points = [(cost(row), row.perplexity) for row in rows]
    on_front = sorted(point for point, marked in zip(points, front(points), strict=True) if marked)
    by_series: dict[Series, list[Place]] = {series: [] for series in Series}
    for row, point in zip(rows, points, strict=True):
        by_series[row.series].append(point)

    def draw(_: "Figure", axes: "Axes") -> None:
        axes.set_xscale("log")
        axes.set_yscale("log")
        entitle(axes, f"MB {what} and perplexity", "lower left is better; ringed and joined: nothing beats it in both")
        axes.set_xlabel(f"MB {what}, logarithmic")
        axes.set_ylabel("perplexity, logarithmic")
        _draw_front(axes, on_front)
        for series, places in by_series.items():
            _draw_series(axes, series, sorted(places))
        axes.axhline(found.original_perplexity, color="#777777", linewidth=0.8, linestyle=":", label="the original")
        _tick(axes, points)
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
        lines = [sorted(by_series[series]) for series in LINES if by_series[series]]
        paths = [on_front, *lines, [(x, found.original_perplexity) for x in axes.get_xlim()]]
        draw_labels(axes, points, [row.name for row in rows], RADIUS, paths)

    return draw_picture(INCHES, draw)


def _draw_front(axes: "Axes", places: Sequence[Place]) -> None:
    x, y = [place[0] for place in places], [place[1] for place in places]
    axes.plot(x, y, color="black", linewidth=1.0, linestyle="--", zorder=1, label="Pareto front")
    axes.scatter(x, y, SIZE * 3.2, facecolors="none", edgecolors="black", linewidths=1.1, zorder=2)


def _draw_series(axes: "Axes", series: Series, places: Sequence[Place]) -> None:
    if not places:
        return
    number = list(Series).index(series)
    x, y = zip(*places, strict=True)
    if series in LINES:
        axes.plot(x, y, color=PALETTE[number], linewidth=1.4, zorder=2)
    axes.scatter(
        x, y, SIZE, color=PALETTE[number], marker=MARKERS[number], edgecolors="white", linewidths=0.5, zorder=3,
        label=str(series),
    )  # fmt: skip


def _tick(axes: "Axes", points: Sequence[Place]) -> None:
    """Plain numbers on both axes, with room for labels round the outermost points."""
    for name, number in (("x", 0), ("y", 1)):
        values = [point[number] for point in points]
        room = (max(values) / min(values)) ** ROOM
        low, high = min(values) / room, max(values) * room
        ticks = [step * scale for scale in (1, 10, 100, 1000) for step in STEPS if low <= step * scale <= high]
        axes.set(**{f"{name}lim": (low, high), f"{name}ticks": ticks, f"{name}ticklabels": [f"{t:g}" for t in ticks]})
    axes.minorticks_off()
    axes.grid(color=GRID_COLOUR)
