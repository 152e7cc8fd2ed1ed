"""A real runtime whose models rest when nobody asks: memory goes back, everything else stays as it was."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from encoder_fixtures import ENCODER, encoder_version
from runtime_fixtures import MODEL, Node, ask, base_version, running, wait_for

from wire.documents import parse_document
from wire.serving import ModelStats, RuntimeStats

pytestmark = pytest.mark.e2e
SAY: Any = [{"role": "user", "content": "It was late in the evening when the"}]


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with running(tmp_path, base_version(), extra="keep_alive_s = 0.3") as node:
        yield node


def rests(node: Node, model: str) -> int:
    return sum("model rests" in line and f'"{model}"' in line for line in node.log().splitlines())


def wait_rest(node: Node, model: str, times: int) -> None:
    wait_for(f"rest {times} of {model}", lambda: rests(node, model) >= times)


def say(node: Node) -> str | None:
    with node.client() as client:
        reply = client.chat.completions.create(model=MODEL, messages=SAY, max_tokens=20, temperature=0)
        return reply.choices[0].message.content


def stats(node: Node, model: str) -> ModelStats:
    rows = parse_document(RuntimeStats, ask(node.admin, "GET", "/v2/models/stats").body).models
    return next(row for row in rows if row.model == model)


def mapped(node: Node) -> bool:
    """Whether the process has a version's weights or their packed copy in memory."""
    assert node.process is not None
    maps = Path(f"/proc/{node.process.pid}/maps").read_text().splitlines()
    return any("/versions/" in line and ".bin" in line for line in maps)


def test_decoder_rests_and_answers_the_next_request_as_before(node: Node) -> None:
    first = say(node)
    assert mapped(node)
    wait_rest(node, MODEL, 1)
    assert not mapped(node)
    assert ask(node.public, "GET", "/health").json()["status"] == "ok"
    assert [row["id"] for row in ask(node.public, "GET", "/v1/models").json()["data"]] == [MODEL]
    assert say(node) == first
    assert mapped(node)
    assert stats(node, MODEL).requests == 2
    wait_rest(node, MODEL, 2)


def test_encoder_rests_and_answers_the_next_request_as_before(node: Node) -> None:
    node.order(encoder_version(), ENCODER)
    assert ask(node.admin, "POST", f"/v2/repository/models/{ENCODER}/load", {}).status == 200
    body = {"model": ENCODER, "input": "the node reports a state"}
    first = ask(node.public, "POST", "/v1/embeddings", body)
    assert first.status == 200
    wait_rest(node, ENCODER, 1)
    again = ask(node.public, "POST", "/v1/embeddings", body)
    assert again.json()["data"] == first.json()["data"]
    assert stats(node, ENCODER).requests == 2
    wait_rest(node, ENCODER, 2)


def test_model_that_cannot_be_loaded_again_says_so_until_it_can(node: Node) -> None:
    first = say(node)
    wait_rest(node, MODEL, 1)
    home = node.store / "versions" / base_version().decoded
    away = home.with_name("away")
    home.rename(away)
    with pytest.raises(openai.InternalServerError, match="rested and cannot be loaded again") as refusal:
        say(node)
    assert refusal.value.status_code == 503
    assert refusal.value.response.headers["retry-after"] == "5"
    assert stats(node, MODEL).failures == 1
    away.rename(home)
    assert say(node) == first


def test_resting_model_is_swapped_like_any_other(node: Node) -> None:
    wait_rest(node, MODEL, 1)
    node.order(base_version(), "other")
    assert ask(node.admin, "POST", "/v2/repository/models/other/load", {}).status == 200
    assert ask(node.admin, "POST", f"/v2/repository/models/{MODEL}/unload", {}).status == 200
    wait_rest(node, "other", 1)
    with pytest.raises(openai.NotFoundError):
        say(node)
