"""The demo is the main job: it must hold on every commit, by its own facts, which it judges from outside the agents."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]
LIMIT_S = 420  # a bound against a hang; how fast the demo is belongs to its own output


@pytest.mark.e2e
def test_demo_on_real_processes_every_step_holds(tmp_path: Path) -> None:
    facts_path = tmp_path / "facts.json"
    command = [str(Path(sys.executable).with_name("amperage")), "demo", "--json", str(facts_path)]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    said = done.stdout[-6000:] + done.stderr[-3000:]
    assert done.returncode == 0, said
    facts = json.loads(facts_path.read_text())
    assert [step["step"] for step in facts["steps"]] == [1, 2, 3, 4, 5, 6, 7, 8]
    broken = [check["claim"] for step in facts["steps"] for check in step["checks"] if not check["held"]]
    assert not broken, said
    figures = {step["step"]: step["figures"] for step in facts["steps"]}
    assert figures[4]["delta_wire_bytes"] < figures[4]["wire_bytes"] / 2
    assert figures[4]["requests"] >= 20
    assert figures[4]["failed"] == 0
    assert figures[5]["journalled_at_kill"] >= 5
    assert figures[5]["frames_seen_after_restart"] == figures[5]["missing_at_kill"] >= 10
    assert figures[5]["verified_frames_fetched_again"] == 0
    assert figures[7]["frames_refused"] == 1
