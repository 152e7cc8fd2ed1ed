"""Spending a budget over matrices: never too much, and never in a way that a better choice beats."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from forge.budget import Budget, Option, lower_hull, spend
from forge.quantise import Precision
from forge.rounding import Grid

GRID = Grid(Precision.INT4)
amounts = st.integers(1, 1000).map(float)
options = st.builds(lambda bits, loss: Option(GRID, bits, 0.0, loss), amounts, amounts)
models = st.dictionaries(st.sampled_from("abcd"), st.lists(options, min_size=1, max_size=6), min_size=1)


def bits_of(chosen: dict[str, Option]) -> float:
    return sum(option.wire_bits for option in chosen.values())


def loss_of(chosen: dict[str, Option]) -> float:
    return sum(option.loss for option in chosen.values())


@given(models, amounts)
def test_budget_of_bits_is_kept_wherever_the_cheapest_keep_it(model: dict[str, list[Option]], budget: float) -> None:
    chosen = spend(Budget(wire_bits=budget), model)
    cheapest = sum(min(option.wire_bits for option in found) for found in model.values())
    assert chosen.keys() == model.keys()
    assert bits_of(chosen) <= max(budget, cheapest)


@given(models, amounts)
def test_no_other_choice_of_as_few_bits_loses_less(model: dict[str, list[Option]], budget: float) -> None:
    chosen = spend(Budget(wire_bits=budget), model)
    others = (dict(zip(model, combination, strict=True)) for combination in itertools.product(*model.values()))
    assert not any(bits_of(o) <= bits_of(chosen) and loss_of(o) < loss_of(chosen) - 1e-9 for o in others)


@given(models, amounts)
def test_bound_on_loss_is_kept_with_no_upgrade_to_spare(model: dict[str, list[Option]], bound: float) -> None:
    chosen = spend(Budget(loss=bound), model)
    least = sum(min(option.loss for option in found) for found in model.values())
    assert loss_of(chosen) <= max(bound, least) + 1e-9
    if bits_of(chosen) > 1:
        fewer = spend(Budget(wire_bits=bits_of(chosen) - 1), model)
        assert loss_of(fewer) > bound or bits_of(fewer) >= bits_of(chosen)


@given(st.lists(options, min_size=1, max_size=12))
def test_hull_falls_ever_less_steeply(found: list[Option]) -> None:
    hull = lower_hull(found)
    slopes = [(b.loss - a.loss) / (b.wire_bits - a.wire_bits) for a, b in itertools.pairwise(hull)]
    assert slopes == sorted(slopes)
    assert all(slope < 0 for slope in slopes)


def test_bits_in_memory_decide_between_options_that_are_alike_otherwise() -> None:
    eight, four = Option(GRID, 3.0, 8.0, 0.5), Option(GRID, 3.05, 4.0, 0.5)
    assert spend(Budget(wire_bits=10), {"a": [eight, four]})["a"] is four
