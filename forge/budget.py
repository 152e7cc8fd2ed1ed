"""Which matrix gets how many bits: the choices of least loss within a budget. Pure.

Losses of matrices add up (they are small, and independent enough), so the best choices lie on the lower convex hull of
each matrix's options, and upgrades along the hulls are taken by loss saved per bit until the budget is spent (Shoham
and Gersho, 1988).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from forge.rounding import Grid

MEMORY_SHARE = 0.05
"""What a bit in memory costs in bits on the wire: eight bits hold what an entropy coder makes three of, but every token
reads all eight, so that they are for matrices that need fine levels."""


@dataclass(frozen=True, slots=True)
class Option:
    """One way to store a matrix, and what is expected of it."""

    grid: Grid
    wire_bits: float
    stored_bits: float
    loss: float
    """KL divergence in nats that it adds to the model's."""

    @property
    def cost_bits(self) -> float:
        """What it is worth avoiding."""
        return self.wire_bits + MEMORY_SHARE * self.stored_bits


@dataclass(frozen=True, slots=True)
class Budget:
    """At most so many bits, or at most so much loss; one of them."""

    wire_bits: float | None = None
    loss: float | None = None


def spend(budget: Budget, options: Mapping[str, Sequence[Option]]) -> dict[str, Option]:
    """One option per matrix. The cheapest of each where the budget does not even buy these."""
    hulls = {name: lower_hull(found) for name, found in options.items()}
    chosen = {name: hull[0] for name, hull in hulls.items()}
    bits, loss = sum(o.wire_bits for o in chosen.values()), sum(o.loss for o in chosen.values())
    for _, name, upgrade in sorted(_upgrades(hulls), key=lambda row: row[:2]):
        current = chosen[name]
        more, less = upgrade.wire_bits - current.wire_bits, current.loss - upgrade.loss
        if budget.wire_bits is not None and bits + more > budget.wire_bits:
            break
        if budget.loss is not None and loss <= budget.loss:
            break
        chosen[name], bits, loss = upgrade, bits + more, loss - less
    return chosen


def lower_hull(options: Sequence[Option]) -> list[Option]:
    """The options that some price per bit makes the best, from the cheapest to the one of least loss."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda o: (o.cost_bits, o.loss)):
        if hull and option.loss >= hull[-1].loss:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], option):
            hull.pop()
        if len(hull) == 1 and option.cost_bits == hull[0].cost_bits:
            continue
        hull.append(option)
    return hull


def _upgrades(hulls: Mapping[str, Sequence[Option]]) -> list[tuple[float, str, Option]]:
    """(slope, matrix, option) of every step along a hull; slopes are negative and rise along it."""
    return [(_slope(before, after), name, after) for name, hull in hulls.items() for before, after in pairwise(hull)]


def _slope(before: Option, after: Option) -> float:
    return (after.loss - before.loss) / (after.cost_bits - before.cost_bits)
