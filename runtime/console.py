"""`amperage-runtime chat` and `top`: a node's own client, on the public socket, in plain text."""

import http.client
import json
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wire.errors import Code, ConfigError, InferenceError

TIMEOUT_S = 120.0
ANSWER_LIMIT_BYTES = 1 << 20
LINE_LIMIT_BYTES = 1 << 20
REFRESH_S = 1.0
CLEAR = "\x1b[H\x1b[2J"


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        """Connect to the socket. Raises ConfigError when nobody listens there."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(TIMEOUT_S)
        try:
            self.sock.connect(str(self._path))
        except OSError as error:
            raise ConfigError(
                f"nobody answers on {self._path} ({error.strerror}); is amperage-runtime running?"
            ) from error


def chat(path: Path, model: str | None, prompt: str, max_tokens: int) -> int:
    """Answer one prompt, or one after the other from standard input."""
    model = model or _only_model(path)
    messages: list[dict[str, str]] = []
    for question in [prompt] if prompt else _questions():
        messages.append({"role": "user", "content": question})
        answer = ""
        for piece in _stream(path, {"model": model, "messages": messages, "max_tokens": max_tokens, "stream": True}):
            answer += piece
            print(piece, end="", flush=True)
        print()
        messages.append({"role": "assistant", "content": answer})
    return 0


def top(path: Path, *, once: bool) -> int:
    """A table of the models, renewed every second."""
    before: dict[str, float] = {}
    while True:
        connection = UnixConnection(path)
        connection.request("GET", "/metrics")
        text = connection.getresponse().read(ANSWER_LIMIT_BYTES).decode()
        connection.close()
        rows = _parse_metrics(text)
        print(("" if once else CLEAR) + _table(rows, before), flush=True)
        if once:
            return 0
        before = {model: row.get("amperage_completion_tokens_total", 0.0) for model, row in rows.items()}
        time.sleep(REFRESH_S)


def _table(rows: dict[str, dict[str, float]], before: dict[str, float]) -> str:
    lines = [f"{'model':<20}{'active':>8}{'requests':>10}{'failed':>8}{'tokens':>12}{'tokens/s':>10}{'p50 ms':>9}"]
    for model, row in sorted(rows.items()):
        tokens = row.get("amperage_completion_tokens_total", 0.0)
        speed = (tokens - before[model]) / REFRESH_S if model in before else 0.0
        lines.append(
            f"{model:<20}{row.get('amperage_active_requests', 0):>8.0f}{row.get('amperage_requests_total', 0):>10.0f}"
            f"{row.get('amperage_request_failures_total', 0):>8.0f}{tokens:>12,.0f}{speed:>10.0f}"
            f"{1000 * row.get('amperage_request_latency_p50_seconds', 0):>9.1f}"
        )
    return "\n".join(lines if rows else [*lines, "(no model is served)"])


def _parse_metrics(text: str) -> dict[str, dict[str, float]]:
    rows: dict[str, dict[str, float]] = {}
    for line in text.splitlines():
        name, found, rest = line.partition('{model="')
        if found and not line.startswith("#"):
            model, _, tail = rest.partition('"')
            rows.setdefault(model, {})[name] = float(tail.rsplit(" ", 1)[1])
    return rows


def _stream(path: Path, body: dict[str, Any]) -> Iterator[str]:
    connection = UnixConnection(path)
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        error = json.loads(response.read(ANSWER_LIMIT_BYTES)).get("error", {})
        raise InferenceError(Code.BAD_REQUEST, str(error.get("message", "the server refused")), response.status)
    while line := response.readline(LINE_LIMIT_BYTES):
        if not line.startswith(b"data: ") or line.strip() == b"data: [DONE]":
            continue
        for choice in json.loads(line[6:]).get("choices", []):
            yield choice["delta"].get("content", "")
    connection.close()


def _only_model(path: Path) -> str:
    connection = UnixConnection(path)
    connection.request("GET", "/v1/models")
    models = [row["id"] for row in json.loads(connection.getresponse().read(ANSWER_LIMIT_BYTES))["data"]]
    connection.close()
    if len(models) != 1:
        raise ConfigError(f"this node serves {', '.join(models) or 'no model'}; choose one with --model")
    return str(models[0])


def _questions() -> Iterator[str]:
    while True:
        if sys.stdin.isatty():
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()
