"""A real runtime with little memory for keys and values: what it serves, what it refuses, and what it gives back."""

import json
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from runtime_fixtures import MODEL, Node, ask, base_version, running, wait_for

from runtime.slab import token_bytes
from wire.documents import parse_document
from wire.serving import RuntimeStats

pytestmark = pytest.mark.e2e
TOKENS = 700
TEXT = "/v1/completions"


def small(tokens: int) -> str:
    budget = tokens * token_bytes(base_version().document.config)
    return f"kv_cache_bytes = {budget}\nprefix_cache_bytes = 0\n"


def anonymous_bytes(node: Node) -> int:
    assert node.process is not None
    rollup = Path(f"/proc/{node.process.pid}/smaps_rollup").read_text()
    found = re.search(r"^Anonymous:\s+(\d+) kB", rollup, re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def test_small_budget_serves_shorter_requests_and_says_what_it_refuses(tmp_path: Path) -> None:
    with running(tmp_path, base_version(), extra=small(TOKENS)) as node:
        row = ask(node.public, "GET", f"/v1/models/{MODEL}").json()
        assert row["context_tokens"] == 512
        body = {"model": MODEL, "prompt": [5] * 500, "temperature": 0, "ignore_eos": True}
        short = ask(node.public, "POST", TEXT, body).json()
        assert (short["choices"][0]["finish_reason"], short["usage"]["completion_tokens"]) == ("length", 12)
        full = ask(node.public, "POST", TEXT, body | {"max_tokens": 12}).json()
        assert full["choices"][0]["text"] == short["choices"][0]["text"]
        refused = [({"max_tokens": 13}, "500 tokens and max_tokens is 13"), ({"prompt": [5] * 512}, "512 tokens")]
        for change, numbers in refused:
            reply = ask(node.public, "POST", TEXT, body | change)
            assert reply.status == 400
            error = reply.json()["error"]
            assert error["code"] == "context_exceeded"
            assert numbers in error["message"]
            assert "context of 512 tokens (by memory; see kv_cache_bytes)" in error["message"]
        figures = parse_document(RuntimeStats, ask(node.admin, "GET", "/v2/models/stats").body).models[0]
        assert figures.kv_budget_bytes is not None
        assert TOKENS * 6144 <= figures.kv_budget_bytes < (TOKENS + 16) * 6144
        assert f"}} {figures.kv_budget_bytes}\n" in ask(node.public, "GET", "/metrics").body.decode()
        logged = next(line for line in node.log().splitlines() if "memory for keys and values" in line)
        assert f"{TOKENS} tokens of" in json.loads(logged)["arithmetic"]


def test_chat_without_max_tokens_may_use_the_context_to_its_end(tmp_path: Path) -> None:
    with running(tmp_path, base_version(), extra=small(512)) as node:
        body = {"model": MODEL, "messages": [{"role": "user", "content": "The captain"}], "ignore_eos": True}
        reply = ask(node.public, "POST", "/v1/chat/completions", body).json()
        assert reply["choices"][0]["finish_reason"] == "length"
        assert reply["usage"]["total_tokens"] == 512


def test_model_for_which_no_memory_is_left_does_not_load_and_says_why(tmp_path: Path) -> None:
    node = Node(tmp_path, small(400))
    node.order(base_version())
    node.start()
    try:
        wait_for("the refusal", lambda: ask(node.public, "GET", "/health").json()["status"] == "degraded")
        error = ask(node.public, "GET", "/health").json()["models"][0]["error"]
        assert "400 tokens of 6144 bytes, and one request needs 512" in error
        assert "kv_cache_bytes" in error
    finally:
        assert node.stop() == 0


def test_memory_of_a_burst_is_given_back_once_nobody_asks(tmp_path: Path) -> None:
    """Four full slots of the sample are 24 MiB."""
    slots = 4 * 1000 * token_bytes(base_version().document.config)
    with running(tmp_path, base_version(), extra="prefix_cache_bytes = 0") as node:
        body = {"model": MODEL, "prompt": [5] * 900, "max_tokens": 100, "ignore_eos": True}
        peak = 0
        for _ in range(2):
            with ThreadPoolExecutor(4) as pool:
                statuses = list(pool.map(lambda _: ask(node.public, "POST", TEXT, body).status, range(4)))
            assert statuses == [200] * 4
            peak = max(peak, anonymous_bytes(node))
        wait_for("memory to come back", lambda: anonymous_bytes(node) < peak - slots * 0.9)
