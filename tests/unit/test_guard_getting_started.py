"""The guide's commands work as they stand in it."""

import contextlib
import os
import re
import signal
import socket
import subprocess
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]
GUIDE = PROJECT / "docs" / "getting-started.md"
TIMEOUT_S = 180.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.e2e
def test_commands_of_the_guide_lead_to_tokens(tmp_path: Path) -> None:
    blocks = re.findall(r"^```bash\n(.*?)^```", GUIDE.read_text(), re.MULTILINE | re.DOTALL)
    script = "set -euo pipefail\n" + "\n".join(blocks)
    script = script.replace("18830", str(free_port()))
    process = subprocess.Popen(
        ["bash", "-c", script], cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True, env={**os.environ, "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    try:
        said, _ = process.communicate(timeout=TIMEOUT_S)
    finally:
        # whatever the script started and could not stop
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert process.returncode == 0, said[-4000:]
    assert "succeeded" in said
    assert "serves tales 1.0" in said
    assert '"object":"text_completion"' in said.replace(" ", "")


def test_guide_and_start_pages_link_to_files_that_exist() -> None:
    pages = [PROJECT / name for name in ("README.md", "README.zh-CN.md", "ARCHITECTURE.md", "CONTRIBUTING.md")]
    pages += sorted((PROJECT / "docs").rglob("*.md"))
    for page in pages:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
            if "://" not in target and not target.endswith(".svg"):  # pictures are made from a run of the demo
                assert (page.parent / target).exists(), f"{page.relative_to(PROJECT)} links to {target}"
