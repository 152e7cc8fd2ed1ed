"""Embeddings at 1, 8 and 32 clients: batches by length and turn, beside one text at a time and naive padding.

Random weights of all-MiniLM-L6-v2's shape, texts in the lengths of queries and passages (benchmarks/encoder_models.py).
A client asks for one text after the other. All servers have the same threads and run the same texts in turns; but for
the one over the socket they are in this process, without HTTP. The limit is those tokens in texts of one length: no
padding, no queue, no clients. Processor time tells more than the clock when others use the machine, too.
"""

import base64
import json
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from benchmarks.encoder_models import EncoderVersion, Text, minilm, mixed_texts, padded_graph
from benchmarks.harness import Row, Samples, Subject, Target, at_most, measure, row
from benchmarks.runtime_server import MODEL, runtime_server
from forge.quantise import Precision
from forge.reference import MODEL_FILE
from host.unix_http import UnixConnection
from runtime.batcher import Batcher, Encoding, Limits
from runtime.cpu import allowed_threads
from runtime.encoder import Encoder
from runtime.model import Float
from runtime.settings import RuntimeSettings
from runtime.stats import Stats, quantile
from wire.errors import InferenceError
from wire.serving import ExecutionOptions

CLIENTS = (1, 8, 32)
TEXTS = {1: 24, 8: 64, 32: 128}
"""Texts of a round, by the number of clients."""
ROUNDS = 9
NAIVE_TEXTS = 32
"""Texts that naive padding takes at once, at most."""
LIMIT_TOKENS = 512
"""Of a batch that has nothing to pad: the fastest of 128, 256, 512, 1,024 and all at once."""
OURS, ALONE, NAIVE = "batches by bucket", "one at a time", "naive padding"
UNSORTED, SOCKET, INT8, LIMIT = "naive padding, our graph", "over the socket", "int8", "limit"
TARGETS: dict[tuple[int, str], Target] = {
    (1, ALONE): at_most(1.03, ratio=True),
    (8, ALONE): at_most(1.0, ratio=True),
    (8, NAIVE): at_most(0.7, ratio=True),
    (32, ALONE): at_most(0.95, ratio=True),
    (32, NAIVE): at_most(0.5, ratio=True),
}
"""Of processor time."""


def run() -> Sequence[Row]:
    """Rows for each number of clients."""
    options = ExecutionOptions(threads=allowed_threads(0))
    version = minilm(Precision.FLOAT32)
    servers: dict[str, Any] = {
        OURS: Batches(_encoder(version, options)),
        ALONE: Alone(_encoder(version, options)),
        NAIVE: NaivePadding(padded_graph(), options.threads),
        UNSORTED: NaivePadding(version.directory / MODEL_FILE, options.threads),
        INT8: Batches(_encoder(minilm(Precision.INT8), options)),
    }
    rows: list[Row] = []
    settings = {"threads": options.threads, "max_queue": max(CLIENTS)}
    with runtime_server([(version.directory, version.document)], options, settings) as process:
        servers[SOCKET] = OverSocket(process.public, process.pid)
        _check(servers)
        for clients in CLIENTS:
            rows += _rows(clients, servers, options)
    return rows


class Batches:
    """Our batcher."""

    def __init__(self, encoder: Encoder) -> None:
        defaults = RuntimeSettings(store=Path("/"))
        batch, queued = defaults.encoder_batch_tokens, defaults.encoder_queue_tokens
        limits = Limits(encoder.config.max_tokens, batch, max(CLIENTS), queued)
        self._batcher = Batcher("bench", encoder.config, Stats(), limits)
        self._batcher.start(encoder)

    def encode(self, text: Text) -> Float:
        """The embedding of `text`."""
        ended: Future[InferenceError | None] = Future()
        encoding = Encoding([text], ended.set_result)
        self._batcher.submit(encoding)
        if (error := ended.result()) is not None:
            raise error
        embedding: Float = encoding.embeddings[0]
        return embedding


class Alone:
    """The same session, whoever holds the lock."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder, self._lock = encoder, threading.Lock()

    def encode(self, text: Text) -> Float:
        """The embedding of `text`."""
        with self._lock:
            embedding: Float = self._encoder.encode([text])[0]
        return embedding


class NaivePadding:
    """A thread that takes what waits and pads it to the longest."""

    def __init__(self, graph: Path, threads: int) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
        self._waiting: queue.SimpleQueue[tuple[Text, Future[Float]]] = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()

    def encode(self, text: Text) -> Float:
        """The embedding of `text`."""
        future: Future[Float] = Future()
        self._waiting.put((text, future))
        return future.result()

    def _run(self) -> None:
        while True:
            batch = [self._waiting.get()]
            while len(batch) < NAIVE_TEXTS and not self._waiting.empty():
                batch.append(self._waiting.get())
            ids = np.zeros((len(batch), max(len(text) for text, _ in batch)), np.int64)
            mask = np.zeros_like(ids)
            for i, (text, _) in enumerate(batch):
                ids[i, : len(text)], mask[i, : len(text)] = text, 1
            (found,) = self._session.run(["embeddings"], {"input_ids": ids, "attention_mask": mask})
            for (_, future), embedding in zip(batch, found, strict=True):
                future.set_result(embedding)


class OverSocket:
    """Our whole runtime in a process of its own, a connection per client."""

    def __init__(self, socket: Path, pid: int) -> None:
        self._socket, self._pid, self._local = socket, pid, threading.local()

    def encode(self, text: Text) -> Float:
        """The embedding of `text`."""
        if not hasattr(self._local, "connection"):
            self._local.connection = UnixConnection(self._socket, 60.0)
        connection: UnixConnection = self._local.connection
        body = json.dumps({"model": MODEL, "input": text, "encoding_format": "base64"})
        connection.request("POST", "/v1/embeddings", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        answer = json.loads(response.read())
        if response.status != 200:
            raise RuntimeError(str(answer)[:300])
        return np.frombuffer(base64.b64decode(answer["data"][0]["embedding"]), "<f4")

    def processor_s(self) -> float:
        """Processor time of the runtime (proc(5), stat)."""
        fields = Path(f"/proc/{self._pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@dataclass(slots=True)
class Figures:
    """Of each round but the first, which warms up: tokens per second, processor time per 1,000 tokens, latencies."""

    tokens_per_s: list[float] = field(default_factory=list)
    processor_ms: list[float] = field(default_factory=list)
    median_ms: list[float] = field(default_factory=list)
    late_ms: list[float] = field(default_factory=list)

    def samples(self, name: str) -> Samples:
        """Those of one kind."""
        return Samples(tuple(getattr(self, name)[1:]))


def _round(server: Any, clients: int, figures: Figures) -> Subject:
    """Runs the texts of a round by so many clients."""
    processor_s: Callable[[], float] = getattr(server, "processor_s", time.process_time)

    def timed(text: Text) -> float:
        began_s = time.perf_counter()
        server.encode(text)
        return time.perf_counter() - began_s

    def subject() -> float:
        texts = mixed_texts(TEXTS[clients], 1000 * clients + len(figures.tokens_per_s))
        tokens = sum(map(len, texts))
        with ThreadPoolExecutor(clients) as pool:
            began_s, used_s = time.perf_counter(), processor_s()
            latencies = list(pool.map(timed, texts))
            figures.processor_ms.append(1e6 * (processor_s() - used_s) / tokens)
            figures.tokens_per_s.append(tokens / (time.perf_counter() - began_s))
        figures.median_ms.append(1e3 * (quantile(latencies, 0.5) or 0.0))
        figures.late_ms.append(1e3 * (quantile(latencies, 0.95) or 0.0))
        return figures.tokens_per_s[-1]

    return subject


def _packed(encoder: Encoder, clients: int, figures: Figures) -> Subject:
    """Runs as many tokens as a round has, as texts of its mean length, in full batches."""

    def subject() -> float:
        texts = mixed_texts(TEXTS[clients], 1000 * clients + len(figures.tokens_per_s))
        count = sum(map(len, texts))
        length = round(count / len(texts))
        batch = [(texts[0] * length)[:length]] * (LIMIT_TOKENS // length)
        runs = round(count / (len(batch) * length))
        tokens = runs * len(batch) * length
        began_s, used_s = time.perf_counter(), time.process_time()
        for _ in range(runs):
            encoder.encode(batch)
        figures.processor_ms.append(1e6 * (time.process_time() - used_s) / tokens)
        figures.tokens_per_s.append(tokens / (time.perf_counter() - began_s))
        return figures.tokens_per_s[-1]

    return subject


def _rows(clients: int, servers: dict[str, Any], options: ExecutionOptions) -> list[Row]:
    figures = {name: Figures() for name in (*servers, LIMIT)}
    subjects = {name: _round(server, clients, figures[name]) for name, server in servers.items()}
    subjects[LIMIT] = _packed(_encoder(minilm(Precision.FLOAT32), options), clients, figures[LIMIT])
    measure(subjects, ROUNDS)
    head = f"{clients} clients" if clients > 1 else "1 client"
    kinds = {
        "processor time": ("processor_ms", "ms/1000 tok", (ALONE, NAIVE, UNSORTED, INT8, SOCKET, LIMIT)),
        "throughput": ("tokens_per_s", "tok/s", (ALONE, NAIVE, SOCKET, LIMIT)),
        "latency, median": ("median_ms", "ms", (ALONE, NAIVE, SOCKET)),
        "latency, 95th percentile": ("late_ms", "ms", (ALONE, NAIVE, SOCKET)),
    }
    rows: list[Row] = []
    for kind, (name, unit, peers) in kinds.items():
        ours = figures[OURS].samples(name)
        for peer in peers:
            target = TARGETS.get((clients, peer)) if name == "processor_ms" else None
            rows.append(row(f"{head}: {kind}", unit, ours, target, (peer, figures[peer].samples(name))))
    return rows


def _encoder(version: EncoderVersion, options: ExecutionOptions) -> Encoder:
    encoder = Encoder(version.directory, version.config, options)
    encoder.warm_up()
    return encoder


def _check(servers: dict[str, Any]) -> None:
    """Raise unless all give one text the same embedding."""
    text = mixed_texts(1, 0)[0]
    expected = servers[ALONE].encode(text)
    for name, server in servers.items():
        cosine = float(server.encode(text) @ expected)
        if cosine < (0.99 if name == INT8 else 0.99999):
            raise RuntimeError(f"{name} gives another embedding: cosine {cosine:.5f}")
