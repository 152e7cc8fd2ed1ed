"""How fast frames may come now: the node's cap, its schedule, and what inference leaves. Asked by the engine's thread.

Invariant: asking never blocks; the runtime is polled on a work thread, only while somebody asks. A runtime that does
not answer is not busy.
"""

from dataclasses import dataclass

from agent.mailbox import Workshop
from agent.runtime_client import Runtime
from agent.settings import AgentSettings
from host.clock import Clock
from wire.errors import AmperageError
from wire.serving import RuntimeStats

POLL_S = 2.0
BUSY_SHARE = 0.1
"""Share of the time between two polls that the engines spent in steps, from which the runtime counts as busy."""
QUIET_S = 10.0
"""It stays busy for this long after the last request: a fetch that begins and ends all the time helps nobody."""


@dataclass(frozen=True, slots=True)
class Pace:
    """`limit_bytes_per_s` None is no limit, 0 is a pause; `why` is for people, empty when there is nothing to say."""

    limit_bytes_per_s: int | None
    why: str = ""

    @property
    def is_pause(self) -> bool:
        """True when nothing may come."""
        return self.limit_bytes_per_s == 0


class Pacer:
    """The pace of this node."""

    def __init__(self, settings: AgentSettings, runtime: Runtime, clock: Clock, workshop: Workshop) -> None:
        self._settings, self._runtime, self._clock, self._workshop = settings, runtime, clock, workshop
        self._load = Load()
        self._poll_due_s = 0.0

    def now(self) -> Pace:
        """The pace that holds now."""
        busy_limit = self._settings.bandwidth.busy_limit_bytes_per_s
        busy = False
        if busy_limit is not None:
            now_s = self._clock.monotonic_s()
            if now_s >= self._poll_due_s:
                self._poll_due_s = now_s + POLL_S
                self._workshop.start("load", self._poll)
            busy = self._load.is_busy(now_s)
        return pace(self._settings, self._clock.wall_s(), busy=busy)

    def _poll(self) -> None:
        try:
            stats = self._runtime.stats()
        except AmperageError:
            return
        self._load.observe(stats, self._clock.monotonic_s())


@dataclass(slots=True)
class Load:
    """Whether the runtime is busy, from its counters."""

    _seen: tuple[float, float] | None = None
    """When, and the seconds spent in steps by then."""
    _busy_until_s: float = float("-inf")

    def observe(self, stats: RuntimeStats, now_s: float) -> None:
        """Take a reading."""
        busy_s = sum(row.busy_s for row in stats.models)
        active = any(row.active for row in stats.models)
        if self._seen is not None:
            seen_s, before_s = self._seen
            active = active or busy_s - before_s > BUSY_SHARE * max(now_s - seen_s, 0.0)
        self._seen = (now_s, busy_s)
        if active:
            self._busy_until_s = now_s + QUIET_S

    def is_busy(self, now_s: float) -> bool:
        """True from a reading with work until QUIET_S after the last one."""
        return now_s < self._busy_until_s


def pace(settings: AgentSettings, wall_s: float, *, busy: bool) -> Pace:
    """The rule: the schedule's hours replace the cap, and the smaller of that and the limit while busy holds."""
    schedule = settings.bandwidth
    hours = schedule.hours_at(wall_s)
    held = Pace(schedule.limit_at(wall_s, settings.bandwidth_limit_bytes_per_s))
    if hours is not None:
        ends = schedule.ends(wall_s)
        until = f" until {ends} ({schedule.clock} time)" if ends else ""
        held = Pace(hours.limit_bytes_per_s, f"{_words(hours.limit_bytes_per_s)} by the schedule{until}")
    limit = schedule.busy_limit_bytes_per_s
    if busy and limit is not None and (held.limit_bytes_per_s is None or limit < held.limit_bytes_per_s):
        return Pace(limit, f"{_words(limit)} while inference is busy")
    return held


def _words(limit_bytes_per_s: int) -> str:
    return f"at most {limit_bytes_per_s} bytes/s" if limit_bytes_per_s else "paused"
