"""Judging a loaded graph by the golden runs of its version (wire/golden.py, TensorSet)."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from runtime.golden import Judgement, fault_of, read_golden_file
from runtime.made import Array, make_input
from wire.errors import ArtifactError, Code
from wire.golden import GOLDEN_FILE, OutputValues, TensorRun, TensorSet
from wire.manifest import GraphConfig

Run = Callable[[Mapping[str, Array]], Mapping[str, Array]]


def read_tensors_golden(directory: Path, config: GraphConfig) -> TensorSet:
    """`golden.json` of a graph; raises ArtifactError, StoreError."""
    golden = read_golden_file(TensorSet, directory)
    inputs = {tensor.name: tensor for tensor in config.inputs}
    outputs = {tensor.name for tensor in config.outputs}
    for run in golden.runs:
        fits = run.inputs.keys() == inputs.keys() and run.outputs.keys() <= outputs
        for name, told in run.inputs.items() if fits else ():
            most = [config.largest[size] if isinstance(size, str) else size for size in inputs[name].shape]
            whole = told.values is None or len(told.values) == math.prod(told.shape)
            within = len(told.shape) == len(most) and all(a <= b for a, b in zip(told.shape, most, strict=True))
            fits = fits and whole and within
        sized = all(len(told.positions) == len(told.values) for told in run.outputs.values())
        if not fits or not sized:
            raise ArtifactError(
                Code.CORRUPT, f"{directory / GOLDEN_FILE} does not fit the model; build the version again"
            )
    return golden


def golden_feeds(run: TensorRun, config: GraphConfig) -> dict[str, Array]:
    """The inputs of a golden run."""
    return {tensor.name: make_input(run.inputs[tensor.name], tensor.datatype) for tensor in config.inputs}


def judge_graph(run: Run, config: GraphConfig, golden: TensorSet) -> Judgement:
    """Run every golden run."""
    errors: list[float] = []
    for entry in golden.runs:
        found = run(golden_feeds(entry, config))
        errors += [output_error(told, found[name]) for name, told in entry.outputs.items()]
    worst = max(errors) if all(math.isfinite(error) for error in errors) else None
    return Judgement(len(golden.runs), worst, golden.tolerance, None, fault_of(worst, golden.tolerance))


def output_error(told: OutputValues, found: Array) -> float:
    """RMS difference as a share of the reference's deviation; not finite when shape or numbers are not right."""
    if found.shape != told.shape or max(told.positions, default=0) >= max(1, found.size):
        return math.nan
    if not told.positions:
        return 0.0
    chosen = found.reshape(-1)[list(told.positions)].astype(np.float64)
    return float(np.sqrt(np.mean(np.square(chosen - np.asarray(told.values)))) / told.deviation)
