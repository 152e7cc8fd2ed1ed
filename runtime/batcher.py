"""Dynamic batching of an encoder: one thread per replica of a loaded version runs what waits, batch by batch.

Texts wait no longer than until a session is free, unless `wait_s` lets a batch that is not full wait for more.
Invariants: a request gets one event, its end; the texts of one that was cancelled or has failed are not run, but for
those of the batch that runs already. An exception of a batch fails the requests that were in it and nothing else.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import structlog

from runtime.buckets import Buckets, Waiting
from runtime.encoder import Encoder
from runtime.keeping import Keeper
from runtime.model import Float
from runtime.refusals import crowded, model_failed, server_ending
from runtime.slab import Usage
from runtime.stats import Stats
from wire.errors import Code, InferenceError
from wire.manifest import EncoderConfig

_log = structlog.get_logger(__name__)


@dataclass(slots=True, eq=False)
class Encoding:
    """One request: texts of tokens. `sink` gets None when all are encoded, or why they are not."""

    texts: Sequence[Sequence[int]]
    sink: Callable[[InferenceError | None], None]
    # the batcher's from here on
    embeddings: Float = field(init=False)
    """float32 [texts, dimensions]; whole once `sink` got None."""
    left: int = 0
    """Texts that are not encoded yet."""
    accepted_s: float = 0.0

    @property
    def tokens(self) -> int:
        """Of all texts."""
        return sum(map(len, self.texts))


Endings = list[tuple[Encoding, InferenceError | None]]


def deliver_directly(endings: Endings) -> None:
    """Call every sink on the batcher's thread; a server hands the list to its event loop instead."""
    for encoding, error in endings:
        encoding.sink(error)


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of a batcher."""

    text_tokens: int
    """Of one text."""
    batch_tokens: int
    queue_requests: int
    """That may be open beside the one that runs."""
    queue_tokens: int
    """Of all texts that wait, and of one request."""
    wait_s: float = 0.0
    """How long the first text of a batch that is not full may wait for others while a session is free."""


class Batcher:
    """Runs the encodings of one model, whose replicas take from one queue once they were started."""

    def __init__(
        self, name: str, config: EncoderConfig, stats: Stats, limits: Limits,
        deliver: Callable[[Endings], None] = deliver_directly,
    ) -> None:  # fmt: skip
        self._name, self._config = name, config
        self.stats, self._limits, self._deliver = stats, limits, deliver
        self._changed = threading.Condition()
        self._waiting: Buckets[Encoding] = Buckets(limits.batch_tokens)
        self._open: dict[Encoding, None] = {}
        """In the order of their arrival."""
        self._closed = False
        self._threads: list[threading.Thread] = []

    def start(self, encoder: Encoder, keeper: Keeper[Encoder] | None = None) -> None:
        """Let a replica run what waits, on a thread of its own with the cores of the calling one.

        `keeper` gives it back while nobody asks; without one it is kept for ever.
        """
        thread = threading.Thread(target=self._run, args=(encoder, keeper), name=f"batcher-{self._name}", daemon=True)
        self._threads.append(thread)
        thread.start()

    @property
    def open(self) -> int:
        """Requests that wait or run."""
        return len(self._open)

    @property
    def usage(self) -> Usage:
        """An encoder keeps no keys and values; a batch's memory is the session's."""
        return Usage()

    def submit(self, encoding: Encoding) -> None:
        """Take a request, from any thread.

        Raises InferenceError: bad_request and context_exceeded (400), overloaded (429), not_ready (503) after close.
        """
        self._check(encoding.texts)
        tokens = encoding.tokens
        encoding.embeddings = np.zeros((len(encoding.texts), self._config.dimensions), np.float32)
        encoding.left, encoding.accepted_s = len(encoding.texts), time.perf_counter()
        with self._changed:
            if self._closed:
                raise server_ending()
            full = len(self._open) > self._limits.queue_requests
            if full or (self._open and self._waiting.tokens + tokens > self._limits.queue_tokens):
                raise crowded(len(self._open), self._patience_s())
            self._open[encoding] = None
            self._waiting.add(Waiting(text, encoding, row) for row, text in enumerate(encoding.texts))
            self._changed.notify()
        self.stats.began(tokens)

    def cancel(self, encoding: Encoding) -> None:
        """Stop working for a request, from any thread. No fault when it has ended, whose event may be on its way."""
        with self._changed:
            self._forget(encoding)

    def close(self) -> None:
        """Cancel what is open, end the threads and give the model's memory back."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _check(self, texts: Sequence[Sequence[int]]) -> None:
        config = self._config
        if not texts or not all(texts):
            raise InferenceError(Code.BAD_REQUEST, "input: nothing to encode; send some text", 400)
        if not all(0 <= min(text) <= max(text) < config.vocab_size for text in texts):
            # onnxruntime's gather reads outside the weights for such a token instead of failing
            raise InferenceError(Code.BAD_REQUEST, "input: a token is outside the model's vocabulary", 400)
        longest = max(map(len, texts))
        most = self._limits.text_tokens
        if longest > most:
            raise InferenceError(
                Code.CONTEXT_EXCEEDED, f"a text has {longest} tokens, {most} are taken; send shorter pieces of it", 400
            )
        if sum(map(len, texts)) > self._limits.queue_tokens:
            raise InferenceError(
                Code.BAD_REQUEST, f"one request may have {self._limits.queue_tokens} tokens; send fewer texts", 400
            )

    def _run(self, encoder: Encoder, keeper: Keeper[Encoder] | None) -> None:
        while not self._closed:
            batch = self._next(keeper.keep_s if keeper is not None and not keeper.resting else None)
            if keeper is not None and not batch and not self._closed:
                keeper.rest(encoder)
            if keeper is not None and batch and keeper.resting:
                try:
                    encoder = keeper.wake()
                except InferenceError as error:
                    self._fail(batch, error)
                    continue
            if batch:
                self._encode(encoder, batch)
        encoder.close()
        with self._changed:
            leaving, self._open = list(self._open), {}
        self._deliver([(encoding, server_ending()) for encoding in leaving])

    def _next(self, patience_s: float | None) -> list[Waiting[Encoding]]:
        """Block until there is a batch; an empty one when closed, and after `patience_s` without any text."""
        with self._changed:
            while not self._closed:
                wait_s = self._wait_s()
                if wait_s is not None and wait_s <= 0:
                    batch = self._waiting.next()
                    if self._waiting:
                        self._changed.notify()  # another replica may be idle
                    return batch
                if not self._changed.wait(patience_s if wait_s is None else wait_s) and wait_s is None:
                    break
            return []

    def _wait_s(self) -> float | None:
        """How long to wait for more texts; None: until there is one."""
        if not self._waiting:
            return None
        if not self._limits.wait_s or self._waiting.tokens >= self._limits.batch_tokens:
            return 0.0
        first = next(iter(self._open))
        return first.accepted_s + self._limits.wait_s - time.perf_counter()

    def _encode(self, encoder: Encoder, batch: list[Waiting[Encoding]]) -> None:
        began_s = time.perf_counter()
        try:
            rows = encoder.encode([text.tokens for text in batch])
        except Exception as error:  # noqa: BLE001  onnxruntime raises a dozen unrelated types; the thread must go on
            self._fail(batch, self._broken(str(error)))
            return
        self.stats.encoded(sum(len(text.tokens) for text in batch), time.perf_counter() - began_s)
        wrong = [text for text, row in zip(batch, rows, strict=True) if not np.isfinite(row).all()]
        if wrong:
            self._fail(wrong, self._broken("an embedding is not finite"))
        with self._changed:
            ended = self._note(batch, rows)
        now_s = time.perf_counter()
        for encoding in ended:
            self.stats.ended(now_s - encoding.accepted_s)
        if ended:
            self._deliver([(encoding, None) for encoding in ended])

    def _note(self, batch: list[Waiting[Encoding]], rows: Float) -> list[Encoding]:
        """Write what was found to the requests that still want it; returns those that have it all."""
        ended: list[Encoding] = []
        for text, row in zip(batch, rows, strict=True):
            encoding = text.owner
            if encoding not in self._open:
                continue
            encoding.embeddings[text.row] = row
            encoding.left -= 1
            if not encoding.left:
                self._forget(encoding)
                ended.append(encoding)
        return ended

    def _broken(self, reason: str) -> InferenceError:
        _log.error("batch failed", model=self._name, error=reason[:500])
        return model_failed()

    def _fail(self, texts: list[Waiting[Encoding]], error: InferenceError) -> None:
        """End the requests of `texts`."""
        with self._changed:
            owners = {text.owner for text in texts}
            failed = [encoding for encoding in self._open if encoding in owners]
            for encoding in failed:
                self._forget(encoding)
        for _ in failed:
            self.stats.failed()
        self._deliver([(encoding, error) for encoding in failed])

    def _forget(self, encoding: Encoding) -> None:
        self._waiting.remove(encoding)
        self._open.pop(encoding, None)

    def _patience_s(self) -> float:
        """When what waits is probably done."""
        tokens_per_s = self.stats.snapshot().tokens_per_s
        return self._waiting.tokens / tokens_per_s if tokens_per_s else 0.0
