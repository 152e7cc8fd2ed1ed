"""One version follows another in a running process: nobody's request fails, and nothing is kept."""

import json
import re
import shutil
import socket
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import openai
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from runtime_fixtures import MODEL, Load, Node, Version, ask, base_version, running, tuned_version, wait_for

from agent.runtime_client import RuntimeClient
from forge.build import reseal_version
from wire.documents import parse_document
from wire.errors import Code, DeployError
from wire.serving import ProbeRequest, ProbeVerdict, RuntimeStats

pytestmark = pytest.mark.e2e
SAY: Any = [{"role": "user", "content": "It was late in the evening when the"}]
LOAD = f"/v2/repository/models/{MODEL}/load"


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with running(tmp_path, base_version()) as node:
        yield node


def swap(node: Node, version: Version) -> None:
    node.order(version)
    reply = ask(node.admin, "POST", LOAD, {})
    assert reply.status == 200, reply.body
    assert reply.json() == {"decoded": version.decoded, "version": version.document.version}


def answering(node: Node, model: str = MODEL) -> str | None:
    with node.client() as client:
        return client.chat.completions.create(model=model, messages=SAY, max_tokens=1).system_fingerprint


def index(node: Node) -> dict[str, Any]:
    rows = ask(node.admin, "POST", "/v2/repository/index", b"").json()
    return {row["name"]: row for row in rows}


def break_copy(version: Version, node: Node) -> Version:
    """The version in the store with its weights cut off; same digest, so that serving.json can name it."""
    node.install(version)
    weights = node.store / "versions" / version.decoded / "weights.bin"
    data = weights.read_bytes()
    weights.unlink()  # it is a hard link to everybody's copy
    weights.write_bytes(data[:-10])
    return version


def test_stream_across_a_swap_ends_on_its_version_and_later_answers_carry_the_new_one(node: Node) -> None:
    with node.client() as client:
        stream = client.chat.completions.create(
            model=MODEL, messages=SAY, max_tokens=900, stream=True, extra_body={"ignore_eos": True}
        )
        first = next(stream)
        swap(node, tuned_version())
        assert answering(node) == tuned_version().fingerprint
        assert index(node)[MODEL]["draining"] == 1, "the stream was over before the swap: this proves nothing"
        rows = parse_document(RuntimeStats, ask(node.admin, "GET", "/v2/models/stats").body).models
        assert [row.version for row in rows] == ["2.0", "1.0"]
        rest = list(stream)
    assert {chunk.system_fingerprint for chunk in (first, *rest)} == {base_version().fingerprint}
    assert rest[-1].choices[0].finish_reason == "length"
    wait_for("the old version's end", lambda: index(node)[MODEL]["draining"] == 0)
    assert index(node)[MODEL]["version"] == "2.0"


def test_client_that_never_reads_does_not_keep_the_old_version(tmp_path: Path) -> None:
    with running(tmp_path, base_version(), extra="request_timeout_s = 1.0") as node:
        body = {"model": MODEL, "messages": SAY, "max_tokens": 1000, "ignore_eos": True, "stream": True}
        data = json.dumps(body).encode()
        with socket.socket(socket.AF_UNIX) as mute:
            mute.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            mute.connect(str(node.public))
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: unix\r\nContent-Length: {len(data)}\r\n\r\n"
            mute.sendall(head.encode() + data)
            wait_for("a running request", lambda: index_stats(node).models[0].requests == 1)
            swap(node, tuned_version())
            assert index(node)[MODEL]["draining"] == 1
            wait_for("the old version's end", lambda: index(node)[MODEL]["draining"] == 0)


def index_stats(node: Node) -> RuntimeStats:
    return parse_document(RuntimeStats, ask(node.admin, "GET", "/v2/models/stats").body)


def test_agents_own_client_understands_every_answer(node: Node) -> None:
    client = RuntimeClient(node.admin)
    candidate = node.install(tuned_version())
    report = client.probe(MODEL, ProbeRequest(candidate=candidate, incumbent=base_version().decoded))
    assert report.verdict is ProbeVerdict.PASSED
    node.order(tuned_version())
    client.load(MODEL)
    assert client.stats().models[0].decoded == tuned_version().decoded
    with pytest.raises(DeployError) as refusal:
        client.load("other")
    assert refusal.value.code is Code.MODEL_NOT_FOUND
    client.unload(MODEL)
    wait_for("no models", lambda: not client.stats().models)


def test_graph_that_loads_but_breaks_its_contract_keeps_the_old_version(node: Node, tmp_path: Path) -> None:
    home = Path(shutil.copytree(base_version().directory, tmp_path / "wrong"))
    model = onnx.load(str(home / "model.onnx"), load_external_data=False)
    text = model.SerializeToString().replace(b"logit_rows", b"logit_rowz")
    (home / "model.onnx").write_bytes(text)
    node.order(Version(home, reseal_version(home)))
    reply = ask(node.admin, "POST", LOAD, {})
    assert (reply.status, reply.json()["code"]) == (422, "load_failed")
    assert "contract" in reply.json()["error"]
    assert answering(node) == base_version().fingerprint


def ask_for_tokens(node: Node, number: int) -> set[str | None]:
    """A stream or a short answer; the versions that its chunks name."""
    stream = number % 2 == 0
    with node.client() as client:
        reply: Any = client.chat.completions.create(
            model=MODEL, messages=SAY, max_tokens=40 if stream else 4, stream=stream
        )
        chunks = list(reply) if stream else [reply]
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")
    return {chunk.system_fingerprint for chunk in chunks}


def test_swaps_under_load_fail_no_request(node: Node) -> None:
    load = Load(partial(ask_for_tokens, node))
    load.during([partial(swap, node, version) for version in (tuned_version(), base_version()) * 2])
    assert len(load.answers) > 40
    assert all(len(fingerprints) == 1 for fingerprints in load.answers)
    assert set.union(*load.answers) == {base_version().fingerprint, tuned_version().fingerprint}
    wait_for("the end of what drained", lambda: index(node)[MODEL]["draining"] == 0)


def test_load_that_fails_keeps_the_old_version(node: Node) -> None:
    node.order(break_copy(tuned_version(), node))
    reply = ask(node.admin, "POST", LOAD, {})
    assert reply.status == 422
    assert reply.json()["code"] == "corrupt"
    assert "weights.bin" in reply.json()["error"]
    assert answering(node) == base_version().fingerprint
    assert "weights.bin" in index(node)[MODEL]["reason"]
    swap(node, base_version())
    assert index(node)[MODEL]["reason"] == ""


def test_serving_file_that_is_garbage_keeps_the_old_version(node: Node) -> None:
    (node.store / "serving.json").write_text('{"models": 5}')
    reply = ask(node.admin, "POST", LOAD, {})
    assert (reply.status, reply.json()["code"]) == (422, "bad_document")
    assert answering(node) == base_version().fingerprint


def test_load_of_a_model_that_nobody_ordered_is_404(node: Node) -> None:
    reply = ask(node.admin, "POST", "/v2/repository/models/other/load", {})
    assert (reply.status, reply.json()["code"]) == (404, "model_not_found")
    assert set(index(node)) == {MODEL}


def test_load_of_what_serves_changes_nothing(node: Node) -> None:
    answering(node)
    swap(node, base_version())
    stats = parse_document(RuntimeStats, ask(node.admin, "GET", "/v2/models/stats").body)
    assert stats.models[0].requests == 1, "it was loaded again"


def test_unload_lets_open_answers_end_and_refuses_new_ones(node: Node) -> None:
    with node.client() as client:
        stream = client.chat.completions.create(
            model=MODEL, messages=SAY, max_tokens=600, stream=True, extra_body={"ignore_eos": True}
        )
        next(stream)
        assert ask(node.admin, "POST", f"/v2/repository/models/{MODEL}/unload", {}).status == 200
        with pytest.raises(openai.NotFoundError):
            answering(node)
        assert list(stream)[-1].choices[0].finish_reason == "length"
    wait_for("an empty index", lambda: not index(node))
    assert ask(node.admin, "POST", f"/v2/repository/models/{MODEL}/unload", {}).status == 200
    swap(node, base_version())
    assert answering(node) == base_version().fingerprint


def test_model_that_does_not_load_at_start_is_reported_and_can_be_replaced(tmp_path: Path) -> None:
    with running(tmp_path) as node:
        node.order(base_version(), "good")
        node.order(break_copy(tuned_version(), node))
        assert node.stop() == 0
        node.start()
        wait_for("a degraded start", lambda: ask(node.public, "GET", "/health").json()["status"] == "degraded")
        assert answering(node, "good") == base_version().fingerprint
        with pytest.raises(openai.InternalServerError) as refusal:
            answering(node)
        assert (refusal.value.status_code, refusal.value.code) == (503, "not_ready")
        assert "weights.bin" in refusal.value.message
        assert ask(node.public, "GET", "/v2/health/ready").status == 503
        swap(node, base_version())
        assert ask(node.public, "GET", "/v2/health/ready").status == 200


def test_start_with_garbage_in_the_store_lives_and_says_so(tmp_path: Path) -> None:
    node = Node(tmp_path)
    node.store.mkdir(parents=True)
    (node.store / "serving.json").write_text("garbage")
    node.start()
    try:
        wait_for("a degraded start", lambda: ask(node.public, "GET", "/health").json()["status"] == "degraded")
        assert "Serving" in ask(node.public, "GET", "/health").json()["error"]
        swap(node, base_version())
        assert answering(node) == base_version().fingerprint
    finally:
        assert node.process is not None
        node.process.kill()
        node.process.wait(10)


def test_empty_node_is_ready_and_serves_nothing(tmp_path: Path) -> None:
    with running(tmp_path) as node:
        node.wait_ready()
        assert ask(node.public, "GET", "/v1/models").json()["data"] == []


def test_version_whose_directory_is_gone_goes_on_serving(node: Node) -> None:
    shutil.rmtree(node.store / "versions")
    assert answering(node) == base_version().fingerprint


def test_memory_is_flat_over_many_swaps(node: Node) -> None:
    def rss_bytes() -> int:
        assert node.process is not None
        text = Path(f"/proc/{node.process.pid}/status").read_text()
        found = re.search(r"^VmRSS:\s+(\d+) kB", text, re.MULTILINE)
        assert found
        return int(found[1]) * 1024

    def settle(rounds: int) -> int:
        for i in range(rounds):
            swap(node, (tuned_version(), base_version())[i % 2])
            answering(node)
        wait_for("the end of what drained", lambda: index(node)[MODEL]["draining"] == 0)
        return rss_bytes()

    weights = (base_version().directory / "weights.bin").stat().st_size
    before = settle(6)
    settle(16)
    # what drained is told before its memory went back, so the last model's may still be on its way
    wait_for("memory of at most four models kept by 16 swaps", lambda: rss_bytes() - before < 4 * weights)
