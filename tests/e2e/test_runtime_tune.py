"""`amperage-runtime tune` on a store, and a server whose chosen provider is gone."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from runtime_fixtures import MODEL, Node, base_version, running

from agent.runtime_client import RuntimeClient
from runtime.cpu import detect_cpu
from runtime.session import ONNXRUNTIME
from wire.documents import parse_document
from wire.serving import ExecutionOptions, ProbeReport, ProbeVerdict, TrialOutcome

pytestmark = pytest.mark.e2e
SAY: Any = [{"role": "user", "content": "It was late in the evening when the"}]


def tune(node: Node, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-P", "-m", "runtime.main", "tune", "--settings", str(node.settings), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def test_table_and_report_name_every_way_and_change_nothing(tmp_path: Path) -> None:
    node = Node(tmp_path)
    node.order(base_version())
    serving = (node.store / "serving.json").read_bytes()
    shown = tune(node)
    assert shown.returncode == 0, shown.stderr
    lines = shown.stdout.splitlines()
    assert str(detect_cpu()) in lines[0]
    assert "CPUExecutionProvider" in lines[0]
    ways = [line[:30].strip() for line in lines[2:]]
    assert ways[0] == "as it comes"
    assert "weights from the cache" in ways
    assert sum("chosen" in line.split()[-1] for line in lines[2:-1]) == 1

    told = tune(node, "--json", "--version", base_version().decoded[:12])
    report = parse_document(ProbeReport, told.stdout.encode())
    assert report.verdict is ProbeVerdict.PASSED
    assert [trial.outcome for trial in report.trials].count(TrialOutcome.CHOSEN) == 1
    assert all(trial.golden_error is not None for trial in report.trials)
    assert (node.store / "serving.json").read_bytes() == serving
    assert sorted(path.name for path in node.home.iterdir()) == ["runtime.toml", "store"]


def test_version_that_is_not_there_is_told(tmp_path: Path) -> None:
    node = Node(tmp_path)
    node.order(base_version())
    told = tune(node, "--model", "nobody")
    assert told.returncode != 0
    assert "model nobody" in told.stderr
    assert "--version" in told.stderr


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (ExecutionOptions(threads=1, provider="NpuExecutionProvider"), "no NpuExecutionProvider"),
        (ExecutionOptions(threads=1, provider="Npu", library="npu"), "names no provider library 'npu'"),
    ],
)
def test_provider_that_is_gone_is_served_without_and_told(tmp_path: Path, options: ExecutionOptions, why: str) -> None:
    with running(tmp_path) as node:
        node.order(base_version())
        chosen = {"options": options, "cpu": str(detect_cpu()), "onnxruntime": ONNXRUNTIME}
        node.entries[MODEL] = node.entries[MODEL].model_copy(update=chosen)
        node.write()
        client = RuntimeClient(node.admin)
        client.load(MODEL)
        assert why in client.stats().models[0].stale
        with node.client() as asker:
            reply = asker.chat.completions.create(model=MODEL, messages=SAY, max_tokens=4)
        assert reply.choices[0].finish_reason == "length"
