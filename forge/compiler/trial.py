"""Two models beside each other: the same seeded inputs, the largest difference of outputs, medians of time in turns.

Inputs are normal numbers, bool by chance, and integers below what the Gather that reads them allows, else below 2. What
a model needs otherwise is given as arrays. A run that does not end within its time ends in ConfigError.
"""

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Timer
from typing import Any

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # before the import: the wheel phones home by default

import numpy as np
import onnxruntime as ort
from onnx import ModelProto, TensorProto, ValueInfoProto, helper

from forge.compiler.work import Array, attribute_of
from wire.errors import ConfigError

RUN_LIMIT_S = 60.0
VALUES_LIMIT = 1 << 28
"""Numbers of one input."""
LARGEST_INTEGER = 2
ROUND_S = 0.02
"""How long one round of a model should be, by as many runs as that takes."""

Feeds = dict[str, Array]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How inputs are made: `shapes` and `given` by name."""

    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    given: Mapping[str, Array] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Speed:
    """Seconds of one run: median over the rounds, and (largest - smallest) / median."""

    median_s: float
    spread: float


class Session:
    """A model in onnxruntime on the CPU; raises ConfigError when it is refused."""

    def __init__(self, path: Path, threads: int, *, optimised: bool, limit_s: float = RUN_LIMIT_S) -> None:
        self._limit_s = limit_s
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4
        levels = ort.GraphOptimizationLevel
        options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimised else levels.ORT_DISABLE_ALL
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise ConfigError(f"onnxruntime refuses {path}: {str(error)[:500]}; export the model again") from error
        self.outputs = [entry.name for entry in self._session.get_outputs()]

    def run(self, feeds: Feeds) -> list[Any]:
        """All outputs. Raises ConfigError when the run fails or does not end."""
        options = ort.RunOptions()
        clock = Timer(self._limit_s, setattr, (options, "terminate", True))
        clock.daemon = True
        clock.start()
        try:
            found: list[Any] = self._session.run(None, feeds, options)
        except Exception as error:
            ended = options.terminate
            why = f"does not end within {self._limit_s:g} s" if ended else f"fails on these inputs: {str(error)[:300]}"
            raise ConfigError(f"the model {why}; give inputs that it takes with --shape or --inputs") from error
        finally:
            clock.cancel()
        return found

    def once(self, feeds: Feeds) -> None:
        """Run without a clock, for measuring."""
        self._session.run(None, feeds)


def make_feeds(model: ModelProto, sampling: Sampling, seed: int) -> Feeds:
    """Inputs of `model`, the same for the same seed. Raises ConfigError naming the input that must be given."""
    stored = {tensor.name for tensor in model.graph.initializer}
    inputs = {value.name: value for value in model.graph.input if value.name not in stored}
    if unknown := sorted((sampling.shapes.keys() | sampling.given.keys()) - inputs.keys()):
        raise ConfigError(f"the model has no input {unknown[0]!r}; it has {', '.join(inputs) or 'none'}")
    chance = np.random.default_rng(seed)
    bounds = gather_bounds(model)
    return {
        name: sampling.given[name] if name in sampling.given
        else _values(value, sampling.shapes.get(name), bounds.get(name, LARGEST_INTEGER), chance)
        for name, value in inputs.items()
    }  # fmt: skip


def shape_of(value: ValueInfoProto) -> tuple[int | None, ...]:
    """Sizes of an input; None where any is taken. Raises ConfigError when it is no tensor with a rank."""
    kind = value.type.tensor_type
    if not kind.HasField("shape"):
        raise ConfigError(f"input {value.name!r} is no tensor of a known rank; give it with --inputs FILE.npz")
    return tuple(size.dim_value if size.HasField("dim_value") else None for size in kind.shape.dim)


def difference(expected: Sequence[Any], found: Sequence[Any]) -> float:
    """The largest relative RMS difference of any output; infinite where shapes, types or what is not finite differ.

    RMS(found - expected) / RMS(expected), of whole numbers and texts 0 when they are equal.
    """
    return max((_difference(a, b) for a, b in zip(expected, found, strict=True)), default=0.0)


def measure(works: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, Speed]:
    """Run each work in turns, a round being as many runs as ROUND_S holds; the order changes every round."""
    counts = {}
    for name, work in works.items():
        work()
        counts[name] = max(1, round(ROUND_S / max(_seconds(work, 1), 1e-6)))
    taken: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds):
        for name in list(works)[:: 1 if number % 2 == 0 else -1]:
            taken[name].append(_seconds(works[name], counts[name]))
    return {name: _speed(values) for name, values in taken.items()}


def _seconds(work: Callable[[], object], runs: int) -> float:
    began_s = time.perf_counter()
    for _ in range(runs):
        work()
    return (time.perf_counter() - began_s) / runs


def _speed(values: list[float]) -> Speed:
    median = statistics.median(values)
    return Speed(median, (max(values) - min(values)) / median)


def _values(value: ValueInfoProto, shape: tuple[int, ...] | None, bound: int, chance: np.random.Generator) -> Array:
    declared = shape_of(value)
    sizes = tuple(size if size is not None else 1 for size in declared) if shape is None else shape
    fits = len(sizes) == len(declared) and all(d in (None, s) for d, s in zip(declared, sizes, strict=True))
    if not fits or min(sizes, default=1) < 0 or np.prod(sizes, dtype=float) > VALUES_LIMIT:
        raise ConfigError(f"input {value.name!r} is {declared}, not {sizes}; give --shape {value.name}=SIZES that fit")
    kind = value.type.tensor_type.elem_type
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    if kind == TensorProto.BOOL:
        return chance.integers(0, 2, sizes).astype(bool)
    if kind == TensorProto.STRING or np.dtype(dtype).kind == "c":
        raise ConfigError(f"input {value.name!r} is of a type that has no random values; give it with --inputs")
    if np.issubdtype(dtype, np.integer):
        return chance.integers(0, bound, sizes).astype(dtype)
    return np.asarray(chance.standard_normal(sizes)).astype(dtype)


def gather_bounds(model: ModelProto) -> dict[str, int]:
    """By input, how many rows a Gather of a stored table has that reads it."""
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    bounds: dict[str, int] = {}
    for node in model.graph.node:
        if node.op_type in ("Gather", "GatherBlockQuantized") and node.input[0] in stored:
            rows = stored[node.input[0]].dims[attribute_of(node, "axis", attribute_of(node, "gather_axis", 0))]
            bounds[node.input[1]] = min(rows, bounds.get(node.input[1], rows))
    return bounds


def _difference(expected: Any, found: Any) -> float:
    if not isinstance(expected, np.ndarray) or not isinstance(found, np.ndarray):
        return 0.0 if repr(expected) == repr(found) else float("inf")
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return float("inf")
    if not np.issubdtype(expected.dtype, np.floating):
        return 0.0 if np.array_equal(expected, found) else float("inf")
    wide, other = expected.astype(np.float64), found.astype(np.float64)
    whole = np.isfinite(wide)
    if not np.array_equal(wide[~whole], other[~whole], equal_nan=True) or not np.isfinite(other[whole]).all():
        return float("inf")
    if not whole.any():
        return 0.0
    size = np.sqrt(np.mean(np.square(wide[whole])))
    return float(np.sqrt(np.mean(np.square(other[whole] - wide[whole]))) / (size or 1.0))
