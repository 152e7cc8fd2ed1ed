"""The parent's side of a probe: start the child, bound it, and name how it ended.

Invariants: the child is a session of its own and is killed whole when it is over its time or nobody waits for it; what
it writes is read up to a bound; every way to end is a verdict.
"""

import asyncio
import os
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from contextlib import suppress
from pathlib import Path

from host.files import read_bounded
from runtime.candidate import looks_like_memory
from runtime.cores import core_groups, cores_text, group_threads, own_cores
from runtime.cpu import detect_cpu
from runtime.session import ONNXRUNTIME
from runtime.settings import RuntimeSettings
from wire.documents import parse_document
from wire.errors import ArtifactError, StoreError
from wire.serving import ProbeReport, ProbeRequest, ProbeVerdict

REPORT_LIMIT_BYTES = 64 * 1024
ERROR_TAIL_BYTES = 1200
_KEPT_VARIABLES = ("PATH", "HOME", "LANG", "LD_LIBRARY_PATH", "PYTHONPATH", "TMPDIR")


async def run_probe(versions: Path, request: ProbeRequest, settings: RuntimeSettings) -> ProbeReport:
    """Probe a candidate in a child; `versions` holds the version directories. Cancelling it kills the child."""
    groups = core_groups(settings.core_groups, own_cores())
    threads = group_threads(settings.threads, groups[0], len(groups))
    command = [
        sys.executable, "-P", "-m", "runtime.main", "probe", "--candidate", str(versions / request.candidate),
        "--threads", str(threads), "--cores", cores_text(groups[0]), "--memory-bytes", str(settings.probe_memory_bytes),
    ]  # fmt: skip
    if not settings.reading_session:
        command += ["--one-session"]
    if settings.cache is not None and request.prepack:
        command += ["--cache", str(settings.cache)]
    if request.incumbent is not None:
        command += ["--incumbent", str(versions / request.incumbent)]
    kills_before = _oom_kills()
    child = await asyncio.create_subprocess_exec(
        *command, stdin=DEVNULL, stdout=PIPE, stderr=PIPE, env=_environment(), start_new_session=True
    )
    try:
        async with asyncio.timeout(request.timeout_s):
            output, errors, _ = await asyncio.gather(_head(child), _tail(child), child.wait())
    except TimeoutError:
        return _verdict(ProbeVerdict.TIMEOUT, f"the probe did not end within {request.timeout_s:g} s")
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
