"""Golden runs of a graph: seeded inputs, and what onnxruntime makes of them without any optimisation, in float32.

Inputs are made as runtime/made.py does, or given. Integers that a Gather reads stay below its rows, others below 2,
unless a range is given. Sizes that may differ are 1, half of the largest, and the largest. An output is judged by some
of its numbers; whole numbers only where a graph gives nothing else, because near ties flip them between kernels.
"""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from onnx import ModelProto

from forge.compiler.trial import LARGEST_INTEGER, Session, gather_bounds
from forge.compiler.work import Array
from forge.onnx_file import write_onnx
from runtime.cpu import allowed_threads
from runtime.golden_graph import golden_feeds, output_error
from wire.errors import ArtifactError, Code, ConfigError
from wire.golden import InputValues, OutputValues, TensorRun, TensorSet
from wire.manifest import Datatype, GraphConfig, GraphTensor

TOLERANCE = 0.01
"""Of an output's deviation; kernels of float32 differ by 1e-6 to 1e-4 of it."""
MARGIN = 3.0
WORST = 0.33
"""An output that is further from the reference here leaves no room for a margin."""
POSITIONS = 256
FLOAT_RANGE = (-(3**0.5), 3**0.5)
"""Uniform numbers of this range have the standard deviation 1."""
GIVEN_LIMIT = 1 << 16
STEADY = 1e-4
"""A deviation below this share of the RMS is no unit to measure by."""


@dataclass(frozen=True, slots=True)
class Examples:
    """How inputs look, by name: the range of made numbers, or numbers as they are."""

    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    given: Mapping[str, Array] = field(default_factory=dict)


def make_tensor_set(reference: ModelProto, shipped: Path, config: GraphConfig, examples: Examples) -> TensorSet:
    """Golden runs of `reference`, with a tolerance that leaves the graph in `shipped` a margin on this machine.

    Raises ConfigError when the model does not run on such inputs, or answers otherwise every time.
    """
    _check_names(config, examples)
    bounds = gather_bounds(reference)
    with tempfile.TemporaryDirectory(prefix="amperage-twin-") as scratch:
        write_onnx(reference, Path(scratch, "twin.onnx"), beside=True)
        twin = Session(Path(scratch, "twin.onnx"), allowed_threads(0), optimised=False)
        runs = [run for number in range(3) if (run := _run(twin, config, examples, bounds, number)) is not None]
    model = Session(shipped, allowed_threads(0), optimised=True)
    worst = 0.0
    for run in runs:
        found = dict(zip(model.outputs, model.run(golden_feeds(run, config)), strict=True))
        worst = max([worst, *(output_error(told, found[name]) for name, told in run.outputs.items())])
    if not worst <= WORST:
        raise ArtifactError(
            Code.GOLDEN_MISMATCH,
            f"outputs as shipped are {worst:.3g} of their deviation from the reference; store the weights as they are, "
            "give inputs that mean something, or export the model without chance",
        )
    return TensorSet(tolerance=round(max(TOLERANCE, MARGIN * worst), 6), runs=tuple(runs))


def _run(
    twin: Session, config: GraphConfig, examples: Examples, bounds: Mapping[str, int], number: int
) -> TensorRun | None:
    """Golden run `number`, None when the graph does not take such sizes or the sizes were had before."""
    sizes = {name: [1, -(-most // 2), most][number] for name, most in config.largest.items()}
    sizes |= _given_sizes(config, examples)
    inputs = {
        tensor.name: _input(tensor, sizes, examples, bounds.get(tensor.name), seed=100 * number + place)
        for place, tensor in enumerate(config.inputs)
    }
    run = TensorRun(inputs=inputs, outputs={config.outputs[0].name: _NOTHING})
    try:
        found = dict(zip(twin.outputs, twin.run(golden_feeds(run, config)), strict=True))
    except ConfigError:
        if number < 2:
            return None
        raise
    floats = [tensor for tensor in config.outputs if tensor.datatype.startswith("FP")]
    judged = {tensor.name: _output(found[tensor.name], number) for tensor in floats or config.outputs}
    return run.model_copy(update={"outputs": judged})


_NOTHING = OutputValues(shape=(), positions=(), values=(), deviation=1.0)


def _input(
    tensor: GraphTensor, sizes: Mapping[str, int], examples: Examples, bound: int | None, *, seed: int
) -> InputValues:
    if tensor.name in examples.given:
        array = examples.given[tensor.name]
        return InputValues(shape=array.shape, values=tuple(float(number) for number in array.reshape(-1)))
    shape = tuple(sizes[size] if isinstance(size, str) else size for size in tensor.shape)
    if tensor.datatype.startswith("FP"):
        low, high = FLOAT_RANGE
    else:
        low, high = 0.0, float(LARGEST_INTEGER if bound is None or tensor.datatype is Datatype.BOOL else bound)
    low, high = examples.ranges.get(tensor.name, (low, high))
    return InputValues(shape=shape, seed=seed, low=low, high=high)


def _output(values: Array, seed: int) -> OutputValues:
    """Some of the finite numbers of an output. Raises ConfigError when there are none."""
    wide = values.reshape(-1).astype(np.float64)
    finite = np.flatnonzero(np.isfinite(wide))
    if values.size and not finite.size:
        raise ConfigError("an output is nowhere finite on made inputs; give some that mean something with --inputs")
    chosen = np.sort(np.random.default_rng(seed).permutation(finite)[:POSITIONS])
    rms = float(np.sqrt(np.mean(np.square(wide[finite])))) if finite.size else 0.0
    spread = float(wide[finite].std()) if finite.size else 0.0
    return OutputValues(
        shape=values.shape, positions=tuple(int(position) for position in chosen),
        values=tuple(float(f"{wide[position]:.8g}") for position in chosen),
        deviation=float(f"{spread if spread > STEADY * rms else rms or 1.0:.6g}"),
    )  # fmt: skip


def _given_sizes(config: GraphConfig, examples: Examples) -> dict[str, int]:
    """Named sizes that given inputs decide."""
    return {
        size: given
        for tensor in config.inputs
        if tensor.name in examples.given
        for size, given in zip(tensor.shape, examples.given[tensor.name].shape, strict=True)
        if isinstance(size, str)
    }


def _check_names(config: GraphConfig, examples: Examples) -> None:
    inputs = {tensor.name: tensor for tensor in config.inputs}
    if unknown := sorted((examples.ranges.keys() | examples.given.keys()) - inputs.keys()):
        raise ConfigError(f"the model has no input {unknown[0]!r}; it has {', '.join(inputs)}")
    for name, array in examples.given.items():
        most = [config.largest[size] if isinstance(size, str) else size for size in inputs[name].shape]
        fits = array.ndim == len(most) and all(
            given <= size and (given == size or isinstance(axis, str))
            for given, size, axis in zip(array.shape, most, inputs[name].shape, strict=True)
        )
        if not fits or not 0 < array.size <= GIVEN_LIMIT:
            raise ConfigError(f"input {name!r} is {array.shape}; give at most {GIVEN_LIMIT} numbers that fit {most}")
