"""The commands and the programs of docs/talk-to-a-model.md work as they stand in it."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from runtime_fixtures import MODEL, PROJECT, Node, base_version, running

from runtime.bodies import BIASES, ChatRequest, CompletionRequest
from runtime.http import BODY_LIMIT_BYTES

pytestmark = pytest.mark.e2e
PAGE = (PROJECT / "docs" / "talk-to-a-model.md").read_text()
SOCKET = "/run/amperage/inference.sock"


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    with running(tmp_path_factory.mktemp("node"), base_version()) as node:
        yield node


def blocks(language: str, node: Node) -> str:
    """All blocks of one language, with the socket of this test."""
    found = re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert found
    assert SOCKET in found[0]
    return "\n".join(found).replace(SOCKET, str(node.public))


def test_commands_get_answers(node: Node) -> None:
    script = "set -euo pipefail\n" + blocks("bash", node)
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert f'"id":"{MODEL}"' in done.stdout
    assert '"object":"chat.completion"' in done.stdout
    assert done.stdout.count("data: ") > 2
    assert "data: [DONE]" in done.stdout
    refusal = json.loads(done.stdout[done.stdout.rindex('{"error"') :])
    assert refusal["error"]["code"] == "context_exceeded"


def test_programs_run_and_say_what_the_page_says(node: Node) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", blocks("python", node)], capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == f"{MODEL} 1024"
    # what is drawn without a seed may end early, or never come to a stop string
    assert any(re.fullmatch(r"(length 40|stop \d+)", line) for line in lines)
    assert any(re.search(r"['\"] (stop|length)$", line) for line in lines)
    assert sum(bool(re.match(r" +-?\d+\.\d{3} ", line)) for line in lines) == 5
    (first, second) = [line.split() for line in lines if re.fullmatch(r"\d+ \d+", line)]
    assert first[1] == "0"
    assert int(second[1]) > 100
    assert lines[-1].startswith("model_not_found ")


def test_table_of_fields_names_what_bodies_have_and_marks_what_is_no_part_of_openais() -> None:
    named = dict(re.findall(r"^\| `(\w+)`( \*)? \|", PAGE, re.MULTILINE))
    assert set(named) <= {*ChatRequest.model_fields, *CompletionRequest.model_fields}
    assert {name for name, mark in named.items() if mark} == {"top_k", "min_p", "repetition_penalty", "ignore_eos"}
    assert f"over {BODY_LIMIT_BYTES >> 20} MiB" in PAGE
    assert f"at most {BIASES:,}" in PAGE
