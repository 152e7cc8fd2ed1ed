"""One thread per model that decides what runs next: continuous batching, decode first.

Between two decode steps of all running requests at most one chunk of one newcomer's prompt is computed. Requests join
and leave at every step. Slots 0..k-1 decode; the newcomer sits in slot k; when one leaves, the last takes its slot.

Invariant: only the engine thread touches the decoder; every accepted request ends in exactly one `Finished`.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import structlog

from runtime.model import PREFILL_TOKENS, Decoder
from runtime.sampling import Sampler, SamplingParameters
from runtime.stats import StatsRecorder
from wire.errors import Code, InferenceError

log = structlog.get_logger()

RETRY_AFTER_S = 1.0


class FinishReason(StrEnum):
    """Why a request ended; the first two are OpenAI's."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Finished:
    """The last thing that a request's sink gets."""

    reason: FinishReason
    detail: str = ""


Sink = Callable[[int | Finished], None]
"""Called on the engine thread with every token and then once with Finished; must not block or raise."""


@dataclass(slots=True)
class Generation:
    """One request on its way through the engine."""

    prompt: Sequence[int]
    max_tokens: int
    parameters: SamplingParameters
    sink: Sink
    cancelled: bool = False
    """Set by the consumer; the engine lets the request go before its next step."""
    produced: int = 0
    length: int = 0
    """Tokens in its slot."""
    last_token: int = 0
    started_s: float = field(default_factory=time.monotonic)
    first_token_s: float | None = None
    sampler: Sampler = field(init=False)

    def __post_init__(self) -> None:
        self.sampler = Sampler(self.parameters)


class Engine:
    """Runs a decoder; `close` after `drain`."""

    def __init__(self, decoder: Decoder, stats: StatsRecorder, *, queue_limit: int) -> None:
        self._decoder = decoder
        self._stats = stats
        self._queue_limit = queue_limit
        self._stop_tokens = frozenset(decoder.version.config.eos_token_ids)
        self._wake = threading.Condition()
        self._waiting: deque[Generation] = deque()
        self._joining: Generation | None = None
        self._running: list[Generation] = []
        self._closing = False
        name = f"engine-{decoder.version.model}-{decoder.version.version}"
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, generation: Generation) -> None:
        """Accept a request.

        Raises InferenceError: context_exceeded (400), overloaded (429), not_ready (503) when the engine is closing.
        """
        room = self._decoder.capacity - len(generation.prompt)
        if not generation.prompt or room < 1:
            raise InferenceError(
                Code.CONTEXT_EXCEEDED,
                f"the prompt has {len(generation.prompt)} tokens and the context {self._decoder.capacity}: shorten it",
                400,
            )
        generation.max_tokens = min(generation.max_tokens, room)
        with self._wake:
            if self._closing:
                raise InferenceError(Code.NOT_READY, "this version is leaving; ask again", 503, RETRY_AFTER_S)
            if len(self._waiting) >= self._queue_limit and len(self._running) >= self._decoder.slots:
                raise InferenceError(
                    Code.OVERLOADED, f"{len(self._waiting)} requests wait already; try again later", 429, RETRY_AFTER_S
                )
            self._waiting.append(generation)
            self._wake.notify_all()

    def active(self) -> int:
        """Requests that have not ended."""
        with self._wake:
            return len(self._waiting) + len(self._running) + (self._joining is not None)

    def drain(self, timeout_s: float) -> bool:
        """Refuse newcomers, wait for everything accepted to end, stop the thread, free the model.

        False when requests were still open after `timeout_s`; they are then told that they failed.
        """
        with self._wake:
            self._closing = True
            self._wake.notify_all()
        self._thread.join(timeout_s)
        drained = not self._thread.is_alive()
        if not drained:
            with self._wake:
                for generation in (*self._waiting, *self._running, *([self._joining] if self._joining else [])):
                    generation.cancelled = True
            self._thread.join()
        self._decoder.close()
        return drained

    def _run(self) -> None:
        try:
            while self._admit():
                started_s = time.monotonic()
                if self._running:
                    self._decode()
                if self._joining is not None:
                    self._prefill(self._joining)
                self._stats.add_busy(time.monotonic() - started_s)
        except Exception as error:
            # a kernel that fails once is not trusted again: everybody is told, and newcomers are refused
            log.exception("engine_failed", model=self._decoder.version.model)
            self._fail_all(f"{type(error).__name__}: {error}")

    def _fail_all(self, detail: str) -> None:
        with self._wake:
            self._closing = True
            open_requests = [*self._waiting, *self._running, *([self._joining] if self._joining else [])]
            self._waiting.clear()
            self._running.clear()
            self._joining = None
        for generation in open_requests:
            self._stats.add_failure()
            generation.sink(Finished(FinishReason.FAILED, detail))

    def _admit(self) -> bool:
        """Let cancelled requests go, take a newcomer when a slot is free, sleep when idle; False to end the thread."""
        with self._wake:
            self._wake.wait_for(lambda: self._closing or self._waiting or self._running or self._joining)
            if self._joining is None and self._waiting and len(self._running) < self._decoder.slots:
                self._joining = self._waiting.popleft()
        for generation in [g for g in self._running if g.cancelled]:
            self._end(generation, FinishReason.CANCELLED)
        if self._joining is not None and self._joining.cancelled:
            self._end(self._joining, FinishReason.CANCELLED)
        with self._wake:
            return bool(not self._closing or self._waiting or self._running or self._joining)

    def _decode(self) -> None:
        batch = self._running
        logits = self._decoder.decode([g.last_token for g in batch], [g.length for g in batch])
        ended: list[tuple[Generation, FinishReason]] = []
        for row, generation in enumerate(batch):
            generation.length += 1
            reason = self._emit(generation, generation.sampler.choose(logits[row]))
            if reason is not None:
                ended.append((generation, reason))
        for generation, reason in ended:
            self._end(generation, reason)

    def _prefill(self, generation: Generation) -> None:
        slot = len(self._running)
        part = generation.prompt[generation.length : generation.length + PREFILL_TOKENS]
        logits = self._decoder.prefill(slot, list(part), generation.length)
        generation.length += len(part)
        if generation.length < len(generation.prompt):
            return
        reason = self._emit(generation, generation.sampler.choose(logits))
        if reason is not None:
            self._end(generation, reason)
            return
        with self._wake:
            self._running.append(generation)
            self._joining = None

    def _emit(self, generation: Generation, token: int) -> FinishReason | None:
        """Hand a token out unless it ends the text; the reason when the request is over."""
        if generation.first_token_s is None:
            generation.first_token_s = time.monotonic()
        generation.last_token = token
        if token in self._stop_tokens:
            return FinishReason.STOP
        generation.produced += 1
        generation.sink(token)
        return FinishReason.LENGTH if generation.produced >= generation.max_tokens else None

    def _end(self, generation: Generation, reason: FinishReason) -> None:
        """Free its slot and keep the others dense."""
        with self._wake:
            if generation is self._joining:
                self._joining = None
            else:
                slot, last = self._running.index(generation), len(self._running) - 1
                if slot != last:
                    self._running[slot] = self._running[last]
                    self._decoder.move(last, slot, self._running[slot].length)
                del self._running[last]
                if self._joining is not None:
                    self._decoder.move(last + 1, last, self._joining.length)
        self._stats.add_request(generation.started_s, generation.first_token_s, len(generation.prompt),
                                generation.produced)  # fmt: skip
        generation.sink(Finished(reason))
