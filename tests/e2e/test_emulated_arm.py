"""scripts/test-arm: codec, runtime and probe on emulated Arm, and what a killed run leaves behind."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from runtime_fixtures import PROJECT, wait_for

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(platform.machine() == "aarch64", reason="on Arm the same tests run without an emulator"),
]
COMMAND = PROJECT / "scripts" / "test-arm"
MARKER = "emulated and waiting to be killed"


def command_lines() -> list[bytes]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_bytes())
        except OSError:
            continue  # it ended meanwhile
    return found


def test_codec_runtime_and_probe_hold_on_emulated_arm() -> None:
    done = subprocess.run([COMMAND, "-q"], cwd=PROJECT, timeout=3600, check=False)
    assert done.returncode == 0


@pytest.mark.parametrize("arguments", [["tests/arm", "-k", "nothing"], ["--python", "-c", "raise SystemExit(3)"]])
def test_what_fails_inside_fails_the_run(arguments: list[str]) -> None:
    done = subprocess.run([COMMAND, "--cpu", "neoverse-n1", *arguments], cwd=PROJECT, timeout=600, check=False)
    assert done.returncode in (1, 3)


def test_killed_run_leaves_no_process_mount_or_registration() -> None:
    program = f"import time; print({MARKER!r}, flush=True); time.sleep(600)"
    with subprocess.Popen([COMMAND, "--cpu", "neoverse-n1", "--python", "-c", program], stdout=subprocess.PIPE) as run:
        assert run.stdout is not None
        assert MARKER.encode() in run.stdout.readline()
        assert any(MARKER.encode() in line for line in command_lines())
        run.kill()
    wait_for("the end of the emulated process", lambda: not any(MARKER.encode() in line for line in command_lines()))
    assert "arm64/root" not in Path("/proc/self/mountinfo").read_text()
    registrations = Path("/proc/sys/fs/binfmt_misc")
    assert not list(registrations.glob("amperage-arm64-*"))
