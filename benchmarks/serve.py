"""Eight streams over HTTP, and the first token after a known beginning, beside llama-server.

Both servers are processes of their own with the same weights, threads and slots, asked by the same client in turns.
Every prompt of the eight streams is new, so that no prefix cache helps; the warm prompt is an earlier one that goes on.
Ours drafts nothing: answers of random weights repeat themselves, which would flatter it (scripts/bench speculation).
"""

import json
import os
import socket
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from benchmarks.children import LLAMA
from benchmarks.decoder_models import Decoder
from benchmarks.decoders import CONTEXT_TOKENS, LONG_BLOCKS, MODELS, probed_options
from benchmarks.gguf_writer import gguf_of
from benchmarks.harness import PeerAbsent, Row, Samples, Subject, at_least, measure, row, rows_against
from benchmarks.runtime_server import MODEL, READY_TIMEOUT_S, running, runtime_server
from host.unix_http import UnixConnection
from runtime.cores import own_cores
from runtime.cpu import allowed_threads

STREAMS, PROMPT_TOKENS, ANSWER_TOKENS = 8, 64, 64
LONG_PROMPT_TOKENS, MORE_TOKENS = 1000, 8
ROUNDS = 11
"""Of the streams: a shared machine has faster and slower minutes, of which a median of five meets either."""
SERVER = LLAMA / "build" / "bin" / "llama-server"
PEER = "llama-server"


@dataclass(frozen=True, slots=True)
class Server:
    """Where a server listens, and how it is asked for `count` greedy tokens after `prompt`."""

    address: Path | int
    ours: bool

    def complete(self, prompt: list[int], count: int) -> None:
        """Wait for the whole answer. Raises RuntimeError when it is not 200 or not as long as it was asked for."""
        body: dict[str, Any] = {"prompt": prompt, "temperature": 0, "ignore_eos": True}
        body |= {"model": MODEL, "max_tokens": count} if self.ours else {"n_predict": count, "cache_prompt": True}
        answer = self._ask("POST", "/v1/completions" if self.ours else "/completion", body)
        made = answer["usage"]["completion_tokens"] if self.ours else answer["tokens_predicted"]
        if made != count:
            raise RuntimeError(f"{made} tokens came of {count}")

    def await_ready(self) -> None:
        """Poll its health."""
        until_s = time.perf_counter() + READY_TIMEOUT_S
        while time.perf_counter() < until_s:
            try:
                self._ask("GET", "/health", None)
            except (OSError, RuntimeError):
                time.sleep(0.1)
            else:
                return
        raise PeerAbsent(f"the server did not become ready within {READY_TIMEOUT_S:g} s")

    def _ask(self, method: str, target: str, body: dict[str, Any] | None) -> dict[str, Any]:
        if isinstance(self.address, Path):
            connection: HTTPConnection = UnixConnection(self.address, 120.0)
        else:
            connection = HTTPConnection("127.0.0.1", self.address, timeout=120.0)
        try:
            connection.request(method, target, json.dumps(body), {"Content-Type": "application/json"})
            reply = connection.getresponse()
            data = reply.read()
        finally:
            connection.close()
        if reply.status != 200:
            raise RuntimeError(data[:300].decode(errors="replace"))
        answer: dict[str, Any] = json.loads(data)
        return answer


def run() -> Sequence[Row]:
    """Rows for both models, and for both in long blocks."""
    threads = allowed_threads(0)
    return [entry for model in MODELS | LONG_BLOCKS for entry in _rows(model, threads)]


def _rows(model: str, threads: int) -> list[Row]:
    decoder = (MODELS | LONG_BLOCKS)[model]()
    seeds = iter(range(1, 1 << 30))
    with ExitStack() as stack:
        servers: dict[str, Server | PeerAbsent] = {"ours": stack.enter_context(_ours(decoder, threads))}
        try:
            servers[PEER] = stack.enter_context(_theirs(decoder, threads))
        except PeerAbsent as absence:
            servers[PEER] = absence
        streams = measure({name: _streams(server, seeds) for name, server in servers.items()}, ROUNDS)
        cores = sorted(own_cores())
        apart: dict[str, Server | PeerAbsent] = {
            "replicas": stack.enter_context(_ours(decoder, 1, [str(core) for core in cores])),
            "one engine": servers["ours"],
        }
        groups = measure({name: _streams(server, seeds) for name, server in apart.items()})
        gains = measure({name: _gain(server, seeds) for name, server in servers.items()})
        warm = measure({name: _warm(server, seeds) for name, server in servers.items()})
    gained: Samples | None = gains["ours"]
    assert gained is not None
    first = f"{model}: first token after {LONG_PROMPT_TOKENS} tokens"
    return [
        *rows_against(
            f"{model}: {STREAMS} streams, {threads} threads", "tok/s", "ours", streams, at_least(1.2, ratio=True)
        ),
        *rows_against(f"{model}: {STREAMS} streams, a replica on each core", "tok/s", "replicas", groups),
        row(f"{first}, cold over warm", "x", gained, at_least(20), (PEER, gains[PEER])),
        *rows_against(f"{first}, warm", "s", "ours", warm),
    ]  # fmt: skip


def _prompt(seed: int, count: int) -> list[int]:
    return [seed % 4000 + 3, *(((seed * 7919 + 31 * i) % 4001 + 3) for i in range(count - 1))]


def _present(server: Server | PeerAbsent) -> Server:
    if isinstance(server, PeerAbsent):
        raise server
    return server


def _streams(server: Server | PeerAbsent, seeds: Iterator[int]) -> Subject:
    def subject() -> float:
        present = _present(server)
        prompts = [_prompt(next(seeds), PROMPT_TOKENS) for _ in range(STREAMS)]
        with ThreadPoolExecutor(STREAMS) as pool:
            began_s = time.perf_counter()
            list(pool.map(lambda prompt: present.complete(prompt, ANSWER_TOKENS), prompts))
            return STREAMS * ANSWER_TOKENS / (time.perf_counter() - began_s)

    return subject


def _first_token_s(server: Server, prompt: list[int]) -> float:
    began_s = time.perf_counter()
    server.complete(prompt, 1)
    return time.perf_counter() - began_s


def _spans(server: Server, seed: int) -> tuple[float, float]:
    """Seconds to the first token: of a new prompt, and of the same with a few tokens more."""
    prompt = _prompt(seed, LONG_PROMPT_TOKENS)
    return _first_token_s(server, prompt), _first_token_s(server, [*prompt, *_prompt(seed + 1, MORE_TOKENS)])


def _gain(server: Server | PeerAbsent, seeds: Iterator[int]) -> Subject:
    def subject() -> float:
        cold_s, warm_s = _spans(_present(server), next(seeds))
        return cold_s / warm_s

    return subject


def _warm(server: Server | PeerAbsent, seeds: Iterator[int]) -> Subject:
    return lambda: _spans(_present(server), next(seeds))[1]


@contextmanager
def _ours(decoder: Decoder, threads: int, groups: Sequence[str] = ()) -> Iterator[Server]:
    """The runtime with the options that its probe chooses, with a replica in each of `groups`."""
    slots = STREAMS // max(1, len(groups))
    settings = {"max_slots": slots, "context_tokens": CONTEXT_TOKENS, "core_groups": list(groups), "speculation": False}
    options = probed_options(decoder, threads)
    with runtime_server([(decoder.directory, decoder.version)], options, settings) as server:
        yield Server(server.public, ours=True)


@contextmanager
def _theirs(decoder: Decoder, threads: int) -> Iterator[Server]:
    if not SERVER.is_file():
        raise PeerAbsent("llama-server was not built; run this by scripts/bench, which needs cmake and a C++ compiler")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = int(free.getsockname()[1])
    context = min(CONTEXT_TOKENS, decoder.config.context_tokens)
    command = [
        str(SERVER), "-m", str(gguf_of(decoder)), "--host", "127.0.0.1", "--port", str(port), "-t", str(threads), "-tb",
        str(threads), "-np", str(STREAMS), "-c", str(STREAMS * context), "--offline",
    ]  # fmt: skip
    with running(command, os.environ | {"LD_LIBRARY_PATH": str(SERVER.parent)}):
        server = Server(port, ours=False)
        server.await_ready()
        yield server
