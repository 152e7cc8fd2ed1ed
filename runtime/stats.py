"""Counters of one loaded version, and its latencies over a window of requests."""

import threading
import time
from collections import deque
from dataclasses import dataclass, field

from wire.manifest import VersionDocument
from wire.serving import ModelStats

WINDOW_REQUESTS = 256


@dataclass(slots=True)
class StatsRecorder:
    """Written by the engine thread, read by anybody."""

    requests: int = 0
    failures: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    busy_s: float = 0.0
    _latencies_s: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW_REQUESTS))
    _first_tokens_s: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW_REQUESTS))
    _speeds: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW_REQUESTS))
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add_busy(self, seconds: float) -> None:
        """Time that the engine spent inside steps."""
        with self._lock:
            self.busy_s += seconds

    def reset(self) -> None:
        """Forget everything: a warm-up is not traffic."""
        with self._lock:
            self.requests = self.failures = self.prompt_tokens = self.completion_tokens = 0
            self.busy_s = 0.0
            for window in (self._latencies_s, self._first_tokens_s, self._speeds):
                window.clear()

    def add_failure(self) -> None:
        """A request that the server failed."""
        with self._lock:
            self.requests += 1
            self.failures += 1

    def add_request(self, started_s: float, first_token_s: float | None, prompt: int, produced: int) -> None:
        """A request that ended now; times on the monotonic clock."""
        now_s = time.monotonic()
        with self._lock:
            self.requests += 1
            self.prompt_tokens += prompt
            self.completion_tokens += produced
            self._latencies_s.append(now_s - started_s)
            if first_token_s is not None:
                self._first_tokens_s.append(first_token_s - started_s)
                if produced > 1 and now_s > first_token_s:
                    self._speeds.append((produced - 1) / (now_s - first_token_s))

    def snapshot(self, version: VersionDocument, decoded: str, active: int) -> ModelStats:
        """The figures as the admin socket shows them."""
        with self._lock:
            return ModelStats(
                model=version.model, version=version.version, decoded=decoded, requests=self.requests,
                failures=self.failures, prompt_tokens=self.prompt_tokens, completion_tokens=self.completion_tokens,
                busy_s=self.busy_s, active=active, latency_p50_s=percentile(self._latencies_s, 0.5),
                latency_p95_s=percentile(self._latencies_s, 0.95),
                first_token_p50_s=percentile(self._first_tokens_s, 0.5), tokens_per_s=percentile(self._speeds, 0.5),
            )  # fmt: skip


def percentile(values: "deque[float]", share: float) -> float | None:
    """The nearest-rank percentile, None of nothing."""
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else None
