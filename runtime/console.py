"""The node-side commands `chat` and `top`: plain ANSI over the two sockets, nothing to install."""

import http.client
import json
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from host.unix_http import UnixConnection
from wire.documents import parse_document
from wire.errors import Code, TransferError
from wire.serving import ModelStats, RuntimeStats

TIMEOUT_S = 300.0
ANSWER_LIMIT_BYTES = 1 << 20
REFRESH_S = 1.0
_BOLD, _DIM, _PLAIN, _CLEAR = "\x1b[1m", "\x1b[2m", "\x1b[0m", "\x1b[H\x1b[2J"


def fetch(path: Path, method: str, target: str, body: Any = None) -> tuple[UnixConnection, http.client.HTTPResponse]:
    """Ask; the caller closes the connection. Raises TransferError, also for an answer that says no."""
    connection = UnixConnection(path, TIMEOUT_S)
    data = json.dumps(body).encode() if body is not None else None
    try:
        connection.request(method, target, data, {"Content-Type": "application/json"} if data else {})
        response = connection.getresponse()
    except OSError as error:
        raise TransferError(
            Code.RUNTIME_UNREACHABLE, f"{path}: {error.strerror or error}; is amperage-runtime running?"
        ) from error
    if response.status != http.HTTPStatus.OK:
        text = response.read(ANSWER_LIMIT_BYTES).decode(errors="replace")
        connection.close()
        raise TransferError(Code.RUNTIME_UNREACHABLE, f"runtime answered {response.status}: {text[:500]}")
    return connection, response


@dataclass(slots=True)
class Chat:
    """A conversation with one model."""

    socket: Path
    model: str | None
    max_tokens: int
    temperature: float
    messages: list[dict[str, str]] = field(default_factory=list)

    def say(self, text: str) -> Iterator[str]:
        """Pieces of the answer to `text`."""
        self.messages.append({"role": "user", "content": text})
        body = {
            "model": self.model or self._first_model(), "messages": self.messages, "max_tokens": self.max_tokens,
            "temperature": self.temperature, "stream": True,
        }  # fmt: skip
        connection, response = fetch(self.socket, "POST", "/v1/chat/completions", body)
        answer = ""
        try:
            for line in response:
                if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    raise TransferError(Code.RUNTIME_UNREACHABLE, str(event["error"].get("message")))
                piece = event["choices"][0]["delta"].get("content") or ""
                answer += piece
                yield piece
        finally:
            connection.close()
        self.messages.append({"role": "assistant", "content": answer})

    def _first_model(self) -> str:
        connection, response = fetch(self.socket, "GET", "/v1/models")
        rows = [row for row in json.loads(response.read(ANSWER_LIMIT_BYTES))["data"] if row["kind"] == "decoder"]
        connection.close()
        if not rows:
            raise TransferError(Code.NOT_READY, "no language model is served; look at the runtime's log")
        self.model = str(rows[0]["id"])
        return self.model


def converse(chat: Chat, message: str) -> int:
    """Ask `message` once, or read questions from the terminal until its end."""
    if message:
        _print_answer(chat, message)
        return 0
    while True:
        try:
            text = input(f"{_BOLD}> {_PLAIN}" if sys.stdin.isatty() else "")
        except EOFError:
            return 0
        if text.strip():
            _print_answer(chat, text)


def _print_answer(chat: Chat, text: str) -> None:
    for piece in chat.say(text):
        print(piece, end="", flush=True)
    print()


def watch(path: Path, *, once: bool) -> int:
    """Show the counters of every model, again every second."""
    before: RuntimeStats | None = None
    while True:
        connection, response = fetch(path, "GET", "/v2/models/stats")
        stats = parse_document(RuntimeStats, response.read(ANSWER_LIMIT_BYTES), limit_bytes=ANSWER_LIMIT_BYTES)
        connection.close()
        terminal = sys.stdout.isatty() and not once
        print((_CLEAR if terminal else "") + table(stats, before), flush=True)
        if once:
            return 0
        before = stats
        time.sleep(REFRESH_S)


def table(stats: RuntimeStats, before: RuntimeStats | None) -> str:
    """The counters as text; the rate is of the time since `before`."""
    width = shutil.get_terminal_size().columns
    head = f"{'model':<20} {'version':<12} {'open':>5} {'requests':>9} {'failed':>7} {'tokens':>10} {'tokens/s':>9}"
    lines = [f"amperage-runtime, process {stats.pid}", (head + f" {'busy s':>9} {'p50':>9} {'first':>9}")[:width]]
    older = {row.decoded: row for row in before.models} if before else {}
    lines += [_line(row, older.get(row.decoded))[:width] for row in stats.models]
    return "\n".join(lines)


def _line(row: ModelStats, before: ModelStats | None) -> str:
    rate = row.tokens_per_s if before is None else (row.completion_tokens - before.completion_tokens) / REFRESH_S
    return (
        f"{row.model:<20} {row.version:<12} {row.active:>5} {row.requests:>9} {row.failures:>7} "
        f"{row.completion_tokens:>10} {_figure(rate, 1):>9} {row.busy_s:>9.1f} "
        f"{_figure(row.latency_p50_s, 1000):>6} ms {_figure(row.first_token_p50_s, 1000):>6} ms"
    )


def _figure(value: float | None, scale: float) -> str:
    return "–" if value is None else f"{value * scale:.1f}"
