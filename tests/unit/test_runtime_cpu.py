"""Which CPU it is and how many threads are allowed, from trees that look like /proc and /sys."""

import os
from pathlib import Path

import pytest

from runtime.cpu import allowed_threads, cgroup_quota, detect_cpu

ALTRA = "processor\t: 0\nFeatures\t: fp asimd\nCPU implementer\t: 0x41\nCPU architecture: 8\nCPU part\t: 0xd0c\n"
ALTRA_HWCAP = ((1 << 10) | (1 << 20), 0)
AMPERE_ONE_HWCAP = ((1 << 10) | (1 << 20), (1 << 13) | (1 << 14))


def place(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("implementer", "part", "hwcap", "expected"),
    [
        ("0x41", "0xd0c", ALTRA_HWCAP, "aarch64 neoverse-n1 asimdhp,asimddp"),
        ("0xc0", "0xac3", AMPERE_ONE_HWCAP, "aarch64 ampere-1 asimdhp,asimddp,i8mm,bf16"),
        ("0xc0", "0xac4", AMPERE_ONE_HWCAP, "aarch64 ampere-1a asimdhp,asimddp,i8mm,bf16"),
        ("0x51", "0x001", (0, 0), "aarch64 arm-0x51-0x001 baseline"),
    ],
)
def test_arm_core_is_named_by_its_part_and_hwcap(
    tmp_path: Path, implementer: str, part: str, hwcap: tuple[int, int], expected: str
) -> None:
    text = ALTRA.replace("0x41", implementer).replace("0xd0c", part)
    root = place(tmp_path, {"proc/cpuinfo": text})
    assert str(detect_cpu(root, "aarch64", hwcap)) == expected


def test_arm_without_cpuinfo_is_still_described(tmp_path: Path) -> None:
    assert str(detect_cpu(tmp_path, "aarch64", ALTRA_HWCAP)) == "aarch64 arm asimdhp,asimddp"


def test_x86_is_named_by_family_model_and_flags(tmp_path: Path) -> None:
    text = "cpu family\t: 6\nmodel\t\t: 207\nmodel name\t: Some Xeon\nflags\t\t: fpu avx2 avx512_vnni\n"
    assert str(detect_cpu(place(tmp_path, {"proc/cpuinfo": text}), "x86_64")) == (
        "x86_64 family-6-model-207 avx2,avx512_vnni"
    )


def test_this_machine_is_described_the_same_twice() -> None:
    assert detect_cpu() == detect_cpu()
    assert detect_cpu().core


def test_quota_of_cgroup_v2_is_the_least_of_all_levels(tmp_path: Path) -> None:
    root = place(
        tmp_path,
        {
            "proc/self/cgroup": "0::/a/b\n",
            "sys/fs/cgroup/a/b/cpu.max": "max 100000\n",
            "sys/fs/cgroup/a/cpu.max": "150000 100000\n",
            "sys/fs/cgroup/cpu.max": "800000 100000\n",
        },
    )
    assert cgroup_quota(root) == 1.5


@pytest.mark.parametrize("mount", ["cpu,cpuacct", "cpu"])
def test_quota_of_cgroup_v1_is_read_where_the_controller_is_mounted(tmp_path: Path, mount: str) -> None:
    root = place(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/other\n3:cpu,cpuacct:/box\n",
            f"sys/fs/cgroup/{mount}/box/cpu.cfs_quota_us": "400000\n",
            f"sys/fs/cgroup/{mount}/box/cpu.cfs_period_us": "100000\n",
            f"sys/fs/cgroup/{mount}/cpu.cfs_quota_us": "-1\n",
            f"sys/fs/cgroup/{mount}/cpu.cfs_period_us": "100000\n",
        },
    )
    assert cgroup_quota(root) == 4.0


def test_no_cgroup_files_mean_no_quota(tmp_path: Path) -> None:
    assert cgroup_quota(tmp_path) is None


@pytest.mark.parametrize(("quota", "expected"), [("50000", 1), ("199999", 1), ("10000000", None)])
def test_threads_are_the_quota_rounded_down_and_at_least_one(tmp_path: Path, quota: str, expected: int | None) -> None:
    root = place(tmp_path, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": f"{quota} 100000\n"})
    assert allowed_threads(0, root) == (expected or len(os.sched_getaffinity(0)))


def test_threads_obey_setting_and_affinity(tmp_path: Path) -> None:
    assert allowed_threads(1, tmp_path) == 1
    assert allowed_threads(10_000, tmp_path) == len(os.sched_getaffinity(0))
