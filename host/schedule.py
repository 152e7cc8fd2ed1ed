"""When how much of a link may be used: hours of the week with a limit each. Settings and pure rules; time is given.

Invariant: at every moment exactly one limit holds: that of the first hours that contain it, else the one outside.
Hours are read off the wall clock anew every time, so a change of the clock or of daylight saving time needs no care.
"""

import time
from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from host.settings import Settings

DAY_MINUTES = 24 * 60
Day = Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
DAYS: tuple[Day, ...] = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
TimeOfDay = Annotated[str, StringConstraints(pattern=r"^(([01][0-9]|2[0-3]):[0-5][0-9]|24:00)$", strict=True)]


class Hours(Settings):
    """One `[[bandwidth.schedule]]`; an `end` at or before `start` is on the next day."""

    days: Annotated[tuple[Day, ...], Field(min_length=1, strict=False)] = DAYS
    """Days on which the hours start."""
    start: TimeOfDay
    end: TimeOfDay
    limit_bytes_per_s: Annotated[int, Field(ge=0)]
    """0 pauses."""

    def holds(self, weekday: int, minute: int) -> bool:
        """Whether a minute of a day (0 is Monday) lies in these hours."""
        start, end = _minutes(self.start), _minutes(self.end)
        if start < end:
            return DAYS[weekday] in self.days and start <= minute < end
        return (DAYS[weekday] in self.days and minute >= start) or (DAYS[weekday - 1] in self.days and minute < end)


class Schedule(Settings):
    """`[bandwidth]`: hours of the week, by the clock on the wall or by UTC."""

    clock: Literal["local", "utc"] = "local"
    schedule: Annotated[tuple[Hours, ...], Field(max_length=64, strict=False)] = ()
    """The first that holds counts."""

    def hours_at(self, wall_s: float) -> Hours | None:
        """The hours that hold at a time in seconds since 1970, None outside of all."""
        now = time.localtime(wall_s) if self.clock == "local" else time.gmtime(wall_s)
        minute = 60 * now.tm_hour + now.tm_min
        return next((hours for hours in self.schedule if hours.holds(now.tm_wday, minute)), None)

    def limit_at(self, wall_s: float, outside_bytes_per_s: int) -> int | None:
        """The limit that holds at a time, 0 for a pause, None for none; outside of all hours, 0 means none."""
        hours = self.hours_at(wall_s)
        return hours.limit_bytes_per_s if hours else outside_bytes_per_s or None

    def ends(self, wall_s: float) -> str | None:
        """When what holds now ends, as `mon 18:00`; None when it never does. For people; exact to the minute."""
        held = self.hours_at(wall_s)
        for step in range(1, 7 * DAY_MINUTES + 1):
            then_s = wall_s - wall_s % 60 + 60 * step
            if self.hours_at(then_s) is not held:
                then = time.localtime(then_s) if self.clock == "local" else time.gmtime(then_s)
                return f"{DAYS[then.tm_wday]} {then.tm_hour:02}:{then.tm_min:02}"
        return None


def _minutes(text: str) -> int:
    return 60 * int(text[:2]) + int(text[3:])
