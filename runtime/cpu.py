"""Which CPU this is, and how many threads a model may use on it.

The description names what kernels depend on (core and instruction set features), never how many cores there are: it
keys options and caches, which stay right when a container gets another quota. `root` is for tests.
"""

import ctypes
import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

from runtime.cgroup import groups_of, read_text

ARM_CORES = {
    ("0x41", "0xd0c"): "neoverse-n1",  # Ampere Altra, Altra Max
    ("0x41", "0xd49"): "neoverse-n2",
    ("0x41", "0xd40"): "neoverse-v1",
    ("0x41", "0xd4f"): "neoverse-v2",
    ("0xc0", "0xac3"): "ampere-1",  # AmpereOne
    ("0xc0", "0xac4"): "ampere-1a",  # AmpereOne M
    ("0xc0", "0xac5"): "ampere-1b",
    ("0x00", "0x051"): "qemu-max",  # implementer 0 is reserved for software; QEMU target/arm/tcg/cpu64.c
}
"""(implementer, part) of /proc/cpuinfo; Linux arch/arm64/include/asm/cputype.h."""

EMULATED = "emulated"
"""The core of an Arm process whose /proc/cpuinfo names none: older qemu-user shows it that of the machine below."""

_AT_HWCAP, _AT_HWCAP2 = 16, 26
_HWCAP = {"asimdhp": 1 << 10, "asimddp": 1 << 20, "sve": 1 << 22}
_HWCAP2 = {"sve2": 1 << 1, "i8mm": 1 << 13, "bf16": 1 << 14, "sme": 1 << 23, "sme2": 1 << 37}
"""Linux arch/arm64/include/uapi/asm/hwcap.h."""

_X86_FEATURES = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8")


@dataclass(frozen=True, slots=True)
class Cpu:
    """A kind of CPU. `core` is a value of ARM_CORES, `arm-<implementer>-<part>`, EMULATED, `arm` when nothing is known,
    or the x86 family and model."""

    machine: str
    core: str
    features: tuple[str, ...]

    def __str__(self) -> str:
        return " ".join((self.machine, self.core, ",".join(self.features) or "baseline"))


def detect_cpu(root: Path = Path("/"), machine: str | None = None, hwcap: tuple[int, int] | None = None) -> Cpu:
    """The CPU that this process runs on. `hwcap` is (AT_HWCAP, AT_HWCAP2), from the auxiliary vector by default."""
    machine = machine or platform.machine()
    cpuinfo = read_text(root / "proc/cpuinfo")
    if machine in ("aarch64", "arm64"):
        return Cpu("aarch64", _arm_core(cpuinfo), _arm_features(hwcap or _auxiliary()))
    flags = set(_field(cpuinfo, "flags").split())
    core = "-".join(filter(None, ("family", _field(cpuinfo, "cpu family"), "model", _field(cpuinfo, "model"))))
    return Cpu(machine, core, tuple(name for name in _X86_FEATURES if name in flags))


def allowed_threads(setting: int = 0, root: Path = Path("/")) -> int:
    """min(affinity, floor of the cgroup quota, setting), at least 1; a `setting` of 0 does not bound.

    Affinity alone lies in a container: with `--cpus 4` the mask still shows every core, and more threads than quota
    cost a model up to 45 times its speed (ollama issue 17916).
    """
    bounds = [len(os.sched_getaffinity(0))]
    if setting:
        bounds.append(setting)
    quota = cgroup_quota(root)
    if quota is not None:
        bounds.append(int(quota))
    return max(1, min(bounds))


def cgroup_quota(root: Path = Path("/")) -> float | None:
    """CPUs that the cgroups of this process may use, the least of all levels; None when nothing limits them."""
    quotas = [_quota_v2(group) if version == 2 else _quota_v1(group) for version, group in groups_of("cpu", root)]
    return min((quota for quota in quotas if quota is not None), default=None)


def _quota_v2(group: Path) -> float | None:
    words = read_text(group / "cpu.max").split()
    if len(words) != 2 or not all(word.isdigit() for word in words) or words[1] == "0":
        return None  # "max 100000", or a group without the controller
    return int(words[0]) / int(words[1])


def _quota_v1(group: Path) -> float | None:
    quota, period = (read_text(group / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
    if not quota.isdigit() or not period.isdigit() or period == "0":
        return None  # -1 means no limit
    return int(quota) / int(period)


def _arm_core(cpuinfo: str) -> str:
    """The first core speaks for all: servers do not mix cores."""
    implementer, part = _field(cpuinfo, "CPU implementer"), _field(cpuinfo, "CPU part")
    if not implementer or not part:
        return EMULATED if cpuinfo else "arm"
    return ARM_CORES.get((implementer, part), f"arm-{implementer}-{part}")


def _arm_features(hwcap: tuple[int, int]) -> tuple[str, ...]:
    first = [name for name, bit in _HWCAP.items() if hwcap[0] & bit]
    return tuple(first + [name for name, bit in _HWCAP2.items() if hwcap[1] & bit])


def _auxiliary() -> tuple[int, int]:
    """HWCAP of this process rather than /proc/cpuinfo's text: under emulation the text is the host's."""
    getauxval = ctypes.CDLL(None).getauxval
    getauxval.restype, getauxval.argtypes = ctypes.c_ulong, [ctypes.c_ulong]
    return int(getauxval(_AT_HWCAP)), int(getauxval(_AT_HWCAP2))


def _field(cpuinfo: str, name: str) -> str:
    found = re.search(rf"^{re.escape(name)}\s*:\s*(.*)$", cpuinfo, re.MULTILINE)
    return found[1].strip() if found else ""
