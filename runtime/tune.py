"""The node-side command `tune`: every way to run a version on this machine, as a table.

It runs the probe of the server in children of its own and changes nothing: what serves is chosen by the agent's probe,
which does the same. Packed weights that it makes are thrown away.
"""

import asyncio
import sys
import tempfile
from pathlib import Path

from host.files import remove_tree
from runtime.cpu import allowed_threads, detect_cpu
from runtime.probe import run_probe
from runtime.providers import CPU, built_in
from runtime.registry import read_serving
from runtime.session import ONNXRUNTIME
from runtime.settings import RuntimeSettings
from wire.documents import encode_document
from wire.errors import Code, StoreError
from wire.serving import ProbeReport, ProbeRequest, ProbeVerdict, Trial

TIMEOUT_S = 3600.0
TUNING_S = 1800.0
_SCRATCH = Path("/var/tmp")  # noqa: S108  a directory of its own is made there; packed weights may be larger than /tmp


def tune(settings: RuntimeSettings, *, model: str | None, version: str | None, as_json: bool) -> int:
    """Probe one version of the store and print what was found; exit status 1 when it is refused.

    Raises StoreError when there is no such version, and what reading serving.json raises.
    """
    decoded = _find(settings, model, version)
    if not as_json:
        sys.stderr.write(f"trying every way to run version {decoded[:12]}; each takes some seconds\n")
    with tempfile.TemporaryDirectory(prefix="amperage-tune-", dir=_SCRATCH if _SCRATCH.is_dir() else None) as home:
        mine = settings.model_copy(update={"cache": Path(home) / "cache"})
        request = ProbeRequest(candidate=decoded, timeout_s=TIMEOUT_S)
        report = asyncio.run(run_probe(settings.store / "versions", request, mine, tuning_s=TUNING_S))
        remove_tree(mine.cache or Path(home))  # what is committed there is read-only
    sys.stdout.write(encode_document(report).decode() + "\n" if as_json else table(report))
    return 0 if report.verdict is ProbeVerdict.PASSED else 1


def table(report: ProbeReport) -> str:
    """The trials of a report, with the machine that they hold for."""
    offered = ", ".join((CPU, *built_in()))
    lines = [
        f"{detect_cpu()}, {allowed_threads()} threads allowed, onnxruntime {ONNXRUNTIME} with {offered}",
        f"{'way':<30} {'decode':>9} {'read':>9} {'to best':>8} {'error':>9} {'heap':>8} {'load':>7}  outcome",
        *(_line(trial) for trial in report.trials),
    ]
    if report.options is not None:
        lines.append(f"chosen: {report.options.model_dump_json(exclude_defaults=True)}")
    if report.verdict is not ProbeVerdict.PASSED or report.prepack_detail:
        lines.append(f"{report.verdict}: {report.detail or report.prepack_detail}")
    return "\n".join((*lines, ""))


def _line(trial: Trial) -> str:
    heap = None if trial.heap_bytes is None else trial.heap_bytes / 1e6
    outcome = f"{trial.outcome}, {trial.detail}" if trial.detail else trial.outcome
    return (
        f"{trial.name:<30} {_cell(trial.tokens_per_s, '.1f'):>9} {_cell(trial.read_tokens_per_s, '.1f'):>9} "
        f"{_cell(trial.ratio, '.2f'):>8} {_cell(trial.golden_error, '.2g'):>9} {_cell(heap, '.1f'):>8} "
        f"{_cell(trial.load_s, '.2f'):>7}  {outcome}"
    )


def _cell(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _find(settings: RuntimeSettings, model: str | None, version: str | None) -> str:
    """The decoded digest that is meant."""
    if version is not None:
        found = sorted(path.name for path in (settings.store / "versions").glob(f"{version}*"))
        wanted, remedy = f"version {version}", "look into its directory versions"
    else:
        entries = read_serving(settings.store).models
        found = [entry.decoded for entry in entries if model in (None, entry.model)][:1]
        wanted, remedy = f"model {model or 'at all'}", "name a version of it with --version"
    if len(found) != 1:
        raise StoreError(Code.CORRUPT, f"{settings.store} has {len(found)} of {wanted}; {remedy}")
    return found[0]
