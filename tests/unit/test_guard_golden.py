"""Each condition of the golden vectors counts by itself: closeness, top-1 agreement, finiteness."""

import math

import numpy as np
import pytest

from runtime.golden import judge_model
from wire.golden import GoldenSet, GoldenVector

VOCAB = 8
REFERENCE = np.array([3.0, 1.0, 0.0, -1.0, 0.5, -0.5, 2.0, -2.0], np.float32)


class FixedModel:
    """Answers every prefill by either session and every decode step with one row of logits each."""

    reads_apart = True

    def __init__(self, prefilled: np.ndarray, decoded: np.ndarray, wide: np.ndarray) -> None:
        self._prefilled, self._decoded = prefilled.astype(np.float32), decoded.astype(np.float32)
        self._wide = wide.astype(np.float32)

    def prefill(self, slot: int, tokens: list[int], start: int, *, wide: bool) -> np.ndarray:
        return self._wide if wide else self._prefilled

    def decode(self, tokens: list[int], positions: list[int]) -> np.ndarray:
        return self._decoded[None]


def make_golden(tolerance: float = 0.1, min_top1_agreement: float = 1.0) -> GoldenSet:
    vector = GoldenVector(
        input_ids=(1, 2, 3), columns=tuple(range(VOCAB)), logits=tuple(REFERENCE.tolist()),
        deviation=float(REFERENCE.std()), argmax=int(REFERENCE.argmax()),
    )  # fmt: skip
    return GoldenSet(tolerance=tolerance, min_top1_agreement=min_top1_agreement, vectors=(vector,))


def fault_of(prefilled: np.ndarray, decoded: np.ndarray, golden: GoldenSet, wide: np.ndarray | None = None) -> str:
    model = FixedModel(prefilled, decoded, prefilled if wide is None else wide)
    return judge_model(model, golden).fault  # type: ignore[arg-type]  # what it uses of a Model


def test_logits_of_the_reference_are_right() -> None:
    assert fault_of(REFERENCE, REFERENCE, make_golden()) == ""


@pytest.mark.parametrize("where", ["prefill", "decode", "wide"])
def test_error_over_the_tolerance_is_a_fault_although_the_largest_logit_agrees(where: str) -> None:
    off = REFERENCE * np.float32(1.5)
    rows = [off if where == place else REFERENCE for place in ("prefill", "decode", "wide")]
    assert "over the tolerance" in fault_of(rows[0], rows[1], make_golden(), rows[2])


def test_other_largest_logit_is_a_fault_although_the_error_is_small() -> None:
    swapped = REFERENCE.copy()
    swapped[6] = np.float32(3.05)
    assert "top-1 agreement" in fault_of(swapped, swapped, make_golden(tolerance=1.0))
    assert fault_of(swapped, swapped, make_golden(tolerance=1.0, min_top1_agreement=0.0)) == ""


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logit_that_is_not_finite_is_a_fault_wherever_it_is(bad: float) -> None:
    broken = REFERENCE.copy()
    broken[7] = bad
    assert "not finite" in fault_of(REFERENCE, broken, make_golden(tolerance=1.0, min_top1_agreement=0.0))
