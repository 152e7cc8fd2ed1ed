"""Proves again what serves by options or packed weights that no longer hold: other CPU, other onnxruntime, lost files.

On the engine's thread, and only while no release is on its way. Invariants: what serves goes on as it does until the
new options have passed a probe; serving.json changes only for the very entry that was probed; the same complaint of the
runtime is acted on once a day, because a probe cannot mend everything. A crash leaves the old entry or the new one, and
a runtime that was not told complains again.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import structlog

from agent.deployment import Ports
from agent.mailbox import WorkDone
from wire.errors import AmperageError, TransferError
from wire.messages import State
from wire.serving import ModelStats, ProbeReport, ProbeRequest, ProbeVerdict, ServingModel

log = structlog.get_logger()

AGAIN_S = 86_400.0


@dataclass(slots=True)
class _Underway:
    """One entry of serving.json that is proved anew; `renewed` once it is written."""

    entry: ServingModel
    complaint: str
    token: int
    renewed: ServingModel | None = None


class Renewal:
    """At most one at a time."""

    def __init__(self, ports: Ports) -> None:
        self._ports = ports
        self._underway: _Underway | None = None
        self._heard_s: dict[tuple[str, str], float] = {}
        """When which complaint about which version was acted on."""

    def consider(self, rows: Iterable[ModelStats]) -> None:
        """Begin with the first model that the runtime complains about for the first time."""
        for row in rows:
            entry = self._ports.store.served(row.model)
            serves = entry is not None and entry.decoded == row.decoded
            heard_s = self._heard_s.get((row.decoded, row.stale), float("-inf"))
            due = self._ports.clock.monotonic_s() - heard_s >= AGAIN_S
            if self._underway is None and row.stale and entry is not None and serves and due:
                self._probe(entry, row.stale)

    def take_result(self, done: WorkDone, *, may_write: bool) -> bool:
        """Take the end of a call; False when it is not ours. With a release on its way nothing is written."""
        underway = self._underway
        if underway is None or done.token != underway.token:
            return False
        self._underway = None
        if done.error is not None:
            self._failed(underway, done.error)
        elif isinstance(done.result, ProbeReport):
            self._proved(underway, done.result, may_write=may_write)
        else:
            log.info("options_renewed", model=underway.entry.model, decoded=underway.entry.decoded)
        return True

    def _probe(self, entry: ServingModel, complaint: str) -> None:
        settings = self._ports.settings
        request = ProbeRequest(
            candidate=entry.decoded, timeout_s=min(3600.0, settings.deadline_s(State.PROBING)),
            prepack=settings.disk != "small",
        )  # fmt: skip
        log.info("options_stale", model=entry.model, decoded=entry.decoded, complaint=complaint)
        self._heard_s[entry.decoded, complaint] = self._ports.clock.monotonic_s()
        token = self._ports.workshop.start("renew", lambda: self._ports.runtime.probe(entry.model, request))
        self._underway = _Underway(entry, complaint, token)

    def _proved(self, underway: _Underway, report: ProbeReport, *, may_write: bool) -> None:
        entry = underway.entry
        if report.verdict is not ProbeVerdict.PASSED or report.options is None:
            log.warning("options_not_renewed", model=entry.model, verdict=report.verdict, detail=report.detail)
            return
        if not may_write or self._ports.store.served(entry.model) != entry:
            del self._heard_s[entry.decoded, underway.complaint]
            return
        chosen = {name: getattr(report, name) for name in ("options", "prepack", "cpu", "onnxruntime")}
        renewed = entry.model_copy(update=chosen)
        self._ports.store.serve(entry.model, renewed)
        token = self._ports.workshop.start("load", lambda: self._ports.runtime.load(entry.model))
        self._underway = _Underway(entry, underway.complaint, token, renewed)

    def _failed(self, underway: _Underway, error: AmperageError) -> None:
        """A runtime that was away is asked again soon; one that refuses the new options keeps the old ones."""
        entry = underway.entry
        log.warning("options_not_renewed", model=entry.model, code=error.code, detail=error.message)
        if isinstance(error, TransferError):
            del self._heard_s[entry.decoded, underway.complaint]
        elif underway.renewed is not None and self._ports.store.served(entry.model) == underway.renewed:
            self._ports.store.serve(entry.model, entry)
