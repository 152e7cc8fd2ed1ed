"""Talking to a node with the official `openai` client over its Unix socket."""

import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
from openai import OpenAI, OpenAIError

PROMPT = "It was late in the evening, and the old house by the sea was quiet. The captain"


@dataclass(frozen=True, slots=True)
class Answer:
    """One finished request; times on the monotonic clock in seconds."""

    text: str
    fingerprints: frozenset[str]
    tokens: int
    started_s: float
    first_token_s: float
    ended_s: float
    finished: bool
    """True when the stream ended with a finish_reason."""

    @property
    def tokens_per_s(self) -> float:
        """Decode speed after the first token."""
        return max(self.tokens - 1, 0) / max(self.ended_s - self.first_token_s, 1e-9)


def connect(socket: Path, timeout_s: float = 60.0) -> OpenAI:
    """An official client that speaks to `socket`; the host name is a dummy and the key is not used."""
    transport = httpx2.HTTPTransport(uds=str(socket))
    return OpenAI(
        base_url="http://localhost/v1", api_key="unused", max_retries=0,
        http_client=httpx2.Client(transport=transport, timeout=timeout_s),
    )  # fmt: skip


def stream_chat(client: OpenAI, model: str, max_tokens: int, prompt: str = PROMPT) -> Answer:
    """Stream one chat completion to its end; raises OpenAIError when the server fails it."""
    started_s = time.monotonic()
    first_s = 0.0
    pieces: list[str] = []
    fingerprints: set[str] = set()
    tokens, finished = 0, False
    chunks = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": prompt}], max_tokens=max_tokens, temperature=0.7, seed=7,
        stream=True, stream_options={"include_usage": True},
    )  # fmt: skip
    for chunk in chunks:
        if chunk.system_fingerprint:
            fingerprints.add(chunk.system_fingerprint)
        if chunk.usage:
            tokens = chunk.usage.completion_tokens
        for choice in chunk.choices:
            if choice.delta.content:
                first_s = first_s or time.monotonic()
                pieces.append(choice.delta.content)
            finished = finished or choice.finish_reason is not None
    ended_s = time.monotonic()
    return Answer("".join(pieces), frozenset(fingerprints), tokens, started_s, first_s or ended_s, ended_s, finished)


def ask(client: OpenAI, model: str, max_tokens: int = 12) -> Answer:
    """One plain completion; raises OpenAIError when the server fails it."""
    started_s = time.monotonic()
    reply = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": PROMPT}], max_tokens=max_tokens, temperature=0
    )
    ended_s = time.monotonic()
    choice = reply.choices[0]
    tokens = reply.usage.completion_tokens if reply.usage else 0
    fingerprint = reply.system_fingerprint or ""
    return Answer(
        choice.message.content or "", frozenset({fingerprint}), tokens, started_s, started_s, ended_s,
        choice.finish_reason is not None,
    )  # fmt: skip


@dataclass(slots=True)
class Load:
    """Requests that keep coming from several clients until told to stop: plain ones and long streams."""

    socket: Path
    model: str
    plain_clients: int = 2
    stream_clients: int = 2
    stream_tokens: int = 900
    answers: list[Answer] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _threads: list[threading.Thread] = field(default_factory=list)

    def start(self) -> None:
        """Start the clients."""
        for i in range(self.plain_clients + self.stream_clients):
            thread = threading.Thread(target=self._work, args=(i >= self.plain_clients,), name=f"load-{i}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def stop(self, timeout_s: float = 60.0) -> None:
        """Let every open request end."""
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout_s)

    def count(self, fingerprint: str) -> int:
        """Answers so far that carried `fingerprint`."""
        with self._lock:
            return sum(fingerprint in answer.fingerprints for answer in self.answers)

    def _work(self, streaming: bool) -> None:
        client = connect(self.socket)
        while not self._stop.is_set():
            try:
                answer = stream_chat(client, self.model, self.stream_tokens) if streaming else ask(client, self.model)
            except (OpenAIError, httpx2.HTTPError) as error:
                with self._lock:
                    self.failures.append(f"{type(error).__name__}: {error}")
                if self._stop.wait(0.2):
                    return
                continue
            with self._lock:
                self.answers.append(answer)
