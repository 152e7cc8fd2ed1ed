"""An encoder over the sockets of a real process: embeddings, refusals, clients that leave, swaps, the probe."""

import base64
import json
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))

from encoder_fixtures import ENCODER, encoder_version, random_text
from runtime_fixtures import MODEL, Node, Version, ask, base_version, running, wait_for

from forge.build import reseal_version
from forge.encoder_reference import shipped_encoder
from host.unix_http import UnixConnection
from wire.documents import parse_document
from wire.serving import ModelStats, ProbeReport, ProbeVerdict, RuntimeStats

pytestmark = pytest.mark.e2e
PATH = "/v1/embeddings"
TEXTS = ["the node reports a state", "what to do", "a release is published, and every node fetches it by itself"]
TOLERANCE = 1e-4
"""1 - cosine to the embedding of the text alone, as in tests/property/test_runtime_batcher_property.py."""
BULK_TEXTS, BULK_TOKENS = 1700, 150


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    with running(tmp_path_factory.mktemp("node"), extra="max_queue = 2") as node:
        node.order(encoder_version(), ENCODER)
        node.order(base_version())
        for name in (ENCODER, MODEL):
            assert ask(node.admin, "POST", f"/v2/repository/models/{name}/load", {}).status == 200
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


def check(rows: list[Any], texts: list[list[int]]) -> None:
    """Embeddings as the forge's own session gives them, each text alone."""
    expected = shipped_encoder(encoder_version().directory).embed(texts)
    found = np.asarray(rows, np.float32)
    assert found.shape == expected.shape
    assert np.abs(np.linalg.norm(found, axis=1) - 1).max() < 1e-5
    assert (1 - np.sum(found * expected, axis=1)).max() < TOLERANCE


def test_texts_come_back_as_embeddings_in_their_order_with_usage(node: Node) -> None:
    with node.client() as client:
        reply = client.embeddings.create(model=ENCODER, input=TEXTS)
        single = client.embeddings.create(model=ENCODER, input=TEXTS[1], encoding_format="float")
    texts = [tokens_of(text) for text in TEXTS]
    assert [row.index for row in reply.data] == [0, 1, 2]
    check([row.embedding for row in reply.data], texts)
    check([single.data[0].embedding], texts[1:2])
    assert reply.usage.prompt_tokens == reply.usage.total_tokens == sum(map(len, texts))
    assert (reply.object, reply.model, reply.data[0].object) == ("list", ENCODER, "embedding")


def test_tokens_are_taken_as_they_are(node: Node) -> None:
    texts = [random_text(150), random_text(1), random_text(40)]
    reply = ask(node.public, "POST", PATH, {"model": ENCODER, "input": texts}).json()
    check([row["embedding"] for row in reply["data"]], texts)
    one = ask(node.public, "POST", PATH, {"model": ENCODER, "input": texts[2]}).json()
    check([one["data"][0]["embedding"]], texts[2:])
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
        check([ask(node.public, "POST", PATH, {"model": ENCODER, "input": TEXTS[0]}).json()["data"][0]["embedding"]],
              [tokens_of(TEXTS[0])])  # fmt: skip
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


INFER = f"/v2/models/{ENCODER}/infer"


def padded(texts: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and mask, int64 [texts, longest]; what stands in the padding must not matter."""
    ids = np.full((len(texts), max(map(len, texts))), 382)
    mask = np.zeros_like(ids)
    for row, text in enumerate(texts):
        ids[row, : len(text)], mask[row, : len(text)] = text, 1
    return ids, mask


def tensor(name: str, values: np.ndarray, **rest: Any) -> dict[str, Any]:
    return {"name": name, "shape": list(values.shape), "datatype": "INT64", **rest}


def test_infer_takes_and_gives_tensors_in_json(node: Node) -> None:
    texts = [random_text(30), random_text(3), random_text(90)]
    ids, mask = padded(texts)
    inputs = [tensor("input_ids", ids, data=ids.tolist()), tensor("attention_mask", mask, data=mask.ravel().tolist())]
    reply = ask(node.public, "POST", INFER, {"inputs": inputs, "id": "7"}).json()
    assert (reply["model_name"], reply["model_version"], reply["id"]) == (ENCODER, "1.0", "7")
    (output,) = reply["outputs"]
    assert (output["name"], output["shape"], output["datatype"]) == ("embeddings", [3, 64], "FP32")
    check(np.reshape(output["data"], output["shape"]).tolist(), texts)
    bare = ask(node.public, "POST", INFER, {"inputs": [tensor("input_ids", ids[:1, :30], data=texts[0])]}).json()
    check([bare["outputs"][0]["data"]], texts[:1])


def test_infer_takes_and_gives_binary_tensors(node: Node) -> None:
    texts = [random_text(30), random_text(3), random_text(90)]
    ids, mask = padded(texts)
    inputs = [
        tensor(name, values, parameters={"binary_data_size": values.nbytes})
        for name, values in (("input_ids", ids), ("attention_mask", mask))
    ]
    outputs = [{"name": "embeddings", "parameters": {"binary_data": True}}]
    header = json.dumps({"inputs": inputs, "outputs": outputs}).encode()
    connection = UnixConnection(node.public, 30.0)
    connection.request(
        "POST", INFER, header + ids.astype("<i8").tobytes() + mask.astype("<i8").tobytes(),
        {"Inference-Header-Content-Length": str(len(header))},
    )  # fmt: skip
    response = connection.getresponse()
    body = response.read()
    length = int(response.headers["Inference-Header-Content-Length"])
    connection.close()
    (output,) = json.loads(body[:length])["outputs"]
    assert output["parameters"] == {"binary_data_size": len(body) - length}
    check(np.frombuffer(body[length:], "<f4").reshape(output["shape"]).tolist(), texts)


def test_metadata_lists_the_tensors_of_an_encoder(node: Node) -> None:
    metadata = ask(node.public, "GET", f"/v2/models/{ENCODER}").json()
    assert metadata["platform"] == "onnxruntime_encoder"
    assert [(entry["name"], entry["datatype"], entry["shape"]) for entry in metadata["inputs"]] == [
        ("input_ids", "INT64", [-1, -1]), ("attention_mask", "INT64", [-1, -1]),
    ]  # fmt: skip
    assert metadata["outputs"] == [{"name": "embeddings", "datatype": "FP32", "shape": [-1, 64]}]
    assert metadata["parameters"]["max_tokens"] == 150
    assert "binary_tensor_data" in ask(node.public, "GET", "/v2").json()["extensions"]
    assert ask(node.public, "GET", f"/v2/models/{MODEL}").json()["inputs"] == []


@pytest.mark.parametrize(
    ("change", "status", "said"),
    [
        ({"outputs": [{"name": "logits"}]}, 400, "embeddings"),
        ({"parameters": {"priority": 1}}, 400, "priority"),
        ({"inputs": [{"name": "pixels", "shape": [1], "datatype": "INT64", "data": [1]}]}, 400, "pixels"),
        ({"inputs": [{"name": "input_ids", "shape": [2], "datatype": "INT64", "data": [5, 6]}]}, 400, "input_ids"),
        ({"mask": [0, 1]}, 400, "attention_mask"),
        ({"mask": [0, 0]}, 400, "attention_mask"),
        ({"mask": [2, 0]}, 400, "attention_mask"),
        ({"mask": [1]}, 400, "attention_mask"),
        ({"ids": [5, 384]}, 400, "vocabulary"),
    ],
)
def test_infer_that_does_not_fit_is_refused_with_its_reason(
    node: Node, change: dict[str, Any], status: int, said: str
) -> None:
    ids, mask = np.asarray([change.pop("ids", [5, 6])]), np.asarray([change.pop("mask", [1, 1])])
    inputs = [tensor("input_ids", ids, data=ids.tolist()), tensor("attention_mask", mask, data=mask.tolist())]
    reply = ask(node.public, "POST", INFER, {"inputs": inputs} | change)
    assert reply.status == status, reply.body
    assert said in reply.json()["error"]


def test_decoder_takes_no_tensors(node: Node) -> None:
    ids = np.asarray([[5]])
    body = {"inputs": [tensor("input_ids", ids, data=[5])]}
    reply = ask(node.public, "POST", f"/v2/models/{MODEL}/infer", body)
    assert (reply.status, reply.json()["code"]) == (400, "bad_request")
    assert "/v1/chat/completions" in reply.json()["error"]


@dataclass(slots=True)
class Load:
    """Clients that ask without a pause, each time for one text or for some."""

    node: Node
    stop: threading.Event = field(default_factory=threading.Event)
    answers: list[str] = field(default_factory=list)
    failures: list[Exception] = field(default_factory=list)

    def ask(self, number: int) -> None:
        texts = [tokens_of(text) for text in TEXTS[: number % 3 + 1]]
        with self.node.client() as client:
            while not self.stop.is_set():
                try:
                    reply: Any = client.embeddings.create(model=ENCODER, input=texts)
                    check([row.embedding for row in reply.data], texts)
                    self.answers.append(reply.system_fingerprint)
                except Exception as error:  # noqa: BLE001  every failure counts, whatever it is
                    self.failures.append(error)


def swap(node: Node, version: Version) -> None:
    node.order(version, ENCODER)
    reply = ask(node.admin, "POST", f"/v2/repository/models/{ENCODER}/load", {})
    assert reply.status == 200, reply.body


def test_swaps_under_load_fail_no_request(tmp_path: Path) -> None:
    versions = [encoder_version(), encoder_version(version="2.0")]
    with running(tmp_path) as node:
        swap(node, versions[0])
        load = Load(node)
        threads = [threading.Thread(target=load.ask, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for number in (1, 0, 1, 0):
            swap(node, versions[number])
            done = len(load.answers)
            wait_for("answers after a swap", lambda done=done: load.failures or len(load.answers) > done + 12)
        load.stop.set()
        for thread in threads:
            thread.join(30)
        assert load.failures == []
        assert set(load.answers) == {version.fingerprint for version in versions}
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
    columns = good.document.tensors
    row = columns.name.index("layers.1.up.levels")
    weights = np.memmap(spoiled / "weights.bin", np.uint8, "r+")
    tensor = weights[columns.offset[row] : columns.offset[row] + columns.size_bytes(row)]
    tensor[:] = np.random.default_rng(0).permutation(tensor)
    weights.flush()
    wrong = node.install(Version(spoiled, reseal_version(spoiled)))
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
