"""When to go on: a token bucket for bytes and a jittered back-off for attempts. Pure; time is passed in."""

import random
from dataclasses import dataclass, field


@dataclass(slots=True)
class TokenBucket:
    """At most `rate_per_s` on average and `burst` at once; may run into debt, because a packet is read whole."""

    rate_per_s: float
    burst: float
    level: float = field(init=False)
    _filled_s: float | None = None

    def __post_init__(self) -> None:
        self.level = self.burst

    def delay_s(self, now_s: float) -> float:
        """Seconds until something may be taken; 0.0 means now."""
        if self._filled_s is not None:
            self.level = min(self.burst, self.level + (now_s - self._filled_s) * self.rate_per_s)
        self._filled_s = now_s
        return max(0.0, -self.level / self.rate_per_s)

    def take(self, amount: float) -> None:
        """Account for `amount` that was taken."""
        self.level -= amount


@dataclass(slots=True)
class Backoff:
    """Delays that double from `first_s` to `most_s`, each shortened by up to half at random so that a fleet spreads."""

    first_s: float
    most_s: float
    draw: random.Random = field(default_factory=random.SystemRandom)
    attempts: int = 0

    def next_s(self) -> float:
        """Delay before the next attempt."""
        delay = min(self.most_s, self.first_s * 2.0 ** min(self.attempts, 30))
        self.attempts += 1
        return delay * self.draw.uniform(0.5, 1.0)

    def reset(self) -> None:
        """The attempt succeeded."""
        self.attempts = 0
