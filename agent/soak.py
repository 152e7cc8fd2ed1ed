"""Whether a version that was just activated behaves: pure judgement over the runtime's counters.

The new version serves already; what it does worse than the old one must show here, while the old one is still mapped.
"""

from dataclasses import dataclass

from wire.serving import ModelStats, RuntimeStats

SLOWDOWN_LIMIT = 3.0
"""Times slower than the slower of the probe's measurement and the old version under the same load."""
FAILURE_SHARE_LIMIT = 0.02
REQUESTS_FOR_SPEED = 8
"""Fewer requests say little about speed."""
SILENT_POLLS_LIMIT = 5


@dataclass(slots=True)
class Soak:
    """One soak of `decoded`; `expected_tokens_per_s` is None when nothing was measured before."""

    model: str
    decoded: str
    expected_tokens_per_s: float | None
    _first: ModelStats | None = None
    _runtime: tuple[int, float] | None = None
    _silent: int = 0

    def judge(self, stats: RuntimeStats) -> str | None:
        """What is wrong, in words for the operator, or None."""
        self._silent = 0
        runtime = (stats.pid, stats.started_s)
        if self._runtime is not None and runtime != self._runtime:
            return "the runtime ended and was started again during the soak"
        self._runtime = runtime
        now = next((row for row in stats.models if row.model == self.model and row.decoded == self.decoded), None)
        if now is None:
            return "the runtime no longer serves the version"
        if self._first is None:
            self._first = now
        return self._failing(now) or self._slow(now)

    def silence(self) -> str | None:
        """The runtime did not answer; wrong after a few times in a row."""
        self._silent += 1
        return "the runtime stopped answering during the soak" if self._silent >= SILENT_POLLS_LIMIT else None

    def _failing(self, now: ModelStats) -> str | None:
        first = self._first or now
        failures, requests = now.failures - first.failures, now.requests - first.requests
        if failures > FAILURE_SHARE_LIMIT * max(requests, 1):
            return f"{failures} of {requests} requests failed during the soak"
        return None

    def _slow(self, now: ModelStats) -> str | None:
        expected, measured = self.expected_tokens_per_s, now.tokens_per_s
        if expected is None or measured is None or now.requests < REQUESTS_FOR_SPEED:
            return None
        if measured * SLOWDOWN_LIMIT < expected:
            return f"{measured:.1f} tokens/s where {expected:.1f} were measured before: more than 3 times slower"
        return None


def expected_speed(probe_tokens_per_s: float | None, before: ModelStats | None) -> float | None:
    """The slower of the probe's figure and the old version's under load: a probe runs alone, a server does not."""
    figures = [probe_tokens_per_s]
    if before is not None and before.requests >= REQUESTS_FOR_SPEED:
        figures.append(before.tokens_per_s)
    known = [figure for figure in figures if figure is not None and figure > 0]
    return min(known, default=None)
