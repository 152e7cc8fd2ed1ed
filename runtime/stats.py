"""Counters of one loaded version: written by its engine's thread, read by anyone.

Invariant: counters only grow and begin at 0 with the load; latencies are of the last 256 requests that ended well.
"""

import threading
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

WINDOW_REQUESTS = 256


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A reading; None is unknown, never 0."""

    requests: int
    failures: int
    prompt_tokens: int
    cached_tokens: int
    """Of them, those that were copied instead of read."""
    completion_tokens: int
    drafted_tokens: int
    accepted_tokens: int
    busy_s: float
    latency_p50_s: float | None
    latency_p95_s: float | None
    first_token_p50_s: float | None
    tokens_per_s: float | None
    """Tokens of all answers per second of decoding over the window: what the engine gives, however many ask. Of an
    encoder, tokens of texts per second of encoding."""


@dataclass(frozen=True, slots=True)
class _Ended:
    latency_s: float
    first_token_s: float | None
    decoded_tokens: int
    decode_s: float


class Stats:
    """Counters of one version."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests = self._failures = 0
        self._prompt_tokens = self._cached_tokens = self._completion_tokens = self._decoded_tokens = 0
        self._drafted_tokens = self._accepted_tokens = 0
        self._busy_s = self._decode_s = 0.0
        self._window: deque[_Ended] = deque(maxlen=WINDOW_REQUESTS)

    def began(self, prompt_tokens: int) -> None:
        """A request was accepted."""
        with self._lock:
            self._requests += 1
            self._prompt_tokens += prompt_tokens

    def recalled(self, tokens: int) -> None:
        """So many tokens of a prompt were copied from what is kept."""
        with self._lock:
            self._cached_tokens += tokens

    def failed(self) -> None:
        """A request that was accepted failed by no fault of its client."""
        with self._lock:
            self._failures += 1

    def decoded(self, tokens: int, span_s: float) -> None:
        """A decode step gave `tokens`."""
        with self._lock:
            self._completion_tokens += tokens
            self._decoded_tokens += tokens
            self._decode_s += span_s
            self._busy_s += span_s

    def speculated(self, drafted: int, accepted: int) -> None:
        """Of `drafted` tokens that were verified, `accepted` became the answer's."""
        with self._lock:
            self._drafted_tokens += drafted
            self._accepted_tokens += accepted

    def prefilled(self, tokens: int, span_s: float) -> None:
        """A chunk of a prompt was read; it gave `tokens`, one when it was the last chunk."""
        with self._lock:
            self._completion_tokens += tokens
            self._busy_s += span_s

    def encoded(self, tokens: int, span_s: float) -> None:
        """A batch of texts of `tokens` was encoded."""
        with self._lock:
            self._decoded_tokens += tokens
            self._decode_s += span_s
            self._busy_s += span_s

    def ended(self, latency_s: float, first_token_s: float | None = None) -> None:
        """A request ended well; both spans begin when it was accepted."""
        with self._lock:
            self._window.append(_Ended(latency_s, first_token_s, self._decoded_tokens, self._decode_s))

    def snapshot(self) -> Snapshot:
        """All figures at this moment."""
        with self._lock:
            window = list(self._window)
            latencies = [e.latency_s for e in window]
            firsts = [e.first_token_s for e in window if e.first_token_s is not None]
            return Snapshot(
                self._requests, self._failures, self._prompt_tokens, self._cached_tokens, self._completion_tokens,
                self._drafted_tokens, self._accepted_tokens, self._busy_s,
                quantile(latencies, 0.5), quantile(latencies, 0.95), quantile(firsts, 0.5), self._rate(window),
            )  # fmt: skip

    def _rate(self, window: list[_Ended]) -> float | None:
        tokens, span_s = self._decoded_tokens, self._decode_s
        if len(window) == WINDOW_REQUESTS:
            tokens, span_s = tokens - window[0].decoded_tokens, span_s - window[0].decode_s
        return tokens / span_s if tokens and span_s > 0 else None


def quantile(values: Iterable[float], share: float) -> float | None:
    """The value that `share` of `values` do not exceed (nearest rank), None of nothing."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None
