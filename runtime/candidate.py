"""The probe child: loads one candidate, judges it, measures it beside the incumbent, and reports on stdout.

It is its own process by exec, with a bound on its memory and the first to die when memory runs out, so that a graph
that crashes, hangs or eats memory harms nobody. What it can tell itself is a typed verdict here; what it cannot (a
signal, no end) its parent tells (runtime/probe.py). It writes nothing but its report and, when it is given a place, the
packed weights of a candidate that passed.
"""

import os
import resource
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from runtime.cpu import allowed_threads, detect_cpu
from runtime.golden import Judgement
from runtime.memory import resident_share
from runtime.prepack import PrepackCache, PrepackKey
from runtime.session import ONNXRUNTIME
from runtime.subject import Subject, Way, check_text, load_subject
from runtime.version import open_version, weights_bytes
from wire.errors import AmperageError
from wire.manifest import VersionDocument
from wire.serving import ExecutionOptions, ProbeReport, ProbeVerdict

GIB = 1 << 30
PACKING_FACTOR = 8
"""Address space per byte of weights: the map, the packed copy, its making, and the arena's doubling, twice over."""
THREAD_BYTES = 16 << 20
ROUNDS_LIMIT = 9
MEASURE_BUDGET_S = 2.0
QUICK_LOAD_S = 3.0
"""Only a model that loads quickly is loaded again to try other options."""
BETTER_BY = 1.05
"""Other options must win clearly, because measurements on a serving node are noisy."""
USED_SHARE = 0.5
"""Least share of the mapped files that is in memory after the golden vectors ran, if the kernels read packed weights
from there: what stays out are the weights as they were, and rows of the embedding that nobody asked for."""
NICENESS = 5

_MEMORY_SIGNS = ("bad_alloc", "failed to allocate", "cannot allocate memory", "memoryerror", "out of memory")


@dataclass(frozen=True, slots=True)
class Orders:
    """What to probe; `memory_bytes` of 0 is a bound by the weights' size, `threads` of 0 all that are allowed."""

    candidate: Path
    incumbent: Path | None = None
    threads: int = 0
    memory_bytes: int = 0
    reading_session: bool = True
    """Whether prompts may have a session of their own, which packs the weights once more."""
    cache: Path | None = None
    """Where packed weights go; None: they stay on the heap."""


def probe_candidate(orders: Orders) -> ProbeReport:
    """Probe in this process; never raises for what the candidate does."""
    cpu = str(detect_cpu())
    try:
        return _probe(orders).model_copy(update={"cpu": cpu, "onnxruntime": ONNXRUNTIME, "peak_rss_bytes": peak_rss()})
    except Exception as error:  # noqa: BLE001  whatever a candidate does to us is its verdict
        verdict = ProbeVerdict.OUT_OF_MEMORY if looks_like_memory(repr(error)) else ProbeVerdict.LOAD_FAILED
        detail = error.message if isinstance(error, AmperageError) else repr(error)
        return ProbeReport(verdict=verdict, detail=detail[:2000], cpu=cpu, onnxruntime=ONNXRUNTIME)


def confine(memory_bytes: int) -> None:
    """Bound this process's address space, make it yield to others, and the first to die of memory."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    with suppress(OSError):
        os.nice(NICENESS)
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def looks_like_memory(text: str) -> bool:
    """True when an error's text speaks of memory that was refused."""
    lowered = text.lower()
    return any(sign in lowered for sign in _MEMORY_SIGNS)


def peak_rss() -> int | None:
    """VmHWM of this process; ru_maxrss is no good, it survives exec and is the parent's."""
    return _status_bytes("VmHWM")


def _probe(orders: Orders) -> ProbeReport:
    threads = allowed_threads(orders.threads)
    document, _ = open_version(orders.candidate, _digest_name(orders.candidate))
    confine(orders.memory_bytes or _memory_bound(orders, document, threads))
    began_s = time.perf_counter()
    check_text(orders.candidate, document)
    candidate = load_subject(orders.candidate, document, ExecutionOptions(threads=threads))
    load_s = time.perf_counter() - began_s
    judged = candidate.judge()
    if judged.fault:
        return _report(ProbeVerdict.GOLDEN_MISMATCH, judged, load_s)
    if load_s < QUICK_LOAD_S:
        candidate = _best_reading(_best(candidate), apart=orders.reading_session)
        judged = candidate.judge()
        if judged.fault:
            return _report(ProbeVerdict.GOLDEN_MISMATCH, judged, load_s)
    candidate, kept = _packed(orders, candidate)
    incumbent = _incumbent(orders, candidate.options)
    speeds = _race(candidate.tokens_per_s, incumbent.tokens_per_s if incumbent else None)
    return _report(ProbeVerdict.PASSED, judged, load_s).model_copy(
        update={"tokens_per_s": speeds[0], "incumbent_tokens_per_s": speeds[1], "options": candidate.options} | kept
    )


def _report(verdict: ProbeVerdict, judged: Judgement, load_s: float) -> ProbeReport:
    return ProbeReport(
        verdict=verdict, detail=judged.fault, golden_rows=judged.rows, golden_error=judged.worst_error,
        golden_tolerance=judged.tolerance, top1_agreement=judged.top1_agreement, load_s=load_s,
    )  # fmt: skip


def _incumbent(orders: Orders, options: ExecutionOptions) -> Subject | None:
    """The version that serves, to be measured under the same conditions; what is wrong with it is not judged here."""
    if orders.incumbent is None:
        return None
    try:
        document, _ = open_version(orders.incumbent)
        return load_subject(orders.incumbent, document, options)
    except (AmperageError, MemoryError):
        return None


def _best(first: Subject) -> Subject:
    """The fastest of a few ways to decode; the plain one unless another wins clearly."""
    ways: list[Way] = [{"spinning": True}, {"threads": 1}] if first.options.threads > 1 else []
    best = first
    for way in ways:
        best = _winner(best, first.options.model_copy(update=way), lambda subject: subject.tokens_per_s)
    return best


def _best_reading(best: Subject, *, apart: bool) -> Subject:
    """The fastest of a few ways to read prompts."""
    for way in best.reading_ways(apart=apart):
        best = _winner(best, best.options.model_copy(update=way), lambda subject: subject.read_tokens_per_s)
    return best


def _winner(best: Subject, options: ExecutionOptions, figure: Callable[[Subject], Callable[[], float]]) -> Subject:
    """`best`, or the same version with `options` when its figure is clearly higher; the other is closed."""
    other = best.again(options)
    mine, others = _race(figure(best), figure(other))
    if mine is not None and others is not None and others > mine * BETTER_BY:
        best, other = other, best
    other.close()
    return best


def _packed(orders: Orders, candidate: Subject) -> tuple[Subject, dict[str, object]]:
    """The candidate over packed weights in files and what the report says of them; as it was where that cannot be.

    They get their name only after the golden vectors passed from them, and from them indeed: onnxruntime packs onto the
    heap, without a word, what does not fit its kernels.
    """
    if orders.cache is None:
        return candidate, {}
    directory, document, options = candidate.directory, candidate.document, candidate.options
    key = PrepackKey.of(document.decoded_digest(), str(detect_cpu()), ONNXRUNTIME, options)
    try:
        with PrepackCache(orders.cache).draft(key, directory, options, weights_bytes(document)) as draft:
            mapped = candidate.again(options, draft.directory)
            fault = mapped.judge().fault
            if not fault and resident_share(draft.directory.resolve()) < USED_SHARE:
                fault = "the kernels of this onnxruntime do not read packed weights from files"
            if fault:
                mapped.close()
                return candidate, {"prepack_detail": fault}
            digest = draft.commit()
    except (AmperageError, MemoryError) as error:
        return candidate, {"prepack_detail": str(error)[:2000]}
    candidate.close()
    return mapped, {"prepack": digest, "prepack_bytes": draft.size_bytes}


def _race(one: Callable[[], float], other: Callable[[], float] | None) -> tuple[float | None, float | None]:
    """Median speeds of both, measured in turns so that what else the node does meets both alike."""
    speeds: tuple[list[float], list[float]] = ([], [])
    runs: list[tuple[list[float], Callable[[], float]]] = [(speeds[0], one)]
    if other is not None:
        runs.append((speeds[1], other))
    until_s = time.perf_counter() + MEASURE_BUDGET_S
    for _ in range(ROUNDS_LIMIT):
        for found, run in runs:
            found.append(run())
        if time.perf_counter() > until_s:
            break
    return statistics.median(speeds[0]), statistics.median(speeds[1]) if other is not None else None


def _memory_bound(orders: Orders, document: VersionDocument, threads: int) -> int:
    weights = weights_bytes(document)
    if orders.incumbent is not None:
        with suppress(AmperageError):
            weights += weights_bytes(open_version(orders.incumbent)[0])
    return (_status_bytes("VmSize") or GIB) + GIB + PACKING_FACTOR * weights + THREAD_BYTES * threads


def _digest_name(directory: Path) -> str | None:
    """Directories of a store are named by their digest, which must then be right."""
    name = directory.name
    return name if len(name) == 64 and set(name) <= set("0123456789abcdef") else None


def _status_bytes(field: str) -> int | None:
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    return None
