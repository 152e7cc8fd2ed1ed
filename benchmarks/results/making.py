"""Recipes to version directories, by the commands of `amperage forge` that the page shows.

A step that several recipes begin with is done once. All is below one working directory, which the run throws away, but
what was trained: it stays below .venv/opt/trained, under a digest of whatever it was made of, for later runs.
"""

import contextlib
import io
import math
import shlex
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.decoder_models import ROOT
from benchmarks.results.recipes import TRAINING, Recipe
from cli.forge import app
from forge.tensors import WEIGHTS, Tensors
from wire.digest import digest_of

TRAINED = ROOT / ".venv" / "opt" / "trained"


@dataclass(frozen=True, slots=True)
class Made:
    """A recipe's version, and how many weights the checkpoint has that it was built of."""

    recipe: Recipe
    directory: Path
    weights: int


class Maker:
    """Makes recipes below `work`; `places` are the files that steps name in braces, `say` hears what is being made."""

    def __init__(self, work: Path, places: Mapping[str, Path], say: Callable[[str], None]) -> None:
        self._work, self._places, self._say = work, places, say
        self._done: dict[tuple[object, ...], Path] = {}

    def make(self, recipe: Recipe) -> Made:
        """Run the steps that no recipe before had. Raises AmperageError as the command does."""
        self._say(f"making {recipe.name}")
        source = recipe.source
        for count, step in enumerate(recipe.steps, start=1):
            key = (recipe.source, *recipe.steps[:count])
            if key not in self._done:
                self._done[key] = self._place(source, step, self._work / str(len(self._done)))
            before, source = source, self._done[key]
        return Made(recipe, source, weights_of(before))

    def _place(self, source: Path, step: str, out: Path) -> Path:
        """Run one step; returns where its result is, `out` or where an earlier run has it."""
        if not step.startswith(TRAINING):
            with contextlib.redirect_stdout(io.StringIO()):
                app(args=filled(step, {**self._places, "source": source, "out": out}), standalone_mode=False)
            return out
        read = [source / WEIGHTS, *(path for name, path in self._places.items() if f"{{{name}}}" in step)]
        sources = sorted([*(ROOT / "forge" / "training").glob("*.py"), ROOT / "forge" / "quantise.py"])
        kept = TRAINED / digest_of(step.encode() + b"".join(path.read_bytes() for path in (*read, *sources)))[:12]
        if not kept.is_dir():
            TRAINED.mkdir(parents=True, exist_ok=True)
            words = filled(step, {**self._places, "source": source, "out": kept})
            subprocess.run([ROOT / "scripts" / "train", *words], check=True, stdout=subprocess.DEVNULL)
        return kept


def filled(step: str, places: Mapping[str, Path]) -> list[str]:
    """The step's words, each place put in whole whatever characters it has."""
    return [word.format(**places) for word in shlex.split(step)]


def weights_of(checkpoint: Path) -> int:
    """Elements of all tensors, of which a head that is the embedding counts once."""
    tensors = Tensors(checkpoint)
    return sum(math.prod(tensors.shape(name)) for name in tensors.names)
