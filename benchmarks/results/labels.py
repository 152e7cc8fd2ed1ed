"""Labels beside the points of a picture, so that none covers another, a point, a line, or the edge.

Each takes the nearest free place round its point, the most crowded points first; a line leads to one that is far away.
Everything but `draw_labels` is in pixels of the picture.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from wire.errors import ConfigError

Point = tuple[float, float]

GAP = 4.0
"""Between a label and whatever else there is."""
REACHES = (3, 8, 14, 20, 28, 38, 50, 64, 80, 100, 125, 155)
DIRECTIONS = 24
LED = 13
"""From this reach on a line leads to the label."""
FONT_SIZE = 8.5


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle."""

    left: float
    bottom: float
    right: float
    top: float

    def overlaps(self, other: "Box") -> bool:
        """Whether they come closer than the gap."""
        return (
            self.left < other.right + GAP and other.left < self.right + GAP
            and self.bottom < other.top + GAP and other.bottom < self.top + GAP
        )  # fmt: skip

    def holds(self, place: Point) -> bool:
        """Whether a place is inside or closer than the gap."""
        x, y = place
        return self.left - GAP < x < self.right + GAP and self.bottom - GAP < y < self.top + GAP

    def nearest(self, place: Point) -> Point:
        """Where the box is nearest to a place."""
        return min(max(place[0], self.left), self.right), min(max(place[1], self.bottom), self.top)


@dataclass(frozen=True, slots=True)
class Label:
    """Where a label ends up, and whether a line leads to it."""

    box: Box
    led: bool

    def lead(self, point: Point) -> list[Point]:
        """Places of the line from its point, if there is one."""
        return between(point, self.box.nearest(point)) if self.led else []


@dataclass(slots=True)
class Sheet:
    """What labels must not cover: points are discs of `radius`, `drawn` are places of the picture's lines."""

    inside: Box
    points: Sequence[Point]
    radius: float
    drawn: Sequence[Point] = ()
    labels: list[Box] = field(default_factory=list)
    leads: list[Point] = field(default_factory=list)
    """Places of the lines that lead to labels."""

    def place(self, number: int, size: Point) -> Label:
        """Take the nearest place for the label, (width, height), of point `number`; in a crowd where no such place is
        left, one whose line crosses something. Raises ConfigError when all is full."""
        point = self.points[number]
        discs = [_disc(other, self.radius) for other in self.points]
        others = [disc for disc in discs if not disc.holds(point)]
        chosen = None
        for label in _candidates(point, size, self.radius):
            if self._is_free(label.box, discs):
                chosen = chosen or label
                if self._is_clear(label, point, others):
                    chosen = label
                    break
        if chosen is None:
            raise ConfigError(f"a label beside {point} finds no place; make the picture larger")
        self.labels.append(chosen.box)
        self.leads += chosen.lead(point)
        return chosen

    def _is_free(self, box: Box, discs: Sequence[Box]) -> bool:
        return (
            self.inside.left <= box.left and box.right <= self.inside.right
            and self.inside.bottom <= box.bottom and box.top <= self.inside.top
            and not any(box.overlaps(other) for other in (*self.labels, *discs))
            and not any(box.holds(place) for place in self.drawn)
        )  # fmt: skip

    def _is_clear(self, label: Label, point: Point, discs: Sequence[Box]) -> bool:
        crossed = any(other.holds(place) for other in (*self.labels, *discs) for place in label.lead(point))
        return not crossed and not any(label.box.holds(place) for place in self.leads)

    def place_all(self, sizes: Sequence[Point]) -> list[Label]:
        """A place for every point's label, in the points' order."""
        crowd = [sum(1 / (1 + math.dist(point, other)) for other in self.points) for point in self.points]
        found: dict[int, Label] = {}
        for number in sorted(range(len(self.points)), key=lambda i: -crowd[i]):
            found[number] = self.place(number, sizes[number])
        return [found[number] for number in range(len(self.points))]


def between(start: Point, end: Point) -> list[Point]:
    """Places on the line from `start` to `end`, a few pixels apart, without its two ends."""
    count = int(math.dist(start, end) / 3) + 2
    xs, ys = (np.linspace(one, other, count)[1:-1] for one, other in zip(start, end, strict=True))
    return [(float(x), float(y)) for x, y in zip(xs, ys, strict=True)]


def draw_labels(
    axes: Any, points: Sequence[Point], texts: Sequence[str], radius: float, paths: Sequence[list[Point]]
) -> None:
    """Write `texts` beside `points`; they and the `paths` that no label may cover are in the axes' own numbers.

    Raises ConfigError when one finds no place.
    """
    figure = axes.get_figure()
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    drawn = [axes.text(0, 0, text, fontsize=FONT_SIZE, transform=None, ha="left", va="bottom") for text in texts]
    extents = [text.get_window_extent(renderer) for text in drawn]
    window = axes.get_window_extent(renderer)
    pixels, *lines = ([(float(x), float(y)) for x, y in axes.transData.transform(each)] for each in (points, *paths))
    covered = [place for line in lines for start, end in pairwise(line) for place in between(start, end)]
    sheet = Sheet(Box(window.x0, window.y0, window.x1, window.y1), pixels, radius, covered)
    labels = sheet.place_all([(extent.width, extent.height) for extent in extents])
    for text, pixel, label in zip(drawn, pixels, labels, strict=True):
        text.set_position((label.box.left, label.box.bottom))
        if label.led:
            line = {"arrowstyle": "-", "color": "#777777", "linewidth": 0.6, "shrinkA": radius / 2}
            axes.annotate("", label.box.nearest(pixel), pixel, "figure pixels", "figure pixels", arrowprops=line)


def _disc(point: Point, radius: float) -> Box:
    return Box(point[0] - radius, point[1] - radius, point[0] + radius, point[1] + radius)


def _candidates(point: Point, size: Point, radius: float) -> Iterator[Label]:
    """Places from near to far, to the right first."""
    (x, y), (width, height) = point, size
    for reach in REACHES:
        for turn in sorted(range(DIRECTIONS), key=lambda k: min(k, DIRECTIONS - k)):
            angle = 2 * math.pi * turn / DIRECTIONS
            across, up = math.cos(angle), math.sin(angle)
            left = x + across * (radius + GAP + reach + width / 2) - width / 2
            bottom = y + up * (radius + GAP + reach + height / 2) - height / 2
            yield Label(Box(left, bottom, left + width, bottom + height), reach > LED)
