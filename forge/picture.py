"""Pictures: bits per weight of every layer, and the style of all. The only module that loads matplotlib, when it draws.

Names in the figures are untrusted, so they are never read as mathematical text.
"""

import io
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from forge.inspect import Inspection, LayerCost, bits_per
from wire.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#56B4E9", "#CC79A7", "#D55E00")
"""Distinguishable with every common colour blindness (Okabe and Ito, Color Universal Design, 2008)."""

REST_COLOUR = "#999999"
GRID_COLOUR = "#DDDDDD"
REST = "other planes"
LEAST_SHARE = 0.001
"""Of all weights: what holds less is named below the picture, since a norm of 256 weights would dwarf the layers."""

LABELS = 40
"""Most labels on the axis; with more layers every second, third, ... is named."""

DPI = 120
STYLE: Any = {"text.parse_math": False, "font.size": 10, "font.family": "DejaVu Sans", "axes.titlesize": 13}


def draw_layers(found: Inspection) -> bytes:
    """A PNG of the coded bits per weight of every layer, stacked by kind of plane, with the order-0 bound.

    Raises ConfigError when matplotlib is missing, or when there is no tensor to draw.
    """
    layers = [layer for layer in found.layers if layer.weights > LEAST_SHARE * found.weights]
    if not layers:
        raise ConfigError("this artifact has no weights to draw; leave --plot away")

    def draw(figure: "Figure", axes: "Axes") -> None:
        _draw_stacks(axes, layers)
        _draw_bound(axes, layers)
        _describe(axes, found, layers)
        left_out = [layer for layer in found.layers if layer not in layers]
        if left_out:
            figure.supxlabel(_note(left_out), fontsize=8, color="#444444", x=0.01, ha="left")

    return draw_picture((min(max(8.5, 4 + 0.36 * len(layers)), 40), 5.6), draw)


def draw_picture(size: tuple[float, float], draw: Callable[["Figure", "Axes"], None]) -> bytes:
    """A PNG of `size` inches, (width, height), in the style of all pictures; `draw` fills its axes.

    Raises ConfigError when matplotlib is missing.
    """
    try:
        import matplotlib as mpl
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"pictures need {error.name}, which is not installed: pip install 'amperage[forge]'"
        ) from error
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=size, dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)  # which can tell how large a text is before it is saved
        draw(figure, figure.add_subplot())
        sink = io.BytesIO()
        figure.savefig(sink, format="png", dpi=DPI, metadata={"Software": None})
    return sink.getvalue()


def entitle(axes: "Axes", title: str, line: str) -> None:
    """A title on the left, a line below it, and nothing on the right and above but the figures."""
    axes.set_title(title, loc="left", pad=24, weight="bold")
    axes.annotate(line, (0, 1), (0, 10), xycoords="axes fraction", textcoords="offset points")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_stacks(axes: "Axes", layers: list[LayerCost]) -> None:
    totals: dict[str, int] = {}
    for layer in layers:
        for kind, size in layer.planes.items():
            totals[kind] = totals.get(kind, 0) + size
    large = [kind for kind, size in totals.items() if size > LEAST_SHARE * 5 * sum(totals.values())]
    named = sorted(large, key=lambda kind: -totals[kind])[: len(COLOURS)]
    tops = [0.0] * len(layers)
    for kind, colour in (*zip(named, COLOURS, strict=False), (REST, REST_COLOUR)):
        heights = [bits_per(_size(layer, kind, named), layer.weights) for layer in layers]
        if not any(heights):
            continue
        axes.bar(
            range(len(layers)), heights, 0.8, tops, color=colour, label=_plain(kind), edgecolor="white", linewidth=0.4
        )
        tops = [top + height for top, height in zip(tops, heights, strict=True)]


def _size(layer: LayerCost, kind: str, named: list[str]) -> int:
    if kind == REST:
        return sum(size for other, size in layer.planes.items() if other not in named)
    return layer.planes.get(kind, 0)


def _draw_bound(axes: "Axes", layers: list[LayerCost]) -> None:
    places = [(x, layer.bound_per_weight) for x, layer in enumerate(layers)]
    known = [(x, bound) for x, bound in places if bound is not None]
    if known:
        axes.hlines(
            [bound for _, bound in known], [x - 0.48 for x, _ in known], [x + 0.48 for x, _ in known],
            colors="black", linewidths=1.6, label="order-0 entropy of the planes",
        )  # fmt: skip


def _describe(axes: "Axes", found: Inspection, layers: list[LayerCost]) -> None:
    kind = f"delta to {found.base[:12]}" if found.base else "full artifact"
    bits, whole = bits_per(found.tensors.coded_bytes, found.weights), bits_per(found.wire_bytes, found.weights)
    entitle(
        axes, f"{_plain(found.model)} {_plain(found.version)}, {kind}",
        f"{bits:.3f} bits per weight in the tensors, {whole:.3f} with graph, tokenizer, index and manifest",
    )  # fmt: skip
    axes.set_ylabel("coded bits per weight")
    axes.grid(axis="y", color=GRID_COLOUR)
    axes.set_xlim(-0.7, len(layers) - 0.3)
    step = -(-len(layers) // LABELS)
    places = list(range(0, len(layers), step))
    axes.set_xticks(places, [_plain(layers[x].label) for x in places], rotation=45, ha="right", rotation_mode="anchor")
    tops = [max(layer.bits_per_weight, layer.bound_per_weight or 0) for layer in layers]
    axes.set_ylim(0, 1.06 * max(*tops, 1e-3))
    for x in places:
        text = f"{layers[x].bits_per_weight:.2f}"
        axes.annotate(text, (x, tops[x]), (0, 3), textcoords="offset points", ha="center", fontsize=8)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)


def _note(left_out: list[LayerCost]) -> str:
    shown = [f"{_plain(layer.label)} ({layer.weights:,} weights, {layer.bits_per_weight:.1f} bits each)"
             for layer in left_out[:4]]  # fmt: skip
    more = f" and {len(left_out) - 4} more" if len(left_out) > 4 else ""
    return f"Not drawn, being small: {', '.join(shown)}{more}"


def _plain(text: str) -> str:
    """Short, and in characters that the font has."""
    clean = "".join(c if c.isascii() and c.isprintable() else "?" for c in text)
    return clean if len(clean) <= 32 else f"{clean[:20]}...{clean[-9:]}"
