"""Proving a version before it serves: a child process, started by exec, that may crash, hang or exhaust its memory.

The parent only ever sees an exit status and one bounded JSON document. The child judges the candidate by its golden
vectors and measures it alternating with the version that serves, so that both feel the same noise.
"""

import math
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime as ort

from runtime.cpu import describe_cpu, usable_threads
from runtime.model import Decoder
from runtime.registry import VERSIONS
from runtime.settings import RuntimeSettings
from wire.documents import encode_document, parse_document
from wire.errors import ArtifactError, Code, DeployError
from wire.golden import GOLDEN_FILE, GOLDEN_LIMIT_BYTES, GoldenSet, GoldenVector
from wire.serving import ExecutionOptions, ProbeReport, ProbeRequest, ProbeVerdict

ANSWER_LIMIT_BYTES = 64 * 1024
OUT_OF_MEMORY_STATUS = 12  # ENOMEM, chosen by the child itself
CHILD_OOM_SCORE = "900"
"""The kernel's first choice when memory runs out (proc(5), oom_score_adj)."""
SPEED_ROUNDS = 5
SPEED_TOKENS = 48


def run_probe(settings: RuntimeSettings, order: ProbeRequest) -> ProbeReport:
    """Run the child to its end and make a verdict of whatever happened; never raises for the candidate's sake."""
    store = settings.store / VERSIONS
    command = [sys.executable, "-m", "runtime.main", "probe", "--candidate", str(store / order.candidate)]
    command += ["--threads", str(usable_threads(settings.threads)), "--memory-bytes", str(settings.probe_memory_bytes)]
    if order.incumbent is not None and (store / order.incumbent).is_dir():
        command += ["--incumbent", str(store / order.incumbent)]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        try:
            answer, complaint = child.communicate(timeout=order.timeout_s)
        except subprocess.TimeoutExpired:
            child.kill()
            child.communicate()
            return _verdict(ProbeVerdict.TIMEOUT, f"the probe did not end within {order.timeout_s:g} s")
    if child.returncode == 0 and len(answer) <= ANSWER_LIMIT_BYTES:
        try:
            return parse_document(ProbeReport, answer)
        except ArtifactError as error:
            return _verdict(ProbeVerdict.CRASHED, f"the probe's answer is not readable: {error.message}")
    return _verdict_of_death(child.returncode, complaint)


def _verdict_of_death(status: int, complaint: bytes) -> ProbeReport:
    tail = complaint[-600:].decode(errors="replace").strip()
    if status == OUT_OF_MEMORY_STATUS or b"bad_alloc" in complaint or b"MemoryError" in complaint:
        return _verdict(ProbeVerdict.OUT_OF_MEMORY, f"the probe ran out of memory: {tail}")
    if status == -signal.SIGKILL:
        return _verdict(ProbeVerdict.OUT_OF_MEMORY, "the probe was killed, as the kernel does when memory runs out")
    how = signal.Signals(-status).name if status < 0 else f"status {status}"
    return _verdict(ProbeVerdict.CRASHED, f"the probe ended with {how}: {tail}")


def _verdict(verdict: ProbeVerdict, detail: str) -> ProbeReport:
    return ProbeReport(verdict=verdict, detail=detail[:2000], cpu=describe_cpu(), onnxruntime=str(ort.__version__))


def probe_child(candidate: Path, incumbent: Path | None, threads: int, memory_bytes: int) -> int:
    """The child: judge, measure, print a ProbeReport. Its exit status is 0 whenever it could print one."""
    _be_first_to_die(memory_bytes)
    try:
        report = _judge(candidate, incumbent, threads)
    except DeployError as error:
        if "bad_alloc" in error.message:
            return OUT_OF_MEMORY_STATUS
        report = _verdict(ProbeVerdict.LOAD_FAILED, error.message)
    except MemoryError:
        return OUT_OF_MEMORY_STATUS
    sys.stdout.buffer.write(encode_document(report))
    return 0


def _be_first_to_die(memory_bytes: int) -> None:
    try:
        Path("/proc/self/oom_score_adj").write_text(CHILD_OOM_SCORE)
    except OSError:  # a sandbox may forbid it; the memory limit still holds
        sys.stderr.write("oom_score_adj cannot be set here\n")
    if memory_bytes:
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))


def _judge(candidate: Path, incumbent: Path | None, threads: int) -> ProbeReport:
    options = ExecutionOptions(threads=threads)
    started_s = time.monotonic()
    golden = _read_golden(candidate)
    longest = max(len(vector.input_ids) for vector in golden.vectors) + SPEED_TOKENS + 1
    decoder = Decoder(candidate, options, slots=1, capacity=longest)
    load_s = time.monotonic() - started_s
    errors, agreements, finite = _run_golden(decoder, golden)
    worst = max(errors)
    agreement = sum(agreements) / len(agreements)
    passed = finite and worst <= golden.tolerance and agreement >= golden.min_top1_agreement
    ours, theirs = _measure(decoder, incumbent, options, longest) if passed else (None, None)
    what = "not finite" if not finite else f"error {worst:.3f} of {golden.tolerance:.3f} allowed"
    return ProbeReport(
        verdict=ProbeVerdict.PASSED if passed else ProbeVerdict.GOLDEN_MISMATCH,
        detail=f"{len(errors)} golden rows, {what}, top-1 agreement {agreement:.2f}",
        golden_rows=len(errors),
        golden_error=worst if math.isfinite(worst) else None,
        golden_tolerance=golden.tolerance,
        top1_agreement=agreement,
        tokens_per_s=ours,
        incumbent_tokens_per_s=theirs,
        load_s=load_s,
        peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        options=options,
        cpu=describe_cpu(),
        onnxruntime=str(ort.__version__),
    )


def _read_golden(directory: Path) -> GoldenSet:
    try:
        with (directory / GOLDEN_FILE).open("rb") as source:
            data = source.read(GOLDEN_LIMIT_BYTES + 1)
        return parse_document(GoldenSet, data, limit_bytes=GOLDEN_LIMIT_BYTES)
    except (OSError, ArtifactError) as error:
        raise DeployError(
            Code.LOAD_FAILED, f"golden vectors cannot be read: {error}; release the model again"
        ) from error


def _run_golden(decoder: Decoder, golden: GoldenSet) -> tuple[list[float], list[bool], bool]:
    """(error per row, whether the argmax agrees, whether everything was finite)."""
    errors: list[float] = []
    agreements: list[bool] = []
    finite = True
    for vector in golden.vectors:
        row = decoder.prefill_whole(list(vector.input_ids))
        finite = finite and bool(np.isfinite(row).all())
        errors.append(_row_error(vector, row))
        agreements.append(int(np.argmax(row)) == vector.argmax)
    return errors, agreements, finite


def _row_error(vector: GoldenVector, row: np.ndarray[tuple[int], np.dtype[np.float32]]) -> float:
    difference = row[list(vector.columns)].astype(np.float64) - np.asarray(vector.logits)
    error = float(np.sqrt(np.mean(np.square(difference))) / vector.deviation)
    return error if math.isfinite(error) else math.inf


def _measure(
    decoder: Decoder, incumbent: Path | None, options: ExecutionOptions, capacity: int
) -> tuple[float, float | None]:
    """Median decode speed of the candidate and of the incumbent in tokens per second, alternating."""
    other = Decoder(incumbent, options, slots=1, capacity=capacity) if incumbent else None
    ours: list[float] = []
    theirs: list[float] = []
    for _ in range(SPEED_ROUNDS):
        ours.append(_speed(decoder))
        if other is not None:
            theirs.append(_speed(other))
    return float(np.median(ours)), float(np.median(theirs)) if theirs else None


def _speed(decoder: Decoder) -> float:
    started_s = time.perf_counter()
    for position in range(SPEED_TOKENS):
        decoder.decode([0], [position])
    return SPEED_TOKENS / (time.perf_counter() - started_s)
