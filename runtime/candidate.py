"""The probe child: loads one candidate, judges it, measures it beside the incumbent, and reports on stdout.

It is its own process by exec, with a bound on its memory and the first to die when memory runs out, so that a graph
that crashes, hangs or eats memory harms nobody. What it can tell itself is a typed verdict here; what it cannot (a
signal, no end) its parent tells (runtime/probe.py). It writes nothing but its report and, when it is given a place, the
packed weights of a candidate that passed.
"""

import math
import os
import resource
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from runtime.cpu import allowed_threads, detect_cpu
from runtime.memory import resident_share
from runtime.prepack import PrepackCache, PrepackKey
from runtime.session import ONNXRUNTIME
from runtime.subject import Subject, check_text, load_subject
from runtime.tuner import Tuner, in_turns
from runtime.version import open_version, weights_bytes
from runtime.ways import Figure, kernel_ways, remedies, usual
from wire.errors import AmperageError
from wire.manifest import GraphConfig, VersionDocument
from wire.serving import ExecutionOptions, ProbeReport, ProbeVerdict

GIB = 1 << 30
PACKING_FACTOR = 12
"""Address space per byte of weights: the map, 8-bit weights, the packed copy, its making, and the arena's doubling,
twice over."""
THREAD_BYTES = 16 << 20
TUNING_S = 60.0
USED_SHARE = 0.5
"""Least share of the mapped files that is in memory after the golden vectors ran, if the kernels read packed weights
from there: what stays out are the weights as they were, and rows of the embedding that nobody asked for."""
NICENESS = 5

_MEMORY_SIGNS = ("bad_alloc", "failed to allocate", "cannot allocate memory", "memoryerror", "out of memory")


@dataclass(frozen=True, slots=True)
class Foreign:
    """An execution provider to be tried beside `base`: a built-in one, or that of a plug-in library."""

    base: ExecutionOptions
    provider: str | None = None
    library: str | None = None


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
    tuning_s: float = TUNING_S
    """How long other ways to run it may be tried."""
    foreign: Foreign | None = None
    """Only this is tried."""


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
    threads, until_s = allowed_threads(orders.threads), time.perf_counter() + orders.tuning_s
    document, _ = open_version(orders.candidate, _digest_name(orders.candidate))
    confine(orders.memory_bytes or _memory_bound(orders, document, threads))
    check_text(orders.candidate, document)
    if orders.foreign is not None:
        return _try_provider(orders.candidate, document, orders.foreign)
    cpu = detect_cpu()
    tuner = Tuner(partial(load_subject, orders.candidate, document, usual(cpu, threads)), until_s)
    if tuner.judged.fault and not tuner.remedy(remedies(cpu)):
        return _report(ProbeVerdict.GOLDEN_MISMATCH, tuner)
    for way in kernel_ways(cpu):
        tuner.attempt(way)
    tuner.attempt_threads()
    for ways in tuner.best.reading_ways(apart=orders.reading_session):
        any(tuner.attempt(way) for way in ways)
    tuner.attempt_shorter_pieces()
    kept = _packed(orders, tuner)
    incumbent = _incumbent(orders, tuner.best.options)
    speeds = in_turns([tuner.best, *([incumbent] if incumbent else [])], Figure.DECODE)
    return _report(ProbeVerdict.PASSED, tuner).model_copy(
        update={
            "tokens_per_s": speeds[0][0], "incumbent_tokens_per_s": speeds[1][0] if incumbent else None,
            "options": tuner.best.options, **kept,
        }
    )  # fmt: skip


def _try_provider(directory: Path, document: VersionDocument, foreign: Foreign) -> ProbeReport:
    """Another execution provider beside the best way on the CPU; the options of the report are the faster one's."""
    tuner = Tuner(partial(load_subject, directory, document, foreign.base), math.inf)
    if tuner.judged.fault:
        return _report(ProbeVerdict.GOLDEN_MISMATCH, tuner)
    tuner.attempt_provider(foreign.provider, foreign.library)
    speed, _ = in_turns([tuner.best], Figure.DECODE)[0]
    report = _report(ProbeVerdict.PASSED, tuner)
    return report.model_copy(update={"tokens_per_s": speed, "options": tuner.best.options})


def _report(verdict: ProbeVerdict, tuner: Tuner) -> ProbeReport:
    judged = tuner.judged
    return ProbeReport(
        verdict=verdict, detail=judged.fault, golden_rows=judged.rows, golden_error=judged.worst_error,
        golden_tolerance=judged.tolerance, top1_agreement=judged.top1_agreement, load_s=tuner.load_s,
        trials=tuner.trials,
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


def _packed(orders: Orders, tuner: Tuner) -> dict[str, object]:
    """Have the best way run over packed weights in files; returns what the report says of them.

    They get their name only after the golden vectors passed from them, and from them indeed: onnxruntime packs onto the
    heap, without a word, what does not fit its kernels.
    """
    if orders.cache is None or isinstance(tuner.best.document.config, GraphConfig):
        return {}  # kernels of graphs keep their weights as they are
    best = tuner.best
    key = PrepackKey.of(best.document.decoded_digest(), str(detect_cpu()), ONNXRUNTIME, best.options)
    try:
        with PrepackCache(orders.cache).draft(key, best.directory, best.options, weights_bytes(best.document)) as draft:
            if not tuner.attempt_packed(draft.directory, lambda: _unused(draft.directory)):
                return {"prepack_detail": tuner.trials[-1].detail}
            return {"prepack": draft.commit(), "prepack_bytes": draft.size_bytes}
    except (AmperageError, MemoryError) as error:
        return {"prepack_detail": str(error)[:2000]}


def _unused(directory: Path) -> str:
    if resident_share(directory.resolve()) >= USED_SHARE:
        return ""
    return "the kernels of this onnxruntime do not read packed weights from files"


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
