"""An encoder over the sockets of a real process: embeddings, refusals, clients that leave, swaps, the probe."""

import base64
import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))

from encoder_fixtures import ENCODER, check_embeddings, encoder_version, random_text, serving_both
from runtime_fixtures import MODEL, Load, Node, Version, ask, running, shuffle_tensor, wait_for

from wire.documents import parse_document
from wire.serving import ModelStats, ProbeReport, ProbeVerdict, RuntimeStats

pytestmark = pytest.mark.e2e
PATH = "/v1/embeddings"
TEXTS = ["the node reports a state", "what to do", "a release is published, and every node fetches it by itself"]
BULK_TEXTS, BULK_TOKENS = 1700, 150


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    with serving_both(tmp_path_factory.mktemp("node"), extra="max_queue = 2") as node:
        yield node


def stats(node: Node, model: str = ENCODER) -> ModelStats:
    rows = parse_document(RuntimeStats, ask(node.admin, "GET", "/v2/models/stats").body).models
    return next(row for row in rows if row.model == model)


def wait_idle(node: Node) -> None:
    wait_for("an idle batcher", lambda: stats(node).active == 0)


def tokens_of(text: str) -> list[int]:
    tokenizer = Tokenizer.from_file(str(encoder_version().directory / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return list(tokenizer.encode(text).ids)


def test_texts_come_back_as_embeddings_in_their_order_with_usage(node: Node) -> None:
    with node.client() as client:
        reply = client.embeddings.create(model=ENCODER, input=TEXTS)
        single = client.embeddings.create(model=ENCODER, input=TEXTS[1], encoding_format="float")
    texts = [tokens_of(text) for text in TEXTS]
    assert [row.index for row in reply.data] == [0, 1, 2]
    check_embeddings([row.embedding for row in reply.data], texts)
    check_embeddings([single.data[0].embedding], texts[1:2])
    assert reply.usage.prompt_tokens == reply.usage.total_tokens == sum(map(len, texts))
    assert (reply.object, reply.model, reply.data[0].object) == ("list", ENCODER, "embedding")


def test_tokens_are_taken_as_they_are(node: Node) -> None:
    texts = [random_text(150), random_text(1), random_text(40)]
    reply = ask(node.public, "POST", PATH, {"model": ENCODER, "input": texts}).json()
    check_embeddings([row["embedding"] for row in reply["data"]], texts)
    one = ask(node.public, "POST", PATH, {"model": ENCODER, "input": texts[2]}).json()
    check_embeddings([one["data"][0]["embedding"]], texts[2:])
    assert one["system_fingerprint"] == encoder_version().fingerprint


def test_base64_is_the_same_numbers_in_little_endian_float32(node: Node) -> None:
    body = {"model": ENCODER, "input": TEXTS[0]}
    plain = ask(node.public, "POST", PATH, body).json()["data"][0]["embedding"]
    packed = ask(node.public, "POST", PATH, body | {"encoding_format": "base64"}).json()["data"][0]["embedding"]
    assert np.array_equal(np.frombuffer(base64.b64decode(packed), "<f4"), np.asarray(plain, np.float32))


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({"input": "a", "model": "nobody"}, 404, "nobody"),
        ({"input": "a", "dimensions": 32}, 400, "64"),
        ({"input": []}, 400, "input"),
        ({"input": [[]]}, 400, "input"),
        ({"input": {"text": "a"}}, 400, "input"),
        ({"input": [384]}, 400, "vocabulary"),
        ({"input": [5] * 151}, 400, "151"),
        ({"input": ["many words " * 90]}, 400, "150"),
        ({"input": ["a"] * 2049}, 400, "2048"),
        ({"input": "a", "encoding_format": "int8"}, 400, "encoding_format"),
        ({"input": "a", "temperature": 1}, 400, "temperature"),
        ({}, 400, "input"),
    ],
)
def test_request_that_does_not_fit_is_refused_with_its_reason(
    node: Node, body: dict[str, Any], status: int, said: str
) -> None:
    reply = ask(node.public, "POST", PATH, {"model": ENCODER} | body)
    assert reply.status == status
    assert said in reply.json()["error"]["message"]


def test_each_kind_of_model_says_where_it_answers(node: Node) -> None:
    with node.client() as client:
        with pytest.raises(openai.BadRequestError, match="/v1/embeddings"):
            client.chat.completions.create(model=ENCODER, messages=[{"role": "user", "content": "Good evening"}])
        with pytest.raises(openai.BadRequestError, match="/v1/chat/completions"):
            client.embeddings.create(model=MODEL, input="Good evening")
        assert {model.id for model in client.models.list()} == {ENCODER, MODEL}


def test_chat_by_hand_finds_the_language_model_behind_the_encoder(node: Node) -> None:
    assert [row["kind"] for row in ask(node.public, "GET", "/v1/models").json()["data"]] == ["encoder", "decoder"]
    command = [sys.executable, "-m", "runtime.main", "chat", "--socket", str(node.public), "--max-tokens", "4", "Good"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_settings_bound_the_length_of_a_text(tmp_path: Path) -> None:
    with running(tmp_path, extra="context_tokens = 40") as node:
        swap(node, encoder_version())
        assert ask(node.public, "POST", PATH, {"model": ENCODER, "input": random_text(40)}).status == 200
        refused = ask(node.public, "POST", PATH, {"model": ENCODER, "input": random_text(41)})
        assert (refused.status, refused.json()["error"]["code"]) == (400, "context_exceeded")
        assert ask(node.public, "GET", f"/v2/models/{ENCODER}").json()["parameters"]["max_tokens"] == 40


def test_counters_of_an_encoder_are_those_of_reading(node: Node) -> None:
    wait_idle(node)
    before = stats(node)
    ask(node.public, "POST", PATH, {"model": ENCODER, "input": [random_text(30), random_text(12)]})
    after = stats(node)
    assert (after.requests - before.requests, after.prompt_tokens - before.prompt_tokens) == (1, 42)
    assert (after.completion_tokens, after.first_token_p50_s, after.kv_budget_bytes) == (0, None, None)
    assert after.tokens_per_s is not None
    assert after.latency_p50_s is not None
    text = ask(node.public, "GET", "/metrics").body.decode()
    assert f'amperage_prompt_tokens_total{{model="{ENCODER}"' in text
    assert f'amperage_first_token_seconds{{model="{ENCODER}"' not in text


def bulk(texts: int = BULK_TEXTS) -> dict[str, Any]:
    return {"model": ENCODER, "input": [random_text(BULK_TOKENS)] * texts}


def send(node: Node, body: Any) -> socket.socket:
    """Send a request and leave the connection open, unread."""
    data = json.dumps(body).encode()
    one = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    one.connect(str(node.public))
    one.sendall(f"POST {PATH} HTTP/1.1\r\nHost: unix\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
    return one


def encoded_tokens(row: ModelStats) -> float:
    return (row.tokens_per_s or 0.0) * row.busy_s


def test_client_that_leaves_is_not_worked_for_any_more(node: Node) -> None:
    wait_idle(node)
    before = stats(node)
    one = send(node, bulk())
    wait_for("a running request", lambda: stats(node).busy_s > before.busy_s)
    one.close()
    wait_idle(node)
    after = stats(node)
    assert after.requests == before.requests + 1
    assert encoded_tokens(after) - encoded_tokens(before) < BULK_TEXTS * BULK_TOKENS * 0.9
    assert after.failures == before.failures


def test_single_text_does_not_wait_for_the_bulk_of_another(node: Node) -> None:
    wait_idle(node)
    before = stats(node)
    with send(node, bulk()):
        wait_for("a running request", lambda: stats(node).busy_s > before.busy_s)
        reply = ask(node.public, "POST", PATH, {"model": ENCODER, "input": TEXTS[0]}).json()
        check_embeddings([reply["data"][0]["embedding"]], [tokens_of(TEXTS[0])])
        assert stats(node).active == 1, "the bulk was over before: this proves nothing"
    wait_idle(node)


def test_overload_is_429_with_retry_after_and_passes(node: Node) -> None:
    wait_idle(node)
    open_ones = [send(node, bulk(400)) for _ in range(3)]
    wait_for("three open requests", lambda: stats(node).active == 3)
    refused = ask(node.public, "POST", PATH, {"model": ENCODER, "input": "a"})
    assert (refused.status, refused.json()["error"]["code"]) == (429, "overloaded")
    assert int(refused.headers["retry-after"]) >= 1
    for one in open_ones:
        one.close()
    wait_idle(node)
    assert ask(node.public, "POST", PATH, {"model": ENCODER, "input": "a"}).status == 200


def test_request_over_its_time_fails_with_504(tmp_path: Path) -> None:
    with running(tmp_path, extra="request_timeout_s = 0.05") as node:
        node.order(encoder_version(), ENCODER)
        assert ask(node.admin, "POST", f"/v2/repository/models/{ENCODER}/load", {}).status == 200
        reply = ask(node.public, "POST", PATH, bulk())
        assert (reply.status, reply.json()["error"]["code"]) == (504, "deadline_passed")
        assert stats(node).failures == 1
        wait_idle(node)


def ask_for_embeddings(node: Node, number: int) -> set[str | None]:
    """One text or some; the version that answered."""
    texts = [tokens_of(text) for text in TEXTS[: number % 3 + 1]]
    with node.client() as client:
        reply: Any = client.embeddings.create(model=ENCODER, input=texts)
    check_embeddings([row.embedding for row in reply.data], texts)
    return {reply.system_fingerprint}


def swap(node: Node, version: Version) -> None:
    node.order(version, ENCODER)
    reply = ask(node.admin, "POST", f"/v2/repository/models/{ENCODER}/load", {})
    assert reply.status == 200, reply.body


def test_swaps_under_load_fail_no_request(tmp_path: Path) -> None:
    versions = [encoder_version(), encoder_version(version="2.0")]
    with running(tmp_path) as node:
        swap(node, versions[0])
        load = Load(partial(ask_for_embeddings, node))
        load.during([partial(swap, node, versions[number]) for number in (1, 0, 1, 0)])
        assert set.union(*load.answers) == {version.fingerprint for version in versions}
        index = "/v2/repository/index"
        wait_for("the end of what drained", lambda: ask(node.admin, "POST", index, b"").json()[0]["draining"] == 0)


def test_bulk_across_a_swap_ends_on_its_version(tmp_path: Path) -> None:
    with running(tmp_path) as node:
        swap(node, encoder_version())
        with send(node, bulk(600)) as one:
            wait_for("a running request", lambda: stats(node).busy_s > 0)
            swap(node, encoder_version(version="2.0"))
            newer = ask(node.public, "POST", PATH, {"model": ENCODER, "input": "a"}).json()
            assert newer["system_fingerprint"] == encoder_version(version="2.0").fingerprint
            one.settimeout(60)
            answer = b""
            while not answer.endswith(b"}}"):
                piece = one.recv(1 << 20)
                assert piece, "the answer ends too early"
                answer += piece
        assert encoder_version().fingerprint.encode() in answer[-200:]


def test_probe_judges_an_encoder_by_its_golden_embeddings(node: Node, tmp_path: Path) -> None:
    good = encoder_version()
    spoiled = Path(shutil.copytree(good.directory, tmp_path / "spoiled"))
    row = good.document.tensors.name.index("layers.1.up.levels")
    wrong = node.install(Version(spoiled, shuffle_tensor(spoiled, row)))
    path = f"/v2/repository/models/{ENCODER}/probe"
    seen = {}
    for candidate in (node.install(good), wrong):
        reply = ask(node.admin, "POST", path, {"candidate": candidate, "incumbent": good.decoded})
        seen[candidate] = parse_document(ProbeReport, reply.body)
    passed, refused = seen[good.decoded], seen[wrong]
    assert passed.verdict is ProbeVerdict.PASSED, passed.detail
    assert passed.golden_error is not None
    assert passed.golden_tolerance is not None
    assert passed.golden_error < passed.golden_tolerance / 8
    assert passed.top1_agreement is None
    assert passed.tokens_per_s is not None
    assert passed.incumbent_tokens_per_s is not None
    assert passed.options is not None
    assert refused.verdict is ProbeVerdict.GOLDEN_MISMATCH
    assert "tolerance" in refused.detail
