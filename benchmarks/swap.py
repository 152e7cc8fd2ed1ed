"""A version follows another under load: failed requests, the longest wait for a token, memory over a hundred swaps.

Clients stream answers without a pause and note the time between any two pieces of one answer. Windows with a swap in
their middle and windows without one take turns; the excess is the median of the longest gaps of the one over that of
the other. The two versions have the same weights and tokenizer and another name, so that nothing but the swap differs.
"""

import http.client
import json
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.decoder_models import Decoder
from benchmarks.decoders import MODELS, probed_options
from benchmarks.harness import Row, Samples, at_most, exact, row
from benchmarks.runtime_server import MODEL, RuntimeServer, runtime_server
from codec.versions import VERSION_FILE
from host.unix_http import UnixConnection
from runtime.cpu import allowed_threads
from wire.documents import encode_document
from wire.manifest import VersionDocument

CLIENTS = 4
PROMPT_TOKENS, ANSWER_TOKENS = 32, 96
WINDOWS, WINDOW_S = 9, 3.0
SWAPS, SETTLED_SWAPS = 100, 3
GAP_LIMIT_S = 0.05


@dataclass(slots=True)
class Load:
    """Clients that ask without a pause, and what they saw."""

    socket: Path
    stop: threading.Event = field(default_factory=threading.Event)
    gaps: list[tuple[float, float]] = field(default_factory=list)
    """(when it ended, seconds) of every gap between two pieces of one answer."""
    answers: int = 0
    failures: list[str] = field(default_factory=list)

    def ask(self, number: int) -> None:
        """One client's life."""
        while not self.stop.is_set():
            number += CLIENTS
            try:
                self.stream([(number * 7919 + 31 * i) % 4000 + 3 for i in range(PROMPT_TOKENS)])
            except (OSError, http.client.HTTPException, RuntimeError) as error:
                self.failures.append(repr(error))
            else:
                self.answers += 1

    def longest(self, begin_s: float, end_s: float) -> float:
        """Seconds of the longest gap that ended between two moments."""
        return max((gap for at, gap in self.gaps if begin_s <= at <= end_s), default=0.0)

    def stream(self, prompt: list[int]) -> None:
        """One answer, whole. Raises OSError, HTTPException, RuntimeError."""
        body = {"model": MODEL, "prompt": prompt, "max_tokens": ANSWER_TOKENS, "stream": True, "ignore_eos": True}
        connection = UnixConnection(self.socket, 60.0)
        try:
            connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
            reply = connection.getresponse()
            seen_s = 0.0
            last = b""
            while line := reply.readline():
                if not line.startswith(b"data: "):
                    continue
                now_s = time.perf_counter()
                if seen_s:
                    self.gaps.append((now_s, now_s - seen_s))
                seen_s, last = now_s, line
        finally:
            connection.close()
        if reply.status != 200 or last.strip() != b"data: [DONE]":
            raise RuntimeError(f"{reply.status}: {last[:200]!r}")


def run() -> Sequence[Row]:
    """Rows for both models."""
    return [entry for model in MODELS for entry in _rows(model, MODELS[model]())]


def _rows(model: str, decoder: Decoder) -> list[Row]:
    options = probed_options(decoder, allowed_threads(0))
    with _twin(decoder) as twin:
        versions = [(decoder.directory, decoder.version), twin]
        documents = [document for _, document in versions]
        with runtime_server(versions, options, {"max_slots": CLIENTS, "context_tokens": 512}) as server:
            calm, swapped, load = _under_load(server, documents)
            growth = _growth(server, documents)
    excess = Samples(tuple(gap - statistics.median(calm) for gap in swapped))
    title = f"{model}: {CLIENTS} streams"
    return [
        row(f"{title}, {WINDOWS} swaps, failed of {load.answers} requests", "", exact(len(load.failures)), at_most(0)),
        row(f"{title}, longest gap between tokens in {WINDOW_S:g} s", "s", Samples(tuple(calm))),
        row(f"{title}, the same with a swap in it", "s", Samples(tuple(swapped))),
        row(f"{title}, longest gap across a swap, above normal", "s", excess, at_most(GAP_LIMIT_S)),
        row(f"{model}: RSS after {SWAPS} swaps over after {SETTLED_SWAPS}", "", exact(growth), at_most(1.05)),
    ]


def _under_load(server: RuntimeServer, documents: list[VersionDocument]) -> tuple[list[float], list[float], Load]:
    """Longest gaps of the windows without and with a swap."""
    load = Load(server.public)
    threads = [threading.Thread(target=load.ask, args=(number,)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    time.sleep(WINDOW_S)
    found: tuple[list[float], list[float]] = ([], [])
    for number in range(2 * WINDOWS):
        began_s = time.perf_counter()
        time.sleep(WINDOW_S / 3)
        if number % 2:
            server.serve(documents[(number // 2 + 1) % 2])
        time.sleep(max(0.0, began_s + WINDOW_S - time.perf_counter()))
        found[number % 2].append(load.longest(began_s, time.perf_counter()))
    load.stop.set()
    for thread in threads:
        thread.join()
    return found[0], found[1], load


def _growth(server: RuntimeServer, documents: list[VersionDocument]) -> float:
    """RSS after SWAPS swaps over that after SETTLED_SWAPS, with a request after each."""
    rss: dict[int, int] = {}
    load = Load(server.public)
    for number in range(1, SWAPS + 1):
        server.serve(documents[number % 2])
        load.stream([number % 4000 + 3] * PROMPT_TOKENS)
        if number in (SETTLED_SWAPS, SWAPS):
            server.settle()
            rss[number] = server.rss_bytes()
    return rss[SWAPS] / rss[SETTLED_SWAPS]


@contextmanager
def _twin(decoder: Decoder) -> Iterator[tuple[Path, VersionDocument]]:
    """The same version by another name."""
    with tempfile.TemporaryDirectory(prefix="twin-", dir=decoder.directory.parent) as folder:
        directory = Path(shutil.copytree(decoder.directory, Path(folder) / "version"))
        document = decoder.version.model_copy(update={"version": "2"})
        (directory / VERSION_FILE).unlink()
        (directory / VERSION_FILE).write_bytes(encode_document(document))
        yield directory, document
