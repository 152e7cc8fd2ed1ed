"""The telemetry thread: samples power several times a second and closes a window of figures at every interval.

While nothing is asked of the node its windows are longer: a report every half minute that says nothing would be most of
what an idle node sends.

Writes nothing: a closed window goes to the engine, which numbers and journals it. What cannot be read is absent; a
runtime that does not answer makes a window without inference figures, not a fault.
"""

import os
import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace

from agent.energy import EnergySampler, attribute
from agent.machine import CpuTimes, Machine
from agent.mailbox import Crashed, Port
from agent.runtime_client import Runtime
from agent.settings import AgentSettings
from host.clock import Clock
from host.files import free_bytes
from wire.errors import AmperageError
from wire.messages import EnergyFigure, HealthFigures, InferenceFigures, Telemetry
from wire.serving import ModelStats, RuntimeStats

ACTIVE_LINK_BYTES = 256 * 1024
"""Received in a window by a node that is not idle: reports and acknowledgements are far less, one fetch is more."""

Totals = Callable[[], tuple[int, int, int]]


@dataclass(frozen=True, slots=True)
class Window:
    """What was measured in one interval."""

    window_s: float
    health: HealthFigures
    inference: tuple[InferenceFigures, ...]
    energy: EnergyFigure | None

    def telemetry(self, node: str, clock: Clock) -> Telemetry:
        """The report; the journal gives boot_id, seq and first."""
        return Telemetry(
            node=node, boot_id="0" * 32, seq=1, first=1, time_s=clock.wall_s(), window_s=self.window_s,
            health=self.health, inference=self.inference, energy=self.energy,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Stale:
    """Models that the runtime does not run as they were proved; it is told again as long as that is so."""

    rows: tuple[ModelStats, ...]


@dataclass(frozen=True, slots=True)
class Baseline:
    """Counters at the beginning of a window."""

    started_s: float
    cpu: CpuTimes | None = None
    link: tuple[int, int, int] = (0, 0, 0)
    models: tuple[ModelStats, ...] = ()


class Sampler:
    """The thread `energy`."""

    def __init__(
        self, settings: AgentSettings, control: Port, runtime: Runtime, clock: Clock, machine: Machine
    ) -> None:
        self._settings = settings
        self._control = control
        self._runtime = runtime
        self._clock = clock
        self._machine = machine
        self._energy = EnergySampler(settings.energy, machine)
        self._runtime_life: tuple[int, float] | None = None
        self._runtime_restarts = 0
        self._agent_restarts = 0
        self._totals: Totals = lambda: (0, 0, 0)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="energy", daemon=True)

    def start(self, totals: Totals, agent_restarts: int) -> None:
        """Begin sampling; `totals` gives the links' counters."""
        self._totals, self._agent_restarts = totals, agent_restarts
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stopping.set()
        self._thread.join(2.0)

    def _run(self) -> None:
        try:
            self._sample_for_ever()
        except BaseException as error:  # noqa: BLE001  a defect must reach the engine, not die in a thread
            self._control.put(Crashed(error))

    def _sample_for_ever(self) -> None:
        stats = self._stats()
        base = Baseline(self._clock.monotonic_s(), self._machine.cpu_times(), self._totals(),
                        stats.models if stats else ())  # fmt: skip
        due_s = base.started_s + self._settings.telemetry_interval_s
        idle_since_s = float("-inf")  # the first window is short: whoever set up the node waits for it
        while not self._stopping.wait(self._settings.energy.sample_interval_s):
            now_s = self._clock.monotonic_s()
            self._energy.sample(now_s)
            if now_s < due_s:
                continue
            due_s = now_s + self._settings.telemetry_interval_s
            stats = self._stats()
            self._tell_stale(stats)
            if now_s - idle_since_s >= self._settings.telemetry_idle_interval_s or self._is_active(base, stats):
                window, base = self._close(base, now_s, stats)
                idle_since_s = now_s
                self._tell(window)

    def _tell_stale(self, stats: RuntimeStats | None) -> None:
        rows = tuple(row for row in stats.models if row.stale) if stats else ()
        if rows:
            self._tell(Stale(rows))

    def _tell(self, message: Window | Stale) -> None:
        with suppress(queue.Full):  # the engine is far behind: one message less is the smallest harm
            self._control.put_nowait(message)

    def _is_active(self, base: Baseline, stats: RuntimeStats | None) -> bool:
        """Whether anything was asked of this node since the window began."""
        rows = window_figures(base.models, stats.models if stats else ())
        return any(row.requests for row in rows) or self._totals()[0] - base.link[0] >= ACTIVE_LINK_BYTES

    def _close(self, base: Baseline, now_s: float, stats: RuntimeStats | None) -> tuple[Window, Baseline]:
        window_s = now_s - base.started_s
        models = stats.models if stats else ()
        rows = window_figures(base.models, models)
        energy = self._energy.close_window(window_s)
        if energy is not None:
            parts, _ = attribute(energy, [row.busy_s for row in rows], window_s)
            rows = tuple(row.model_copy(update={"energy": part}) for row, part in zip(rows, parts, strict=True))
        after = replace(
            base, started_s=now_s, cpu=self._machine.cpu_times(), link=self._totals(), models=models or base.models
        )
        return Window(window_s, self._health(base, after, stats), rows, energy), after

    def _health(self, before: Baseline, after: Baseline, stats: RuntimeStats | None) -> HealthFigures:
        available, total = self._machine.memory()
        return HealthFigures(
            cpu_busy=_busy_share(before.cpu, after.cpu),
            load_1min=self._machine.load_1min(),
            memory_available_bytes=available,
            memory_total_bytes=total,
            memory_pressure_10s=self._machine.memory_pressure_10s(),
            temperature_c=self._machine.temperature_c(),
            disk_free_bytes=self._disk_free(),
            link_rx_bytes=after.link[0] - before.link[0],
            link_tx_bytes=after.link[1] - before.link[1],
            link_reconnects=max(after.link[2] - 1, 0),
            agent_restarts=self._agent_restarts,
            runtime_restarts=self._runtime_restarts,
            agent_pss_bytes=self._machine.pss_bytes(os.getpid()),
            runtime_pss_bytes=self._machine.pss_bytes(stats.pid) if stats else None,
        )

    def _disk_free(self) -> int | None:
        try:
            return free_bytes(self._settings.store)
        except (AmperageError, FileNotFoundError):
            return None

    def _stats(self) -> RuntimeStats | None:
        try:
            stats = self._runtime.stats()
        except AmperageError:
            return None
        life = (stats.pid, stats.started_s)
        if self._runtime_life is not None and life != self._runtime_life:
            self._runtime_restarts += 1
        self._runtime_life = life
        return stats


def window_figures(before: tuple[ModelStats, ...], after: tuple[ModelStats, ...]) -> tuple[InferenceFigures, ...]:
    """What each version did between two readings; a counter that went back began anew with a load."""
    earlier = {(row.model, row.decoded): row for row in before}
    return tuple(_figures(earlier.get((row.model, row.decoded)), row) for row in after)


def _figures(before: ModelStats | None, now: ModelStats) -> InferenceFigures:
    if before is None or before.requests > now.requests or before.busy_s > now.busy_s:
        before = None
    requests = now.requests - (before.requests if before else 0)
    return InferenceFigures(
        model=now.model,
        decoded=now.decoded,
        version=now.version,
        requests=requests,
        failures=max(now.failures - (before.failures if before else 0), 0),
        prompt_tokens=max(now.prompt_tokens - (before.prompt_tokens if before else 0), 0),
        completion_tokens=max(now.completion_tokens - (before.completion_tokens if before else 0), 0),
        busy_s=max(now.busy_s - (before.busy_s if before else 0.0), 0.0),
        latency_p50_s=now.latency_p50_s if requests else None,
        latency_p95_s=now.latency_p95_s if requests else None,
        first_token_p50_s=now.first_token_p50_s if requests else None,
        tokens_per_s=now.tokens_per_s if requests else None,
    )


def _busy_share(before: CpuTimes | None, after: CpuTimes | None) -> float | None:
    if before is None or after is None or after.total <= before.total:
        return None
    return min(max((after.busy - before.busy) / (after.total - before.total), 0.0), 1.0)
