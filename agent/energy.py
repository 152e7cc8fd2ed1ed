"""Energy of the node from whatever it has: sensors with honest units, or an estimate that says so.

Invariants: unknown is absent, never 0; every figure carries source, method, coverage and the number of samples; what is
attributed to models and to idling adds up to the node's figure. Reads sysfs below a root that tests can set, keeps the
last sample of each channel and nothing else.

Units and traps of the sources: docs of the kernel (Documentation/hwmon/sysfs-interface, power/powercap) and, for
Ampere Altra, drivers/hwmon/xgene-hwmon.c, whose channels are microwatts and must be matched by label.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from agent.machine import CpuTimes, Machine
from agent.settings import EnergySettings
from host.files import read_bounded
from wire.errors import StoreError
from wire.messages import EnergyFigure, Method

XGENE_LABELS = ("CPU power", "IO power")
POWER_MOST_W = 10_000.0
"""Above this a reading is a sentinel: the ACPI power meter shows unknown as 4,294,967,295 mW."""
GAP_MOST_S = 5.0
"""Power between two samples further apart than this is not known."""
_NOT_THE_NODE = frozenset({"amdgpu", "nouveau", "i915", "xe", "radeon", "nvme", "ucsi_source_psy"})
"""hwmon chips whose power is of one device, not of the node."""


@dataclass(frozen=True, slots=True)
class Increment:
    """Energy since the sample before."""

    energy_j: float
    span_s: float


class Meter(Protocol):
    """One way of knowing the node's energy."""

    source: str
    method: Method

    def advance(self, now_s: float) -> Increment | None:
        """Sample; None when this sample gives no energy (the first, an unreadable or impossible one)."""
        ...


class PowerMeter:
    """Channels that give instantaneous power in microwatts, added up and integrated by the trapezoid rule."""

    method = Method.MEASURED

    def __init__(self, source: str, channels: tuple[Path, ...]) -> None:
        self.source = source
        self._channels = channels
        self._last: tuple[float, float] | None = None

    def advance(self, now_s: float) -> Increment | None:
        """See Meter.advance; one unreadable channel makes the sum unknown."""
        power_w = _sum([_power_w(channel) for channel in self._channels])
        last, self._last = self._last, None if power_w is None else (now_s, power_w)
        if last is None or power_w is None or not 0 < now_s - last[0] <= GAP_MOST_S:
            return None
        span_s = now_s - last[0]
        return Increment((power_w + last[1]) / 2 * span_s, span_s)


class CounterMeter:
    """Counters of microjoules that wrap at a known range (powercap)."""

    method = Method.MEASURED

    def __init__(self, source: str, zones: tuple[Path, ...]) -> None:
        self.source = source
        self._zones = zones
        self._last: tuple[float, list[int]] | None = None

    def advance(self, now_s: float) -> Increment | None:
        """See Meter.advance; a counter that went back has wrapped once, or was reset when it has no range."""
        readings = [_integer(zone / "energy_uj") for zone in self._zones]
        known = [reading for reading in readings if reading is not None]
        if len(known) < len(readings):
            self._last = None
            return None
        last, self._last = self._last, (now_s, known)
        if last is None or now_s <= last[0]:
            return None
        total_uj = 0
        for zone, before, now in zip(self._zones, last[1], known, strict=True):
            step_uj = now - before
            if step_uj < 0:
                step_uj += _integer(zone / "max_energy_range_uj") or 0
            if step_uj < 0:
                return None
            total_uj += step_uj
        span_s = now_s - last[0]
        energy_j = total_uj / 1e6
        return Increment(energy_j, span_s) if 0 < energy_j <= POWER_MOST_W * span_s else None


class EstimateMeter:
    """What the cores would draw by their busy time; labelled, because it is no measurement."""

    source = "estimate:busy-time"
    method = Method.ESTIMATED

    def __init__(self, settings: EnergySettings, machine: Machine) -> None:
        self._settings = settings
        self._machine = machine
        self._last: tuple[float, CpuTimes] | None = None

    def advance(self, now_s: float) -> Increment | None:
        """See Meter.advance."""
        times = self._machine.cpu_times()
        last, self._last = self._last, None if times is None else (now_s, times)
        if last is None or times is None or now_s <= last[0] or times.total <= last[1].total:
            return None
        busy = (times.busy - last[1].busy) / (times.total - last[1].total)
        idle_w, busy_w = self._settings.estimate_idle_w_per_core, self._settings.estimate_busy_w_per_core
        power_w = self._machine.cores() * (idle_w + (busy_w - idle_w) * min(max(busy, 0.0), 1.0))
        return Increment(power_w * (now_s - last[0]), now_s - last[0])


@dataclass(slots=True)
class Account:
    """Sums of one meter over one window."""

    energy_j: float = 0.0
    covered_s: float = 0.0
    samples: int = 0

    def add(self, increment: Increment | None) -> None:
        """Count a sample."""
        if increment is not None:
            self.energy_j += increment.energy_j
            self.covered_s += increment.span_s
            self.samples += 1

    def figure(self, meter: Meter, window_s: float) -> EnergyFigure | None:
        """The window's figure, None when nothing is known. Energy is of the covered part only."""
        if not self.samples or self.covered_s <= 0:
            return None
        return EnergyFigure(
            source=meter.source,
            method=meter.method,
            energy_j=self.energy_j,
            power_w=self.energy_j / self.covered_s,
            coverage=min(1.0, self.covered_s / window_s),
            samples=self.samples,
        )


class EnergySampler:
    """The best sensor of the node beside the estimate; a window without sensor samples falls back to the estimate."""

    def __init__(self, settings: EnergySettings, machine: Machine) -> None:
        sensor = find_sensor(settings.sysfs)
        estimate: Meter = EstimateMeter(settings, machine)
        self._meters = [meter for meter in (sensor, estimate) if meter is not None]
        self._accounts = [Account() for _ in self._meters]
        self.source = self._meters[0].source

    def sample(self, now_s: float) -> None:
        """Take one sample of every meter."""
        for meter, account in zip(self._meters, self._accounts, strict=True):
            account.add(meter.advance(now_s))

    def close_window(self, window_s: float) -> EnergyFigure | None:
        """The figure of the window that ends, and begin the next."""
        accounts, self._accounts = self._accounts, [Account() for _ in self._meters]
        figures = (account.figure(meter, window_s) for meter, account in zip(self._meters, accounts, strict=True))
        return next((figure for figure in figures if figure is not None), None)


def find_sensor(sysfs: Path) -> Meter | None:
    """The best measured source below `sysfs`: xgene-hwmon, RAPL packages, the ACPI power meter, other hwmon power."""
    chips = sorted((sysfs / "class/hwmon").glob("hwmon*"))
    xgene = [channel for chip in chips for channel in _labelled(chip, XGENE_LABELS)]
    if xgene:
        return PowerMeter("xgene-hwmon:" + "+".join(XGENE_LABELS), tuple(xgene))
    zones = [zone for zone in sorted((sysfs / "class/powercap").glob("*:*")) if _is_package(zone)]
    if zones:
        names = "+".join(_text(zone / "name") for zone in zones)
        return CounterMeter(f"powercap:{names}", tuple(zones))
    for chip in sorted(chips, key=lambda path: _text(path / "name") != "power_meter"):
        if _text(chip / "name") in _NOT_THE_NODE or _integer(chip / "power1_is_battery"):
            continue
        for channel in (chip / "power1_average", chip / "power1_input"):
            if _power_w(channel) is not None:
                label = _text(chip / "power1_label") or channel.name
                return PowerMeter(f"hwmon:{_text(chip / 'name')}:{label}", (channel,))
    return None


def attribute(figure: EnergyFigure, busy_s: Sequence[float], window_s: float) -> tuple[list[EnergyFigure], float]:
    """Split a window's energy by busy time: (a figure per entry, joules of idling); together they are the node's.

    Busy seconds are of each model's engine; when together they exceed the window, nothing is left for idling.
    """
    whole_s = max(window_s, sum(busy_s))
    source = f"{figure.source} by busy time"
    parts = []
    for seconds in busy_s:
        share = seconds / whole_s if whole_s > 0 else 0.0
        update = {"source": source, "energy_j": figure.energy_j * share, "power_w": figure.power_w * share}
        parts.append(figure.model_copy(update=update))
    return parts, figure.energy_j - sum(part.energy_j for part in parts)


def _labelled(chip: Path, labels: tuple[str, ...]) -> list[Path]:
    """Power channels of a chip by label; empty unless all are there and can be read."""
    found = {_text(path): path.with_name(path.name.replace("_label", "_input")) for path in chip.glob("power*_label")}
    channels = [found[label] for label in labels if label in found]
    return channels if len(channels) == len(labels) and all(_power_w(path) is not None for path in channels) else []


def _is_package(zone: Path) -> bool:
    name = _text(zone / "name")
    return name.startswith("package-") and _integer(zone / "enabled") != 0 and _integer(zone / "energy_uj") is not None


def _power_w(channel: Path) -> float | None:
    microwatts = _integer(channel)
    return microwatts / 1e6 if microwatts is not None and 0 < microwatts / 1e6 <= POWER_MOST_W else None


def _sum(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known and len(known) == len(values) else None


def _integer(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text.lstrip("-").isdigit() else None


def _text(path: Path) -> str:
    try:
        return read_bounded(path, 4096).decode(errors="replace").strip()
    except (FileNotFoundError, StoreError):
        return ""
