"""Which CPU it is and how many threads are allowed, from trees that look like /proc and /sys."""

import os
from pathlib import Path

import pytest

from runtime.cpu import allowed_threads, cgroup_quota, detect_cpu
from scripts.arm_cpuinfo import cpuinfo

ALTRA_HWCAP = ((1 << 10) | (1 << 20), 0)
AMPERE_ONE_HWCAP = ((1 << 10) | (1 << 20), (1 << 13) | (1 << 14))
N1 = "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp ssbs"
AMPERE_ONE = (
    "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm jscvt fcma lrcpc dcpop sha3 "
    "asimddp sha512 asimdfhm dit uscat ilrcpc flagm ssbs sb dcpodp flagm2 frint i8mm bf16 rng bti ecv"
)


def arm_cpuinfo(implementer: str, variant: str, part: str, revision: int, features: str, processors: int = 2) -> str:
    """/proc/cpuinfo as c_show of Linux arch/arm64/kernel/cpuinfo.c prints it."""
    return "".join(
        f"processor\t: {number}\nBogoMIPS\t: 50.00\nFeatures\t: {features}\nCPU implementer\t: {implementer}\n"
        f"CPU architecture: 8\nCPU variant\t: {variant}\nCPU part\t: {part}\nCPU revision\t: {revision}\n\n"
        for number in range(processors)
    )


ALTRA = arm_cpuinfo("0x41", "0x3", "0xd0c", 1, N1, 80)
XEON = (
    "processor\t: 0\nvendor_id\t: GenuineIntel\ncpu family\t: 6\nmodel\t\t: 207\nmodel name\t: Some Xeon\n"
    "flags\t\t: fpu avx2 avx512_vnni\n\n"
)


def place(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("cpuinfo", "hwcap", "expected"),
    [
        (ALTRA, ALTRA_HWCAP, "aarch64 neoverse-n1 asimdhp,asimddp"),
        (arm_cpuinfo("0xc0", "0x0", "0xac3", 0, AMPERE_ONE), AMPERE_ONE_HWCAP,
         "aarch64 ampere-1 asimdhp,asimddp,i8mm,bf16"),
        (arm_cpuinfo("0xc0", "0x0", "0xac4", 1, AMPERE_ONE), AMPERE_ONE_HWCAP,
         "aarch64 ampere-1a asimdhp,asimddp,i8mm,bf16"),
        (arm_cpuinfo("0x41", "0x0", "0xd4f", 1, f"{AMPERE_ONE} sve sve2"),
         (ALTRA_HWCAP[0] | 1 << 22, AMPERE_ONE_HWCAP[1] | 1 << 1),
         "aarch64 neoverse-v2 asimdhp,asimddp,sve,sve2,i8mm,bf16"),
        (arm_cpuinfo("0x41", "0x0", "0xd08", 3, "fp asimd evtstrm crc32 cpuid"), (0, 0),
         "aarch64 arm-0x41-0xd08 baseline"),
        (arm_cpuinfo("0x00", "0x0", "0x051", 0, "fp asimd"), (0, 1 << 23 | 1 << 37), "aarch64 qemu-max sme,sme2"),
    ],
    ids=["altra", "ampereone", "ampereone-m", "grace", "raspberry-pi-4", "qemu"],
)  # fmt: skip
def test_arm_core_is_named_by_its_part_and_hwcap(
    tmp_path: Path, cpuinfo: str, hwcap: tuple[int, int], expected: str
) -> None:
    assert str(detect_cpu(place(tmp_path, {"proc/cpuinfo": cpuinfo}), "aarch64", hwcap)) == expected


def test_features_are_those_of_the_process_and_not_of_the_text(tmp_path: Path) -> None:
    root = place(tmp_path, {"proc/cpuinfo": ALTRA})
    assert detect_cpu(root, "aarch64", AMPERE_ONE_HWCAP).features == ("asimdhp", "asimddp", "i8mm", "bf16")


def test_arm_without_cpuinfo_is_still_described(tmp_path: Path) -> None:
    assert str(detect_cpu(tmp_path, "aarch64", ALTRA_HWCAP)) == "aarch64 arm asimdhp,asimddp"


def test_arm_process_that_sees_the_cpuinfo_of_an_x86_is_called_emulated(tmp_path: Path) -> None:
    root = place(tmp_path, {"proc/cpuinfo": XEON})
    assert str(detect_cpu(root, "aarch64", ALTRA_HWCAP)) == "aarch64 emulated asimdhp,asimddp"


def test_x86_is_named_by_family_model_and_flags(tmp_path: Path) -> None:
    assert str(detect_cpu(place(tmp_path, {"proc/cpuinfo": XEON}), "x86_64")) == (
        "x86_64 family-6-model-207 avx2,avx512_vnni"
    )


def test_cpuinfo_of_an_emulated_core_is_read_like_the_one_of_linux(tmp_path: Path) -> None:
    root = place(tmp_path, {"proc/cpuinfo": cpuinfo(80, 0x413FD0C1, ("asimdhp", "asimddp"))})
    assert str(detect_cpu(root, "aarch64", ALTRA_HWCAP)) == "aarch64 neoverse-n1 asimdhp,asimddp"
    shown, linux = (text.splitlines() for text in ((root / "proc/cpuinfo").read_text(), ALTRA))
    assert [line for line in shown if "Features" not in line] == [line for line in linux if "Features" not in line]


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
