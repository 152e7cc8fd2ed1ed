"""Which core this is and how many threads may run on it.

Part numbers: Arm's MIDR_EL1 as the kernel prints it in /proc/cpuinfo (implementer 0x41 Arm, 0xc0 Ampere Computing).
Threads are min(affinity, floor of the cgroup's quota, setting): eight threads in a quota of four CPUs decode tens of
times slower than four.
"""

import os
import platform
from pathlib import Path

PARTS = {
    ("0x41", "0xd0c"): "Neoverse N1",
    ("0x41", "0xd40"): "Neoverse V1",
    ("0x41", "0xd49"): "Neoverse N2",
    ("0x41", "0xd4f"): "Neoverse V2",
    ("0xc0", "0xac3"): "Ampere-1",
    ("0xc0", "0xac4"): "Ampere-1A",
}
FEATURES = ("asimddp", "i8mm", "bf16", "sve", "asimdhp", "avx2", "avx512_vnni", "avx_vnni", "amx_int8")
"""Flags that choose kernels in onnxruntime."""


def describe_cpu(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """A stable description, for example `aarch64 Neoverse N1 [asimddp asimdhp]`: options and caches hold for one."""
    fields: dict[str, str] = {}
    try:
        for line in cpuinfo.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip().lower(), value.strip())
    except OSError:
        fields = {}
    part = PARTS.get((fields.get("cpu implementer", ""), fields.get("cpu part", "")))
    name = part or fields.get("model name") or f"generic {fields.get('cpu part', 'core')}"
    flags = set((fields.get("features") or fields.get("flags") or "").split())
    known = " ".join(feature for feature in FEATURES if feature in flags)
    return f"{platform.machine()} {name} [{known}]"


def usable_threads(setting: int = 0, cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """How many threads to compute with; `setting` 0 means no limit of its own. At least 1."""
    limits = [len(os.sched_getaffinity(0))]
    quota = cgroup_quota(cgroup)
    if quota is not None:
        limits.append(int(quota))
    if setting:
        limits.append(setting)
    return max(1, min(limits))


def cgroup_quota(root: Path) -> float | None:
    """CPUs that the cgroup allows, of version 2 (cpu.max) or 1 (cpu.cfs_quota_us); None without a limit."""
    own = _own_cgroup()
    for path in (root / own / "cpu.max", root / "cpu.max"):
        text = _read(path)
        if text and not text.startswith("max"):
            quota, period = text.split()[:2]
            return int(quota) / int(period)
    for base in (root / "cpu" / own, root / "cpu"):
        quota_us, period_us = _read(base / "cpu.cfs_quota_us"), _read(base / "cpu.cfs_period_us")
        if quota_us and period_us and int(quota_us) > 0:
            return int(quota_us) / int(period_us)
    return None


def _own_cgroup() -> str:
    for line in _read(Path("/proc/self/cgroup")).splitlines():
        if line.startswith("0::"):
            return line[3:].lstrip("/")
    return ""


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
