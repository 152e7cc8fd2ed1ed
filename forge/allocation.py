"""A decoder within a budget: bits go where the model is sensitive, as many as the wire or the loss allows.

Sensitivities are measured, options priced (forge/options.py) and chosen (forge/budget.py). What is chosen is rounded
with feedback, built, packed, and judged on text that did not calibrate; how far that is from what was expected corrects
the next choice. The version is written under a temporary name and renamed at the end; a crash leaves that name, which
the next run for the same place removes. The same input gives the same bytes.
"""

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from codec.encoder import encode_pack
from forge.budget import Budget, Option, spend
from forge.build import build_version, parameters_of
from forge.calibrated import own_windows
from forge.evaluate import divergences, log_probabilities
from forge.feedback import feedback_of
from forge.moments import measure_moments
from forge.open_model import EMBEDDING, OpenModel, open_model
from forge.options import options_of
from forge.progress import Progress, silent
from forge.quantise import BlockMatrix
from forge.reference import shipped_judge
from forge.rounding import Grid, Rounding, round_matrix
from forge.sensitivity import measure_sensitivity
from wire.documents import encode_document
from wire.errors import ConfigError
from wire.manifest import VersionDocument

MANIFEST_BYTES = 4096
"""Room for what a manifest says beside the version."""
TRIALS = 6
CLOSE, AIM = 0.99, 0.998
"""Shares of the goal: from which a trial is good enough, and what the next one is to reach."""
SMALLER, SMALLER_STEPS = 0.97, 64
"""How an amount becomes less until it buys something else."""
JUDGED = 4
"""Of every so many windows one does not calibrate but judges."""


@dataclass(frozen=True, slots=True)
class Goal:
    """What must not be exceeded; one of them."""

    wire_bytes: int | None = None
    bits_per_weight: float | None = None
    """Of the whole artifact on the wire."""
    kl_nats: float | None = None
    """Mean divergence from the checkpoint in float32, of the model as shipped, per token of text that judges."""

    def __post_init__(self) -> None:
        """Raises ConfigError unless there is one."""
        given = [value for value in (self.wire_bytes, self.bits_per_weight, self.kl_nats) if value is not None]
        if len(given) != 1 or not given[0] > 0:
            raise ConfigError("name one goal above 0: --target-wire, --target-bpw or --max-kl")


@dataclass(frozen=True, slots=True)
class Allocation:
    """A version, and what was chosen for each of its matrices; `kl_nats` is measured on the windows that judge."""

    version: VersionDocument
    options: dict[str, Option]
    wire_bytes: int
    bits_per_weight: float
    kl_nats: float
    trial: int

    @property
    def kl_expected(self) -> float:
        """The sum of what was expected of each matrix."""
        return sum(option.loss for option in self.options.values())

    def figures(self) -> dict[str, Any]:
        """Plain JSON values."""
        document = self.version
        return {
            "model": document.model, "version": document.version, "decoded": document.decoded_digest(),
            "parameters": parameters_of(document), "raw_bytes": sum(entry.size_bytes for entry in document.files),
            "wire_bytes": self.wire_bytes, "bits_per_weight": round(self.bits_per_weight, 4),
            "kl_nats": round(self.kl_nats, 6), "kl_expected": round(self.kl_expected, 6), "trials": self.trial,
        }  # fmt: skip


def quantise_within(  # noqa: PLR0913  # as in build_version
    goal: Goal, source: Path, out: Path, named: tuple[str, str], windows: list[list[int]] | None = None,
    progress: Progress = silent,
) -> Allocation:  # fmt: skip
    """Build the version `out`, `named` (model, version), of the decoder `source` within `goal`. `windows` of tokens
    calibrate and judge, None lets the model write its own.

    Raises ConfigError when nothing fits the goal, saying what came closest.
    """
    if out.exists():
        raise ConfigError(f"{out} exists; remove it or choose another place for the version")
    texts = windows if windows is not None else own_windows(source, progress)
    out.parent.mkdir(parents=True, exist_ok=True)
    with open_model(source) as model, _trials_folder(out) as folder:
        trials = _Trials(model, source, named, model.fit(texts), progress)
        best = _search(goal, trials, folder)
        (folder / str(best.trial)).rename(out)
    return best


@contextmanager
def _trials_folder(out: Path) -> Iterator[Path]:
    """A place beside `out` for versions that are tried; what a crash left there goes at the next start."""
    folder = out.with_name(f".{out.name}.quantising")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def _search(goal: Goal, trials: "_Trials", folder: Path) -> Allocation:
    """The best of a few trials, each of which is built in `folder` under its number."""
    limit = goal.kl_nats or goal.wire_bytes or (goal.bits_per_weight or 0.0) * trials.weights / 8
    best: Allocation | None = None
    options, amount = trials.choose(goal, limit), limit
    for number in range(1, TRIALS + 1):
        last = trials.build(options, folder / str(number), number)
        value = last.kl_nats if goal.kl_nats else last.wire_bytes
        if value <= limit and (best is None or last.kl_expected < best.kl_expected or goal.kl_nats):
            best = last
        if CLOSE * limit <= value <= limit:
            break
        amount *= AIM * limit / value
        for _ in range(SMALLER_STEPS if value > limit else 1):
            options = trials.choose(goal, amount)
            if options != last.options:
                break
            amount *= SMALLER
        else:
            break
    if best is None:
        raise ConfigError(_missed(goal, last))
    return best


def _missed(goal: Goal, closest: Allocation) -> str:
    if goal.kl_nats is not None:
        return (
            f"no choice diverges less than {goal.kl_nats:g} nats, the closest {closest.kl_nats:.2g}, of which kernels "
            "that round activations have a part; raise --max-kl, or build --precision float32"
        )
    return (
        f"the smallest choice takes {closest.wire_bytes:,} bytes, {closest.bits_per_weight:.2f} bits per weight; prune "
        "or distil the checkpoint first, or raise the target"
    )


class _Trials:
    """A model's options, and what becomes of a choice."""

    def __init__(
        self, model: OpenModel, source: Path, named: tuple[str, str], texts: list[list[int]], progress: Progress
    ) -> None:
        self._model, self._source, self._named, self._progress = model, source, named, progress
        self._judged = texts[JUDGED - 1 :: JUDGED] or texts
        calibration = [window for i, window in enumerate(texts) if i % JUDGED != JUDGED - 1]
        self._moments = measure_moments(model, calibration, progress)
        self._references = [log_probabilities(model.logits(window, {})) for window in self._judged]
        self._rounded: dict[tuple[str, Grid], BlockMatrix] = {}
        self.weights = sum(model.matrix(name).size for name in model.names)
        self.options = self._price(measure_sensitivity(model, calibration, progress))

    def choose(self, goal: Goal, amount: float) -> dict[str, Option]:
        """What to do with each matrix when `amount` of what the goal is about may be spent."""
        return spend(Budget(loss=amount) if goal.kl_nats else Budget(wire_bits=8 * amount), self.options)

    def build(self, options: dict[str, Option], out: Path, number: int) -> Allocation:
        """Round, build at `out`, pack and judge."""
        version = build_version(
            self._source, out, self._named, rounded={name: self._round(name, options[name].grid) for name in options},
            progress=self._progress,
        )  # fmt: skip
        with tempfile.NamedTemporaryFile(dir=out.parent) as pack:
            packed = encode_pack(version, out, Path(pack.name), progress=partial(self._progress, "pack"))
        wire_bytes = packed.pack_size_bytes + len(encode_document(version)) + MANIFEST_BYTES
        bits_per_weight = 8 * wire_bytes / parameters_of(version)
        return Allocation(version, options, wire_bytes, bits_per_weight, self._divergence(out, version), number)

    def _price(self, sensitivity: Mapping[str, float]) -> dict[str, list[Option]]:
        priced = {}
        for number, name in enumerate(self._model.names):
            self._progress("price options", number, len(sensitivity))
            # What is looked up gains nothing by feedback, and the embedding's errors are mostly those.
            gain = feedback_of(self._moments[name]).gain if name in self._moments and name != EMBEDDING else 1.0
            priced[name] = options_of(name, self._model.matrix(name), sensitivity[name], gain)
        return priced

    def _round(self, name: str, grid: Grid) -> BlockMatrix:
        """The matrix on `grid`; those of earlier trials are kept."""
        if (name, grid) not in self._rounded:
            weights, moments = self._model.matrix(name), self._moments.get(name)
            self._rounded[name, grid] = round_matrix(name, weights, grid, Rounding.GPTQ, moments)
        return self._rounded[name, grid]

    def _divergence(self, directory: Path, version: VersionDocument) -> float:
        """Of the model as shipped from the checkpoint, mean nats per token of the text that judges."""
        judge = shipped_judge(directory, version)
        found = [
            divergences(reference, log_probabilities(judge.logits(window)))
            for reference, window in zip(self._references, self._judged, strict=True)
        ]
        return float(np.mean(np.concatenate(found)))
