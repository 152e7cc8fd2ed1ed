"""The parent's side of a probe: start the child, bound it, and name how it ended.

Invariants: the child is a session of its own and is killed whole when it is over its time or nobody waits for it; what
it writes is read up to a bound; every way to end is a verdict.
"""

import asyncio
import os
import signal
import sys
import time
from asyncio.subprocess import DEVNULL, PIPE, Process
from contextlib import suppress
from pathlib import Path

from host.files import read_bounded
from runtime.candidate import looks_like_memory
from runtime.cores import core_groups, cores_text, group_threads, own_cores
from runtime.cpu import detect_cpu
from runtime.providers import built_in
from runtime.session import ONNXRUNTIME
from runtime.settings import RuntimeSettings
from wire.documents import encode_document, parse_document
from wire.errors import ArtifactError, StoreError
from wire.serving import ExecutionOptions, ProbeReport, ProbeRequest, ProbeVerdict, Trial, TrialOutcome

TUNING_S, TUNING_SHARE = 60.0, 0.5
"""How long other ways may be tried: at most, and of the time that the probe has."""
PROVIDER_S, PROVIDER_FACTOR = 5.0, 2.0
"""How long the trial of a provider may take: to load a library, and of the time that all ways of the CPU took."""
REPORT_LIMIT_BYTES = 64 * 1024
ERROR_TAIL_BYTES = 1200
_KEPT_VARIABLES = ("PATH", "HOME", "LANG", "LD_LIBRARY_PATH", "PYTHONPATH", "TMPDIR", "QEMU_CPU")


async def run_probe(
    versions: Path, request: ProbeRequest, settings: RuntimeSettings, tuning_s: float = TUNING_S
) -> ProbeReport:
    """Probe a candidate in a child; `versions` holds the version directories. Cancelling it kills the child.

    Other execution providers than the CPU's are tried after that, each in a child of its own, whose end is a row of the
    report and no more.
    """
    groups = core_groups(settings.core_groups, own_cores())
    threads = group_threads(settings.threads, groups[0], len(groups))
    command = [
        sys.executable, "-P", "-m", "runtime.main", "probe", "--candidate", str(versions / request.candidate),
        "--threads", str(threads), "--cores", cores_text(groups[0]), "--memory-bytes", str(settings.probe_memory_bytes),
    ]  # fmt: skip
    began_s = time.monotonic()
    tuning = ["--tuning-s", str(min(tuning_s, TUNING_SHARE * request.timeout_s))]
    report = await _run_child([*command, *tuning, *_wishes(versions, request, settings)], request.timeout_s)
    took_s = time.monotonic() - began_s
    for name, arguments in _foreign(settings):
        if report.verdict is ProbeVerdict.PASSED and report.options is not None:
            base = ["--base", encode_document(report.options).decode()]
            left_s = began_s + request.timeout_s - time.monotonic()
            limit_s = max(0.0, min(left_s, PROVIDER_S + PROVIDER_FACTOR * took_s))
            report = with_provider(report, name, await _run_child([*command, *base, *arguments], limit_s))
    return report


def with_provider(report: ProbeReport, name: str, trial: ProbeReport) -> ProbeReport:
    """`report` with what the child found that tried the provider `name`."""
    if report.options is None or trial.verdict is not ProbeVerdict.PASSED or trial.options is None:
        options = report.options or ExecutionOptions(threads=1)
        detail = f"{trial.verdict}: {trial.detail}"[:300]
        row = Trial(name=name, options=options, outcome=TrialOutcome.FAILED, detail=detail)
        return report.model_copy(update={"trials": (*report.trials, row)})
    row = trial.trials[-1]
    if trial.options == report.options:
        return report.model_copy(update={"trials": (*report.trials, row)})
    beaten = tuple(
        other.model_copy(update={"outcome": TrialOutcome.BEATEN}) if other.outcome is TrialOutcome.CHOSEN else other
        for other in report.trials
    )
    return report.model_copy(
        update={
            "trials": (*beaten, row), "options": trial.options, "tokens_per_s": trial.tokens_per_s,
            "golden_error": trial.golden_error, "top1_agreement": trial.top1_agreement, "prepack": None,
            "prepack_bytes": None, "prepack_detail": f"{name} keeps weights in its own way",
        }
    )  # fmt: skip


def _wishes(versions: Path, request: ProbeRequest, settings: RuntimeSettings) -> list[str]:
    arguments = []
    if not settings.reading_session:
        arguments += ["--one-session"]
    if settings.cache is not None and request.prepack:
        arguments += ["--cache", str(settings.cache)]
    if request.incumbent is not None:
        arguments += ["--incumbent", str(versions / request.incumbent)]
    return arguments


def _foreign(settings: RuntimeSettings) -> list[tuple[str, list[str]]]:
    """What to try beside the CPU's provider: how a row calls it, and the arguments by which a child does."""
    providers = built_in() if settings.providers is None else settings.providers
    return [
        *((f"provider {name}", ["--provider", name]) for name in providers),
        *((f"library {name}", ["--library", f"{name}={path}"]) for name, path in settings.provider_libraries.items()),
    ]


async def _run_child(command: list[str], timeout_s: float) -> ProbeReport:
    kills_before = _oom_kills()
    child = await asyncio.create_subprocess_exec(
        *command, stdin=DEVNULL, stdout=PIPE, stderr=PIPE, env=_environment(), start_new_session=True
    )
    try:
        async with asyncio.timeout(timeout_s):
            output, errors, _ = await asyncio.gather(_head(child), _tail(child), child.wait())
    except TimeoutError:
        return _verdict(ProbeVerdict.TIMEOUT, f"the probe did not end within {timeout_s:g} s")
    finally:
        await _kill(child)
    return _judge(child.returncode or 0, output, errors, killed_for_memory=_oom_kills() > kills_before)


def _judge(status: int, output: bytes, errors: str, *, killed_for_memory: bool) -> ProbeReport:
    """What exit status, output and complaints of a child that ended by itself mean."""
    if status == 0:
        try:
            return parse_document(ProbeReport, output, limit_bytes=REPORT_LIMIT_BYTES)
        except ArtifactError as error:
            return _verdict(ProbeVerdict.CRASHED, f"the probe gave no report: {error.message}", errors)
    if (status == -signal.SIGKILL and killed_for_memory) or looks_like_memory(errors):
        return _verdict(ProbeVerdict.OUT_OF_MEMORY, "the probe ran out of memory", errors)
    if status < 0:
        return _verdict(ProbeVerdict.CRASHED, f"the probe was ended by {signal.Signals(-status).name}", errors)
    return _verdict(ProbeVerdict.CRASHED, f"the probe ended with status {status}", errors)


def _verdict(verdict: ProbeVerdict, detail: str, errors: str = "") -> ProbeReport:
    text = f"{detail}: {errors.strip()}" if errors.strip() else detail
    return ProbeReport(verdict=verdict, detail=text[:2000], cpu=str(detect_cpu()), onnxruntime=ONNXRUNTIME)


async def _head(child: Process) -> bytes:
    """The child's stdout up to one byte over the limit; the rest is thrown away so that it cannot block."""
    assert child.stdout is not None  # noqa: S101  it was started with a pipe
    kept = b""
    while piece := await child.stdout.read(REPORT_LIMIT_BYTES):
        kept = (kept + piece)[: REPORT_LIMIT_BYTES + 1]
    return kept


async def _tail(child: Process) -> str:
    """The end of the child's stderr."""
    assert child.stderr is not None  # noqa: S101  it was started with a pipe
    kept = b""
    while piece := await child.stderr.read(REPORT_LIMIT_BYTES):
        kept = (kept + piece)[-ERROR_TAIL_BYTES:]
    return kept.decode(errors="replace")


async def _kill(child: Process) -> None:
    """End the child's whole session unless it has ended, and wait for it."""
    if child.returncode is None:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        await child.wait()


def _environment() -> dict[str, str]:
    """Little is inherited: above all no socket, watchdog or notification address of systemd."""
    kept = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    return kept | {"ORT_DISABLE_TELEMETRY": "1", "MALLOC_ARENA_MAX": "2", "PYTHONUNBUFFERED": "1"}


def _oom_kills() -> int:
    """Processes that the kernel has killed for memory since boot (proc(5), /proc/vmstat)."""
    try:
        rows = read_bounded(Path("/proc/vmstat"), 1 << 20).decode().splitlines()
    except (FileNotFoundError, StoreError):
        return 0
    return next((int(row.split()[1]) for row in rows if row.startswith("oom_kill ")), 0)
