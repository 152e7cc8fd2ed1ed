"""From a whole version to one that serves for good: probe, order, activate, soak, or put the old one back.

On the engine's thread. Invariant: serving.json names the old version or the new one, whole, at every instant, and what
served before is in the journal before the file changes.
"""

import structlog

from agent.lifecycle import Outcome
from agent.soak import Soak, expected_speed
from agent.stage import Stage
from wire.errors import AmperageError, Code, DeployError, TransferError
from wire.messages import State
from wire.serving import ModelStats, ProbeReport, ProbeRequest, ProbeVerdict, RuntimeStats, ServingModel

log = structlog.get_logger()

PROBE_TIMEOUT_MOST_S = 3600.0
PROBE_TIMEOUT_SHARE = 0.8
"""Of the state's deadline: the runtime ends a probe before the agent gives up on it."""
SOAK_POLL_S = 1.0

_PROBE_CODES = {
    ProbeVerdict.GOLDEN_MISMATCH: Code.GOLDEN_MISMATCH,
    ProbeVerdict.LOAD_FAILED: Code.LOAD_FAILED,
    ProbeVerdict.CRASHED: Code.PROBE_CRASHED,
    ProbeVerdict.TIMEOUT: Code.PROBE_TIMEOUT,
    ProbeVerdict.OUT_OF_MEMORY: Code.PROBE_OUT_OF_MEMORY,
}


class Probing(Stage):
    """Have the runtime judge the candidate beside the incumbent."""

    def start(self) -> None:
        row = self.runner.row
        served = self.ports.store.served(row.model)
        timeout_s = min(PROBE_TIMEOUT_MOST_S, PROBE_TIMEOUT_SHARE * self.ports.settings.deadline_s(State.PROBING))
        incumbent = served.decoded if served and served.decoded != row.decoded else None
        request = ProbeRequest(
            candidate=row.decoded or "", incumbent=incumbent, timeout_s=timeout_s,
            prepack=self.ports.settings.disk != "small",
        )  # fmt: skip
        self.runner.work("probe", lambda: self.ports.runtime.probe(row.model, request))

    def on_result(self, result: object) -> None:
        if not isinstance(result, ProbeReport):
            raise DeployError(Code.INTERNAL, "the probe returned no report; this is a defect of the agent")
        if result.verdict is not ProbeVerdict.PASSED:
            raise DeployError(_PROBE_CODES[result.verdict], result.detail or f"the probe ended as {result.verdict}")
        if result.options is None:
            raise DeployError(Code.LOAD_FAILED, "the probe passed without options to run with; upgrade the runtime")
        figures = {
            "golden_error": result.golden_error, "top1_agreement": result.top1_agreement,
            "tokens_per_s": result.tokens_per_s, "incumbent_tokens_per_s": result.incumbent_tokens_per_s,
            "load_s": result.load_s, "peak_rss_bytes": result.peak_rss_bytes, "prepack_bytes": result.prepack_bytes,
        }  # fmt: skip
        data = {name: value for name, value in figures.items() if value is not None}
        if result.prepack_detail:
            log.warning("weights_not_prepacked", model=self.runner.row.model, detail=result.prepack_detail)
        self.runner.advance(Outcome.PROVED, data=data, probe=result.model_dump_json(by_alias=True))


class Staged(Stage):
    """Nothing stands against activating yet: remember what serves, and order it."""

    def start(self) -> None:
        served = self.ports.store.served(self.runner.row.model)
        before = served.model_dump_json(by_alias=True) if served else None
        self.runner.advance(Outcome.ORDERED, serving_before=before)


class Activating(Stage):
    """Write serving.json, nudge the runtime."""

    def start(self) -> None:
        row, runtime = self.runner.row, self.ports.runtime
        report = ProbeReport.model_validate_json(row.probe or "{}")
        if report.options is None or row.decoded is None:
            raise DeployError(Code.LOAD_FAILED, "the journal holds no probe report of the version; order it again")
        entry = ServingModel(
            model=row.model, release=row.release, version=row.version, decoded=row.decoded, options=report.options,
            prepack=report.prepack, cpu=report.cpu, onnxruntime=report.onnxruntime,
        )  # fmt: skip
        before = self.runner.served_before()

        def load() -> ModelStats | None:
            stats = _stats_of(runtime.stats(), before.decoded) if before else None
            runtime.load(row.model)
            return stats

        self.ports.store.serve(row.model, entry)
        self.runner.work("load", load)

    def on_result(self, result: object) -> None:
        report = ProbeReport.model_validate_json(self.runner.row.probe or "{}")
        before = result if isinstance(result, ModelStats) else None
        self.runner.expected_tokens_per_s = expected_speed(report.tokens_per_s, before)
        self.runner.advance(Outcome.ACTIVATED)


class Soaking(Stage):
    """Watch the version serve for a while."""

    def start(self) -> None:
        row = self.runner.row
        now_s = self.ports.clock.monotonic_s()
        expected = self.runner.expected_tokens_per_s
        if expected is None:
            expected = ProbeReport.model_validate_json(row.probe or "{}").tokens_per_s
        self._soak = Soak(row.model, row.decoded or "", expected)
        self._until_s = now_s + self.ports.settings.soak_s
        self._poll()

    def on_result(self, result: object) -> None:
        fault = self._soak.judge(result) if isinstance(result, RuntimeStats) else self._soak.silence()
        self._go_on(fault, answered=True)

    def on_error(self, error: AmperageError) -> bool:
        if error.code is not Code.RUNTIME_UNREACHABLE:
            return False
        fault = self._soak.silence()
        if fault is not None:
            self.runner.fail(DeployError(Code.REGRESSION, fault))
        else:
            self._go_on(None, answered=False)
        return True

    def tick(self) -> None:
        if self._next_poll_s is not None and self.ports.clock.monotonic_s() >= self._next_poll_s:
            self._poll()

    def _poll(self) -> None:
        self._next_poll_s: float | None = None
        self.runner.work("soak", self.ports.runtime.stats)

    def _go_on(self, fault: str | None, *, answered: bool) -> None:
        if fault is not None:
            raise DeployError(Code.REGRESSION, f"{fault}; the version that served before is back")
        now_s = self.ports.clock.monotonic_s()
        if answered and now_s >= self._until_s:
            self.runner.advance(Outcome.SOAKED)
        else:
            self._next_poll_s = now_s + min(SOAK_POLL_S, max(self._until_s - now_s, 0.05))


class Undoing(Stage):
    """Put back what served before; the row's reason says why."""

    def start(self) -> None:
        row, runtime = self.runner.row, self.ports.runtime
        before = self.runner.served_before()
        self.ports.store.serve(row.model, before)
        nudge = runtime.load if before else runtime.unload
        self.runner.work("undo", lambda: nudge(row.model))

    def on_result(self, result: object) -> None:
        del result
        self.runner.finish_undo()

    def on_error(self, error: AmperageError) -> bool:
        if isinstance(error, TransferError):
            return False
        self.runner.finish_undo()  # the runtime refused; serving.json is right and is what it reads at its next start
        return True

    def overdue(self, trouble: AmperageError | None) -> None:
        """Nobody answers the nudge; once the file is right, that is all that can be done."""
        del trouble
        self.ports.store.serve(self.runner.row.model, self.runner.served_before())
        self.runner.finish_undo()


def _stats_of(stats: RuntimeStats, decoded: str) -> ModelStats | None:
    return next((row for row in stats.models if row.decoded == decoded), None)
