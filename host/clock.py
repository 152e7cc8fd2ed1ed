"""Time as a port: logic takes a Clock, so that a test can replay any history."""

import time
from typing import Protocol


class Clock(Protocol):
    """Two readings; whoever measures a span uses `monotonic_s`, whoever tells people uses `wall_s`."""

    def monotonic_s(self) -> float:
        """Seconds that never go back; meaningless across restarts."""
        ...

    def wall_s(self) -> float:
        """Seconds since 1970; may jump."""
        ...


class SystemClock:
    """The machine's clocks."""

    def monotonic_s(self) -> float:
        """CLOCK_MONOTONIC."""
        return time.monotonic()

    def wall_s(self) -> float:
        """CLOCK_REALTIME."""
        return time.time()
