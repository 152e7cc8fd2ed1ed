"""The commands and the programs of docs/talk-to-a-model.md and docs/get-embeddings.md work as they stand in them."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from encoder_fixtures import encoder_version
from runtime_fixtures import MODEL, PROJECT, Node, ask, base_version, running

from runtime.bodies import BIASES, INPUTS_LIMIT, ChatRequest, CompletionRequest, EmbeddingRequest
from runtime.http import BODY_LIMIT_BYTES

pytestmark = pytest.mark.e2e
PAGE = (PROJECT / "docs" / "talk-to-a-model.md").read_text()
EMBEDDINGS_PAGE = (PROJECT / "docs" / "get-embeddings.md").read_text()
SOCKET = "/run/amperage/inference.sock"


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    with running(tmp_path_factory.mktemp("node"), base_version()) as node:
        yield node


@pytest.fixture(scope="module")
def encoding(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    with running(tmp_path_factory.mktemp("encoding")) as node:
        node.order(encoder_version(), "minilm")
        assert ask(node.admin, "POST", "/v2/repository/models/minilm/load", {}).status == 200
        yield node


def blocks(language: str, node: Node, page: str = PAGE) -> str:
    """All blocks of one language, with the socket of this test."""
    found = re.findall(rf"^```{language}\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert found
    assert SOCKET in found[0]
    return "\n".join(found).replace(SOCKET, str(node.public))


def output_of(language: str, node: Node, page: str = PAGE) -> str:
    """What all blocks of one language print when they are run."""
    text = blocks(language, node, page)
    command = {"bash": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-W", "error", "-c"]}[language]
    done = subprocess.run([*command, text], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_commands_get_answers(node: Node) -> None:
    output = output_of("bash", node)
    assert f'"id":"{MODEL}"' in output
    assert '"object":"chat.completion"' in output
    assert output.count("data: ") > 2
    assert "data: [DONE]" in output
    refusal = json.loads(output[output.rindex('{"error"') :])
    assert refusal["error"]["code"] == "context_exceeded"


def test_programs_run_and_say_what_the_page_says(node: Node) -> None:
    lines = output_of("python", node).splitlines()
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


def test_commands_get_embeddings(encoding: Node) -> None:
    output = output_of("bash", encoding, EMBEDDINGS_PAGE)
    assert output.count('"object":"embedding"') == 2
    assert '"max_tokens":150' in output
    assert '"outputs":[{"name":"embeddings","shape":[2,64]' in output


def test_programs_get_embeddings(encoding: Node) -> None:
    lines = output_of("python", encoding, EMBEDDINGS_PAGE).splitlines()
    size, tokens = lines[0].split()
    assert size == "64"
    assert int(tokens) > 5
    assert [line.count("1.  ") or line.count("1. ]") for line in lines[1:4]] == [1, 1, 1], "each text is like itself"
    assert lines[4:] == ["12", "(2, 64)"]


def test_page_on_embeddings_has_the_bounds_of_the_api() -> None:
    assert f"up to {INPUTS_LIMIT:,} texts" in EMBEDDINGS_PAGE
    named = dict.fromkeys(re.findall(r"^\| `(\w+)` \|", EMBEDDINGS_PAGE, re.MULTILINE))
    assert {"input", "encoding_format", "dimensions"} == set(named) & set(EmbeddingRequest.model_fields)
