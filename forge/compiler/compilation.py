"""One ONNX model in, one that does the same faster out, with a report of what was done and what it gained.

Ours are folding ahead of time, unrolling, merging of products, and parting of sums and norms: what onnxruntime does not
do when it loads a model. What it does then (GELU, norms that are spelt out, attention of BERT, MatMul with Add,
transposes next to each other, layouts of convolutions for this CPU) is left to it: written into the file it would gain
nothing but part of the load, and the last of them would be wrong for another CPU. A test holds it to that.

Invariant: nothing is written unless the compiled model, run on seeded inputs, gives what the model gives that
onnxruntime runs without any optimisation. A crash leaves `.NAME.writing`.
"""

import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from onnx import ModelProto

from forge.compiler.batch import batch_slices
from forge.compiler.clean import clean
from forge.compiler.fold import fold_constants
from forge.compiler.merge import merge_products
from forge.compiler.norms import part_norms
from forge.compiler.trial import RUN_LIMIT_S, Sampling, Session, difference, make_feeds, measure
from forge.compiler.unroll import unroll
from forge.compiler.work import Limits, Work, count_nodes, graphs_of
from forge.onnx_file import has_external_data, read_onnx, write_onnx
from forge.progress import Progress, silent
from runtime.cpu import allowed_threads
from wire.errors import ArtifactError, Code, ConfigError

TOLERANCE = 1e-4
SEEDS = 3
ROUNDS = 21
PASSES = 16
"""Most times that unrolling and folding follow each other: loops in loops come open one per pass."""
CONTRIB_OPSET = 1


@dataclass(frozen=True, slots=True)
class Choices:
    """What the caller wants. `fixed` are shapes that are written into the graph, so that loops over them unroll;
    `threads` 0 is every core that is allowed."""

    tolerance: float = TOLERANCE
    limits: Limits = field(default_factory=Limits)
    sampling: Sampling = field(default_factory=Sampling)
    fixed: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    threads: int = 0
    rounds: int = ROUNDS
    run_limit_s: float = RUN_LIMIT_S


@dataclass(frozen=True, slots=True)
class Report:
    """What was done; times in seconds of one run, sizes in bytes."""

    nodes_before: dict[str, int]
    nodes_after: dict[str, int]
    bytes_before: int
    bytes_after: int
    done: dict[str, int]
    left: dict[str, str]
    difference: float
    tolerance: float
    before_s: float
    before_spread: float
    after_s: float
    after_spread: float

    @property
    def gain(self) -> float:
        """How many times as fast."""
        return self.before_s / self.after_s

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self) | {"gain": self.gain}


def compile_model(source: Path, out: Path, choices: Choices | None = None, progress: Progress = silent) -> Report:
    """Compile the model in `source` to the new file `out`, weights to `out`.data where `source` had such a file.

    Raises ConfigError when `source` cannot be used, ArtifactError(golden_mismatch) when outputs differ by more than
    the tolerance; nothing is written then.
    """
    choices = choices or Choices()
    for place in (out, Path(f"{out}.data")):
        if place.exists():
            raise ConfigError(f"{place} exists; remove it or choose another place")
    progress("read", 0, 1)
    model = read_onnx(source)
    _fix(model, choices.fixed)
    threads = allowed_threads(choices.threads)
    reference = Session(source, threads, optimised=False, limit_s=choices.run_limit_s)
    beside = has_external_data(source)
    work = Work(_copied(model), choices.limits)
    run_passes(work, progress)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".compiling-", dir=out.parent) as scratch:
        draft = Path(scratch, out.name)
        write_onnx(work.model, draft, beside=beside)
        report = _judge(model, (source, reference, draft), work, choices, progress)
        for place in sorted(Path(scratch).iterdir(), reverse=True):  # weights first
            shutil.move(place, out.parent / place.name)
    return report


def run_passes(work: Work, progress: Progress = silent) -> None:
    """All passes, until none finds anything."""
    clean(work)
    for number in range(PASSES):
        progress("fold and unroll", number, 0)
        changed = fold_constants(work)
        changed |= unroll(work)
        clean(work)
        if not changed:
            break
    progress("merge", 0, 0)
    batch_slices(work)
    clean(work)
    merge_products(work)
    part_norms(work)
    clean(work)
    for graph in graphs_of(work.graph):
        del graph.value_info[:]
    domains = {node.domain for graph in graphs_of(work.graph) for node in graph.node}
    if "com.microsoft" in domains and not any(entry.domain == "com.microsoft" for entry in work.model.opset_import):
        work.model.opset_import.add(domain="com.microsoft", version=CONTRIB_OPSET)


def _judge(
    model: ModelProto, places: tuple[Path, Session, Path], work: Work, choices: Choices, progress: Progress
) -> Report:
    """Compare and measure. Raises ArtifactError(golden_mismatch)."""
    source, reference, draft = places
    threads = allowed_threads(choices.threads)
    compiled = Session(draft, threads, optimised=True, limit_s=choices.run_limit_s)
    worst = 0.0
    for seed in range(SEEDS):
        progress("compare", seed, SEEDS)
        feeds = make_feeds(model, choices.sampling, seed)
        worst = max(worst, difference(reference.run(feeds), compiled.run(feeds)))
    if not worst <= choices.tolerance:
        raise ArtifactError(
            Code.GOLDEN_MISMATCH,
            f"the compiled model's outputs differ by {worst:.3g} relative RMS, over {choices.tolerance:g}; nothing was "
            "written: raise --tolerance if that is right for this model, or serve it as it is",
        )  # fmt: skip
    progress("measure", 0, 0)
    plain = Session(source, threads, optimised=True)
    speeds = measure({"before": lambda: plain.once(feeds), "after": lambda: compiled.once(feeds)}, choices.rounds)
    before, after = speeds["before"], speeds["after"]
    return Report(
        nodes_before=_counted(count_nodes(model.graph)), nodes_after=_counted(count_nodes(work.graph)),
        bytes_before=_bytes(source), bytes_after=_bytes(draft), done=dict(sorted(work.done.items())),
        left=dict(sorted(work.left.items())), difference=worst, tolerance=choices.tolerance,
        before_s=before.median_s, before_spread=before.spread, after_s=after.median_s, after_spread=after.spread,
    )  # fmt: skip


def _fix(model: ModelProto, fixed: Mapping[str, tuple[int, ...]]) -> None:
    """Write shapes into the graph's inputs. Raises ConfigError when one does not fit."""
    inputs = {value.name: value for value in model.graph.input}
    for name, sizes in fixed.items():
        dims = inputs[name].type.tensor_type.shape.dim if name in inputs else []
        declared = [size.dim_value if size.HasField("dim_value") else None for size in dims]
        if len(dims) != len(sizes) or any(d not in (None, s) for d, s in zip(declared, sizes, strict=True)):
            raise ConfigError(f"no input {name!r} takes the shape {sizes}; the model has {', '.join(inputs)}")
        for dim, size in zip(dims, sizes, strict=True):
            dim.dim_value = size


def _copied(model: ModelProto) -> ModelProto:
    copy = ModelProto()
    copy.CopyFrom(model)
    return copy


def _counted(counter: Counter[str]) -> dict[str, int]:
    return dict(sorted(counter.items()))


def _bytes(path: Path) -> int:
    return sum(place.stat().st_size for place in (path, Path(f"{path}.data")) if place.exists())
