"""The public and the admin socket of a real process, asked by the official client and by hand."""

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import openai
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from runtime_fixtures import MODEL, Node, ask, base_version, running, wait_for

from runtime.http import BODY_LIMIT_BYTES
from wire.documents import parse_document
from wire.serving import ModelStats, ProbeReport, ProbeVerdict, RuntimeStats

pytestmark = pytest.mark.e2e
SAY = [{"role": "user", "content": "It was late in the evening when the"}]
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    with running(tmp_path_factory.mktemp("node"), base_version(), extra="max_queue = 2\nmax_slots = 2") as node:
        yield node


def stats(node: Node) -> ModelStats:
    return parse_document(RuntimeStats, ask(node.admin, "GET", "/v2/models/stats").body).models[0]


def wait_idle(node: Node) -> None:
    wait_for("an idle engine", lambda: stats(node).active == 0)


def events(data: bytes) -> list[Any]:
    """Contents of a whole stream; each event is one `data:` line."""
    blocks = data.decode().split("\n\n")
    assert blocks.pop() == ""
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
    return [block[6:] if block == "data: [DONE]" else json.loads(block[6:]) for block in blocks]


def test_chat_answers_with_text_usage_and_fingerprint(node: Node) -> None:
    with node.client() as client:
        reply = client.chat.completions.create(model=MODEL, messages=SAY, max_tokens=12, temperature=0)
    assert reply.choices[0].finish_reason == "length"
    assert reply.choices[0].message.role == "assistant"
    assert reply.choices[0].message.content
    assert reply.system_fingerprint == base_version().fingerprint
    assert reply.model == MODEL
    assert reply.usage is not None
    assert reply.usage.completion_tokens == 12
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + 12


def test_stream_gives_role_first_reason_last_and_the_same_text(node: Node) -> None:
    with node.client() as client:
        whole = client.chat.completions.create(model=MODEL, messages=SAY, max_tokens=30, temperature=0)
        chunks = list(
            client.chat.completions.create(model=MODEL, messages=SAY, max_tokens=30, temperature=0, stream=True)
        )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].delta.role for c in chunks[1:]] == [None] * (len(chunks) - 1)
    assert [c.choices[0].finish_reason for c in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.choices[0].message.content
    assert len({c.id for c in chunks}) == 1
    assert {c.system_fingerprint for c in chunks} == {base_version().fingerprint}


def test_usage_says_how_much_of_the_prompt_was_not_read_again(node: Node) -> None:
    prompt = [token + 3 for token in range(50)]
    before = stats(node).cached_tokens
    with node.client() as client:
        seen = [client.completions.create(model=MODEL, prompt=prompt, max_tokens=2, temperature=0) for _ in range(2)]
    details = [reply.usage.prompt_tokens_details for reply in seen if reply.usage is not None]
    assert [detail.cached_tokens for detail in details if detail is not None] == [0, 48]
    assert seen[0].usage is not None
    assert seen[0].usage.prompt_tokens == 50
    assert stats(node).cached_tokens == before + 48


def test_stream_on_the_wire_has_usage_before_done(node: Node) -> None:
    body = {"model": MODEL, "messages": SAY, "max_tokens": 5, "stream": True, "stream_options": {"include_usage": True}}
    reply = ask(node.public, "POST", CHAT, body)
    assert reply.headers["content-type"].startswith("text/event-stream")
    *chunks, usage, done = events(reply.body)
    assert done == "[DONE]"
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 5
    assert all(chunk["usage"] is None for chunk in chunks)
    assert chunks[-1]["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "length"}


def test_completions_continue_text_and_tokens_alike(node: Node) -> None:
    with node.client() as client:
        reply = client.completions.create(model=MODEL, prompt="The captain", max_tokens=8, temperature=0)
        streamed = client.completions.create(
            model=MODEL, prompt="The captain", max_tokens=8, temperature=0, stream=True
        )
        text = "".join(chunk.choices[0].text for chunk in streamed)
    assert reply.object == "text_completion"
    assert text == reply.choices[0].text


def test_stop_string_ends_the_answer_before_itself(node: Node) -> None:
    with node.client() as client:
        free = client.chat.completions.create(model=MODEL, messages=SAY, max_tokens=40, temperature=0)
        text = free.choices[0].message.content or ""
        stop = text[20:26]
        cut = client.chat.completions.create(model=MODEL, messages=SAY, max_tokens=40, temperature=0, stop=[stop])
    assert cut.choices[0].finish_reason == "stop"
    assert cut.choices[0].message.content == text[: text.index(stop)]
    assert cut.usage is not None
    assert cut.usage.completion_tokens < 40


def test_seed_repeats_an_answer(node: Node) -> None:
    with node.client() as client:
        texts = {
            client.chat.completions.create(model=MODEL, messages=SAY, max_tokens=20, seed=5).choices[0].message.content
            for _ in range(3)
        }
    assert len(texts) == 1


def test_models_are_listed(node: Node) -> None:
    with node.client() as client:
        assert [model.id for model in client.models.list()] == [MODEL]
        assert client.models.retrieve(MODEL).owned_by == "amperage"
    metadata = ask(node.public, "GET", f"/v2/models/{MODEL}").json()
    assert metadata["versions"] == ["1.0"]
    assert ask(node.public, "GET", f"/v2/models/{MODEL}/ready").status == 200
    assert ask(node.public, "GET", "/v2/models/other/ready").status == 404
    assert ask(node.public, "GET", "/v2").json()["name"] == "amperage"
    assert ask(node.public, "GET", "/v2/health/live").status == 200
    assert ask(node.public, "GET", "/health").json()["status"] == "ok"


@pytest.mark.parametrize(
    ("change", "error", "code"),
    [
        ({"model": "other"}, openai.NotFoundError, "model_not_found"),
        ({"messages": [{"role": "user", "content": "word " * 3000}]}, openai.BadRequestError, "context_exceeded"),
        ({"n": 2}, openai.BadRequestError, "bad_request"),
        ({"temperature": 9}, openai.BadRequestError, "bad_request"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_refusals_reach_the_official_client_as_its_errors(
    node: Node, change: dict[str, Any], error: type[openai.APIStatusError], code: str, stream: bool
) -> None:
    request: Any = {"model": MODEL, "messages": SAY, "max_tokens": 5, "stream": stream} | change
    with node.client() as client, pytest.raises(error) as refusal:
        client.chat.completions.create(**request)
    assert refusal.value.code == code
    assert refusal.value.type == "invalid_request_error"


def test_body_over_the_limit_is_413_and_garbage_400(node: Node) -> None:
    assert ask(node.public, "POST", CHAT, b"x" * (BODY_LIMIT_BYTES + 1)).status == 413
    assert ask(node.public, "POST", CHAT, b"{").status == 400
    assert ask(node.public, "GET", CHAT).status == 405
    assert ask(node.public, "GET", "/nothing").json()["error"]["code"] == "bad_request"


def test_admin_paths_exist_on_the_admin_socket_alone(node: Node) -> None:
    for method, path in [("POST", f"/v2/repository/models/{MODEL}/load"), ("POST", "/v2/repository/index")]:
        assert ask(node.public, method, path, b"{}").status == 404
        assert ask(node.admin, method, path, b"{}").status == 200
    assert ask(node.admin, "POST", CHAT, {"model": MODEL, "messages": SAY}).status == 404
    assert node.public.stat().st_mode & 0o777 == 0o660
    assert node.admin.stat().st_mode & 0o777 == 0o600


def test_overload_is_429_with_retry_after_and_passes(node: Node) -> None:
    body = {"model": MODEL, "messages": SAY, "max_tokens": 900, "ignore_eos": True, "stream": True}
    sockets: list[socket.socket] = []
    try:
        sockets += [send(node, body) for _ in range(4)]
        wait_for("a full queue", lambda: stats(node).active == 4)
        reply = ask(node.public, "POST", CHAT, body)
        assert reply.status == 429
        assert int(reply.headers["retry-after"]) >= 1
        assert reply.json()["error"]["code"] == "overloaded"
    finally:
        for one in sockets:
            one.close()
    wait_idle(node)
    assert ask(node.public, "POST", CHAT, body | {"max_tokens": 1}).status == 200


@pytest.mark.parametrize("stream", [True, False])
def test_client_that_leaves_frees_its_slot(node: Node, stream: bool) -> None:
    wait_idle(node)
    before = stats(node)
    one = send(node, {"model": MODEL, "messages": SAY, "max_tokens": 950, "ignore_eos": True, "stream": stream})
    wait_for("a running request", lambda: stats(node).completion_tokens > before.completion_tokens)
    one.close()
    wait_idle(node)
    after = stats(node)
    assert after.completion_tokens - before.completion_tokens < 950
    assert after.failures == before.failures


def test_client_that_leaves_while_it_waits_frees_its_place(node: Node) -> None:
    wait_idle(node)
    body = {"model": MODEL, "messages": SAY, "max_tokens": 950, "ignore_eos": True, "stream": True}
    running_two = [send(node, body) for _ in range(2)]
    wait_for("two running requests", lambda: stats(node).active == 2)
    waiting = send(node, body)
    wait_for("a waiting request", lambda: stats(node).active == 3)
    waiting.close()
    wait_for("its place", lambda: stats(node).active == 2)
    for one in running_two:
        one.setblocking(False)
        with one, suppress(BlockingIOError):
            while piece := one.recv(1 << 16):
                assert b"[DONE]" not in piece, "a slot was free: this proves nothing"
    wait_idle(node)


def test_request_over_its_time_fails_with_504(tmp_path: Path) -> None:
    with running(tmp_path, base_version(), extra="request_timeout_s = 0.05") as node:
        body = {"model": MODEL, "messages": SAY, "max_tokens": 950, "ignore_eos": True}
        reply = ask(node.public, "POST", CHAT, body)
        assert reply.status == 504
        assert reply.json()["error"]["code"] == "deadline_passed"
        late = events(ask(node.public, "POST", CHAT, body | {"stream": True}).body)
        assert late[-1]["error"]["code"] == "deadline_passed"
        assert stats(node).failures == 2
        wait_idle(node)


def test_metrics_are_prometheus_text(node: Node) -> None:
    ask(node.public, "POST", CHAT, {"model": MODEL, "messages": SAY, "max_tokens": 2})
    reply = ask(node.public, "GET", "/metrics")
    lines = [line for line in reply.body.decode().splitlines() if not line.startswith("#")]
    values = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}
    labels = f'{{model="{MODEL}",version="1.0",decoded="{base_version().decoded[:12]}"}}'
    assert values[f"amperage_requests_total{labels}"] == stats(node).requests
    assert values[f"amperage_cached_tokens_total{labels}"] == stats(node).cached_tokens
    assert values[f'amperage_model_ready{{model="{MODEL}"}}'] == 1


def test_answers_that_repeat_themselves_are_drafted_unless_the_settings_forbid_it(node: Node, tmp_path: Path) -> None:
    """The machine that tests may be too busy for drafts to win; over so many tokens they are at least tried."""
    long = {"model": MODEL, "messages": SAY, "max_tokens": 900, "temperature": 0, "ignore_eos": True}
    assert ask(node.public, "POST", CHAT, long).status == 200
    figures = stats(node)
    assert 0 < figures.accepted_tokens <= figures.drafted_tokens
    lines = ask(node.public, "GET", "/metrics").body.decode().splitlines()
    counted = {line.partition("{")[0]: float(line.rpartition(" ")[2]) for line in lines if line[0] != "#"}
    assert counted["amperage_drafted_tokens_total"] == figures.drafted_tokens
    assert counted["amperage_accepted_tokens_total"] == figures.accepted_tokens
    with running(tmp_path, base_version(), extra="speculation = false") as other:
        assert ask(other.public, "POST", CHAT, long).status == 200
        assert stats(other).drafted_tokens == 0


def test_probe_over_the_admin_socket_answers_200_for_every_verdict(node: Node) -> None:
    path = f"/v2/repository/models/{MODEL}/probe"
    for candidate, verdict in [(base_version().decoded, ProbeVerdict.PASSED), ("0" * 64, ProbeVerdict.LOAD_FAILED)]:
        reply = ask(node.admin, "POST", path, {"candidate": candidate, "incumbent": base_version().decoded})
        assert reply.status == 200
        assert parse_document(ProbeReport, reply.body).verdict is verdict
    assert ask(node.admin, "POST", path, {"candidate": "../../etc"}).status == 400


def test_agent_that_leaves_ends_its_probe(node: Node) -> None:
    path = f"/v2/repository/models/{MODEL}/probe"
    one = send(node, {"candidate": base_version().decoded}, node.admin, path)
    assert node.process is not None
    tasks = Path(f"/proc/{node.process.pid}/task")

    def children() -> list[str]:
        return [child for task in tasks.iterdir() for child in (task / "children").read_text().split()]

    wait_for("a probe child", children)
    one.close()
    wait_for("no probe child", lambda: not children())


def test_idle_server_uses_no_cpu(node: Node) -> None:
    wait_idle(node)
    assert node.process is not None
    stat = Path(f"/proc/{node.process.pid}/stat")

    def ticks() -> int:
        fields = stat.read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    before = ticks()
    with pytest.raises(AssertionError):
        wait_for("a busy idle server", lambda: ticks() - before > 20, timeout_s=1.0)


def test_sigterm_lets_open_answers_end_and_exits_with_0(tmp_path: Path) -> None:
    with running(tmp_path, base_version()) as node:
        body = {"model": MODEL, "messages": SAY, "max_tokens": 600, "ignore_eos": True, "stream": True}
        replies: list[bytes] = []
        thread = threading.Thread(target=lambda: replies.append(ask(node.public, "POST", CHAT, body).body))
        thread.start()
        wait_for("a running request", lambda: stats(node).completion_tokens > 5)
        assert node.stop() == 0
        thread.join(10)
        assert events(replies[0])[-1] == "[DONE]"
        assert not node.public.exists()
        assert not node.admin.exists()


def test_sigterm_does_not_wait_longer_than_the_grace(tmp_path: Path) -> None:
    with running(tmp_path, base_version(), extra="shutdown_grace_s = 1.0\ncontext_tokens = 1024") as node:
        bodies = {"model": MODEL, "messages": SAY, "max_tokens": 1000, "ignore_eos": True, "stream": True}
        sockets = [send(node, bodies) for _ in range(40)]
        wait_for("running requests", lambda: stats(node).completion_tokens > 5)
        assert node.stop() == 0
        endings = [read_all(one)[-200:] for one in sockets]
        assert any(b"[DONE]" not in ending for ending in endings), "everything ended by itself: this proves nothing"


def test_sockets_of_systemd_are_inherited_and_stay(tmp_path: Path) -> None:
    node = Node(tmp_path)
    node.order(base_version())
    public, admin = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
    for one, path in ((public, node.public), (admin, node.admin)):
        one.bind(str(path))
        one.listen()
    before = {path: path.stat().st_ino for path in (node.public, node.admin)}
    command = [sys.executable, "-P", "-m", "runtime.main", "serve", "--settings", str(node.settings)]
    launcher = (
        "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4);"
        "os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='2', LISTEN_FDNAMES='admin:public');"
        "os.execv(sys.argv[3], sys.argv[3:])"
    )
    low, high = os.dup(admin.fileno()), os.dup(public.fileno())
    with (tmp_path / "runtime.log").open("ab") as sink:
        node.process = subprocess.Popen(
            [sys.executable, "-c", launcher, str(low), str(high), *command], pass_fds=(low, high), stdout=sink,
            stderr=sink,
        )  # fmt: skip
    os.close(low)
    os.close(high)
    try:
        node.wait_ready()
        assert ask(node.admin, "POST", "/v2/repository/index", b"").status == 200
        assert ask(node.public, "POST", "/v2/repository/index", b"").status == 404
        assert {path: path.stat().st_ino for path in before} == before
        assert node.stop() == 0
        assert {path: path.stat().st_ino for path in before} == before
    finally:
        node.process.kill()
        node.process.wait(10)
        public.close()
        admin.close()


def test_readiness_is_told_to_systemd(tmp_path: Path) -> None:
    node = Node(tmp_path)
    node.order(base_version())
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified:
        notified.bind(str(tmp_path / "notify"))
        notified.settimeout(20)
        os.environ["NOTIFY_SOCKET"] = str(tmp_path / "notify")
        try:
            node.start()
        finally:
            del os.environ["NOTIFY_SOCKET"]
        try:
            assert notified.recv(200).startswith(b"READY=1")
            assert node.stop() == 0
            assert b"STOPPING=1" in notified.recv(200)
        finally:
            assert node.process is not None
            node.process.kill()


def test_second_runtime_on_the_same_sockets_ends_with_78(node: Node) -> None:
    command = [sys.executable, "-P", "-m", "runtime.main", "serve", "--settings", str(node.settings)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 78
    assert "another process listens" in done.stderr
    assert ask(node.public, "GET", "/health").status == 200


def test_chat_and_top_talk_to_the_sockets(node: Node) -> None:
    program = [sys.executable, "-P", "-m", "runtime.main"]
    chat = [*program, "chat", "--socket", str(node.public), "--max-tokens", "8", "--temperature", "0", "Hello"]
    done = subprocess.run(chat, capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout.strip()
    talk = subprocess.run(
        [*chat[:-1]], capture_output=True, text=True, timeout=30, check=True, input="Hello\nAnd then?\n"
    )
    assert len(talk.stdout) > len(done.stdout)
    top = [*program, "top", "--socket", str(node.admin), "--once"]
    done = subprocess.run(top, capture_output=True, text=True, timeout=30, check=True)
    assert MODEL in done.stdout
    gone = subprocess.run(
        [*program, "top", "--socket", "/nowhere"], capture_output=True, text=True, timeout=30, check=False
    )
    assert gone.returncode == 1
    assert "is amperage-runtime running?" in gone.stderr


def test_commands_that_run_no_model_import_no_onnxruntime() -> None:
    code = (
        "import sys, runtime.main, runtime.console\n"
        "try: runtime.main.main(['--help'])\nexcept SystemExit: pass\n"
        "sys.exit('onnxruntime' in sys.modules or 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=30, check=False)
    assert done.returncode == 0


def read_all(one: socket.socket) -> bytes:
    """Everything until the server closed the connection, which it may do rudely."""
    data = b""
    with one, suppress(ConnectionResetError):
        while piece := one.recv(1 << 16):
            data += piece
    return data


def send(node: Node, body: Any, path: Path | None = None, target: str = CHAT) -> socket.socket:
    """Send a request and leave the connection open, unread."""
    data = json.dumps(body).encode()
    one = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    one.connect(str(path or node.public))
    one.sendall(f"POST {target} HTTP/1.1\r\nHost: unix\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
    return one
