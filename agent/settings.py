"""Settings of the agent: one TOML file, checked whole before anything starts."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, StringConstraints, field_validator

from agent.lifecycle import DEADLINES_S, TRANSITIONS
from host.link import Broker
from host.schedule import Schedule
from host.settings import FilePath, Settings
from wire.manifest import Name
from wire.messages import State

SOAK_MARGIN_S = 60.0


class RuntimeSockets(Settings):
    """Unix sockets of the runtime on this node."""

    public_socket: FilePath = Path("/run/amperage/inference.sock")
    admin_socket: FilePath = Path("/run/amperage/admin.sock")


class EnergySettings(Settings):
    """Where to look for power sensors, and what to assume where there are none.

    The defaults of the estimate are those of an Ampere Altra Max M128-30: 250 W of TDP over 128 cores
    (Ampere's product brief), a fifth of it when idle.
    """

    sysfs: FilePath = Path("/sys")
    sample_interval_s: Annotated[float, Field(ge=0.05, le=10)] = 0.2
    estimate_idle_w_per_core: Annotated[float, Field(ge=0)] = 0.4
    estimate_busy_w_per_core: Annotated[float, Field(ge=0)] = 1.95


class Bandwidth(Schedule):
    """`[bandwidth]`: what of the link frames may use, beyond the cap."""

    busy_limit_bytes_per_s: Annotated[int, Field(ge=0)] | None = None
    """While inference is busy; 0 pauses, absent: inference does not matter."""


class AgentSettings(Settings):
    """`agent.toml`."""

    node: Name
    store: FilePath
    trust: FilePath
    broker: Broker
    root: Annotated[str, StringConstraints(pattern=r"^[^+#/]+(/[^+#/]+)*$", strict=True)] = "amperage"
    runtime: RuntimeSockets = RuntimeSockets()
    bandwidth_limit_bytes_per_s: Annotated[int, Field(ge=0)] = 0
    """Outside the hours of `bandwidth`; 0 means no limit."""
    bandwidth: Bandwidth = Bandwidth()
    soak_s: Annotated[float, Field(ge=0, le=86_400)] = 60.0
    telemetry_interval_s: Annotated[float, Field(ge=0.5, le=3600)] = 30.0
    telemetry_idle_interval_s: Annotated[float, Field(ge=0.5, le=86_400)] = 900.0
    """While no request comes and nothing is fetched."""
    outbox_limit: Annotated[int, Field(ge=100, le=1_000_000)] = 5000
    """Reports kept while nobody acknowledges; the oldest go first and the gap is declared."""
    disk_reserve_bytes: Annotated[int, Field(ge=0)] = 64 * 1024 * 1024
    disk: Literal["normal", "small"] = "normal"
    """On a small disk no packed weights are kept: each version takes its own size and no more, and its weights are
    packed onto the heap at every load."""
    energy: EnergySettings = EnergySettings()
    deadlines: dict[str, Annotated[float, Field(gt=0)]] = {}
    """Seconds by state; what is absent is the default of agent/lifecycle.py."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @field_validator("deadlines")
    @classmethod
    def _check_states(cls, deadlines: dict[str, float]) -> dict[str, float]:
        working = {state.value for state, outcomes in TRANSITIONS.items() if outcomes}
        if unknown := set(deadlines) - working:
            raise ValueError(f"no such state: {', '.join(sorted(unknown))}; there are {', '.join(sorted(working))}")
        return deadlines

    def deadline_s(self, state: State) -> float:
        """Seconds that one attempt in `state` may take."""
        default = DEADLINES_S[state]
        if state is State.SOAKING:
            default = max(default, self.soak_s + SOAK_MARGIN_S)
        return self.deadlines.get(state.value, default)
