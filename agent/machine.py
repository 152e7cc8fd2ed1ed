"""What /proc and /sys say of this machine; every figure is None where the machine does not give it.

Read anew at every call, nothing is kept but the previous CPU counters. `root` is for tests.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from host import files
from wire.errors import StoreError

_FILE_LIMIT_BYTES = 1 << 20
_ZONES_LIMIT = 64


@dataclass(frozen=True, slots=True)
class CpuTimes:
    """Clock ticks of all cores since boot (proc(5), /proc/stat)."""

    busy: int
    total: int


@dataclass(frozen=True, slots=True)
class Machine:
    """Readings of one machine; `root` holds proc/ and sys/."""

    root: Path = Path("/")

    def cpu_times(self) -> CpuTimes | None:
        """First line of /proc/stat; idle and iowait are not busy, guest time is in user time already."""
        line = self._read("proc/stat").partition("\n")[0].split()
        if len(line) < 9 or line[0] != "cpu":
            return None
        ticks = [int(value) for value in line[1:9]]
        total = sum(ticks)
        return CpuTimes(total - ticks[3] - ticks[4], total)

    def cores(self) -> int:
        """Processors that are online."""
        return os.cpu_count() or 1

    def load_1min(self) -> float | None:
        """First figure of /proc/loadavg."""
        words = self._read("proc/loadavg").split()
        return float(words[0]) if words else None

    def memory(self) -> tuple[int | None, int | None]:
        """(available, total) bytes of /proc/meminfo."""
        rows = dict(re.findall(r"^(\w+):\s+(\d+) kB", self._read("proc/meminfo"), re.MULTILINE))
        available, total = rows.get("MemAvailable"), rows.get("MemTotal")
        return (int(available) * 1024 if available else None, int(total) * 1024 if total else None)

    def memory_pressure_10s(self) -> float | None:
        """`some avg10` of /proc/pressure/memory, per cent."""
        found = re.search(r"^some avg10=([\d.]+)", self._read("proc/pressure/memory"), re.MULTILINE)
        return float(found[1]) if found else None

    def temperature_c(self) -> float | None:
        """Hottest thermal zone; a zone that reads 0 or nonsense is not counted."""
        zones = sorted((self.root / "sys/class/thermal").glob("thermal_zone*/temp"))[:_ZONES_LIMIT]
        readings = [self._read(str(zone.relative_to(self.root))).strip() for zone in zones]
        degrees = [int(text) / 1000 for text in readings if re.fullmatch(r"-?\d+", text)]
        return max((value for value in degrees if value != 0 and -50 < value < 150), default=None)

    def pss_bytes(self, pid: int) -> int | None:
        """Proportional set size of a process; None when it is gone or another user's."""
        found = re.search(r"^Pss:\s+(\d+) kB", self._read(f"proc/{pid}/smaps_rollup"), re.MULTILINE)
        return int(found[1]) * 1024 if found else None

    def cpu_features(self) -> frozenset[str]:
        """`Features` (Arm) or `flags` (x86) of the first core in /proc/cpuinfo."""
        found = re.search(r"^(?:Features|flags)\s*:\s*(.*)$", self._read("proc/cpuinfo"), re.MULTILINE)
        return frozenset(found[1].split()) if found else frozenset()

    def _read(self, path: str) -> str:
        try:
            return files.read_bounded(self.root / path, _FILE_LIMIT_BYTES).decode(errors="replace")
        except (FileNotFoundError, StoreError):
            return ""
