"""The rule of hours, cap and busy inference; and a fetch that obeys it over simulated links."""

import calendar
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))

from agent_simulators import Node, Publisher

from agent.console import show_status
from agent.pacer import QUIET_S, Load, Pace, pace
from agent.settings import AgentSettings
from host.schedule import DAYS, Hours, Schedule
from host.settings import load_settings
from wire.errors import ConfigError
from wire.messages import State
from wire.serving import ModelStats, RuntimeStats

MONDAY_S = calendar.timegm((2026, 6, 1, 0, 0, 0))
HOUR_S = 3600
WORK = {"days": ["mon", "tue", "wed", "thu", "fri"], "start": "07:00", "end": "19:00", "limit_bytes_per_s": 0}
NIGHT = {"start": "22:30", "end": "05:00", "limit_bytes_per_s": 5_000_000}


def settings(*hours: dict[str, object], **more: object) -> AgentSettings:
    bandwidth = {"clock": "utc", "schedule": list(hours), **more}
    return AgentSettings.model_validate(
        {"node": "n", "store": "s", "trust": "t", "broker": {"host": "h"}, "bandwidth": bandwidth,
         "bandwidth_limit_bytes_per_s": 1_000_000}
    )  # fmt: skip


@pytest.mark.parametrize(
    ("day", "hour", "limit", "until"),
    [
        (0, 6.99, 1_000_000, None), (0, 7, 0, "mon 19:00"), (4, 18.99, 0, "fri 19:00"), (4, 19, 1_000_000, None),
        (5, 12, 1_000_000, None), (6, 23, 5_000_000, "mon 05:00"), (0, 4.99, 5_000_000, "mon 05:00"),
        (0, 5, 1_000_000, None), (2, 22.5, 5_000_000, "thu 05:00"),
    ],
)  # fmt: skip
def test_hours_of_the_week_have_their_limits(day: int, hour: float, limit: int, until: str | None) -> None:
    held = pace(settings(WORK, NIGHT), MONDAY_S + 24 * HOUR_S * day + hour * HOUR_S, busy=False)
    assert held.limit_bytes_per_s == limit
    assert held.why.endswith(f"until {until} (utc time)") if until else held.why == ""
    assert held.is_pause == (limit == 0)


def test_local_hours_follow_the_time_zone(monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    monkeypatch.setenv("TZ", "Asia/Shanghai")
    time.tzset()
    try:
        local = Schedule.model_validate({"schedule": [WORK]})
        assert local.hours_at(MONDAY_S - HOUR_S) == local.schedule[0]  # 07:00 of Monday there
        assert local.hours_at(MONDAY_S - HOUR_S - 1) is None
        assert local.ends(MONDAY_S) == "mon 19:00"
    finally:
        monkeypatch.undo()
        time.tzset()


def test_first_hours_count_and_a_schedule_without_end_has_none() -> None:
    always = {"start": "00:00", "end": "24:00", "limit_bytes_per_s": 7}
    both = settings(always, WORK)
    assert pace(both, MONDAY_S + 8 * HOUR_S, busy=False) == Pace(7, "at most 7 bytes/s by the schedule")


MINUTES = st.integers(0, 1439)


@given(st.integers(0, 7 * 24 * 60 - 1), st.sets(st.sampled_from(DAYS), min_size=1), MINUTES, MINUTES)
def test_hours_that_wrap_hold_for_as_many_minutes_as_they_are_long(
    at: int, days: set[str], start: int, end: int
) -> None:
    text = lambda minute: f"{minute // 60:02}:{minute % 60:02}"  # noqa: E731
    hours = Hours(days=tuple(sorted(days)), start=text(start), end=text(end), limit_bytes_per_s=0)
    length = (end - start) % 1440 or 1440
    began = [minute for minute in range(at - length + 1, at + 1) if minute % 1440 == start]
    assert hours.holds(at // 1440, at % 1440) == any(DAYS[minute // 1440 % 7] in days for minute in began)


def test_smaller_of_schedule_and_busy_limit_holds() -> None:
    noon, sunday = MONDAY_S + 12 * HOUR_S, MONDAY_S - 12 * HOUR_S
    chosen = settings(WORK, NIGHT, busy_limit_bytes_per_s=100)
    assert pace(chosen, sunday, busy=True) == Pace(100, "at most 100 bytes/s while inference is busy")
    assert pace(chosen, sunday, busy=False) == Pace(1_000_000)
    assert pace(chosen, noon, busy=True).why.startswith("paused by the schedule")
    assert pace(settings(WORK), sunday, busy=True) == Pace(1_000_000)
    assert pace(settings(busy_limit_bytes_per_s=0), sunday, busy=True) == Pace(0, "paused while inference is busy")


def stats(busy_s: float, active: int = 0) -> RuntimeStats:
    row = ModelStats(model="m", version="1", decoded="0" * 64, requests=0, failures=0, prompt_tokens=0,
                     completion_tokens=0, busy_s=busy_s, active=active)  # fmt: skip
    return RuntimeStats(pid=1, started_s=0, models=(row,))


def test_runtime_is_busy_by_its_steps_or_requests_and_for_a_while_after() -> None:
    load = Load()
    load.observe(stats(50.0), 100.0)
    assert not load.is_busy(100.0), "what was before the first reading says nothing"
    load.observe(stats(50.1), 102.0)
    assert not load.is_busy(102.0)
    load.observe(stats(50.5), 104.0)
    assert load.is_busy(104.0)
    assert load.is_busy(104.0 + QUIET_S - 0.1)
    assert not load.is_busy(104.0 + QUIET_S)
    load.observe(stats(50.5, active=1), 120.0)
    assert load.is_busy(120.0)


@pytest.mark.parametrize(
    ("line", "key"),
    [('start = "7:00"\nend = "19:00"', "start"), ('start = "07:00"\nend = "25:00"', "end"),
     ('days = ["monday"]\nstart = "07:00"\nend = "08:00"', "days"), ('start = "07:00"', "end")],
)  # fmt: skip
def test_hours_that_are_none_are_refused_by_key(tmp_path: Path, line: str, key: str) -> None:
    path = tmp_path / "agent.toml"
    path.write_text(f"[[schedule]]\n{line}\nlimit_bytes_per_s = 0\n")
    with pytest.raises(ConfigError, match=rf"schedule.0.{key}"):
        load_settings(Schedule, path)


class Wall:
    """A clock whose wall is set by the test."""

    def __init__(self, wall_s: float) -> None:
        self.now_s = wall_s
        self.passed_s = 1000.0

    def wall_s(self) -> float:
        return self.now_s

    def monotonic_s(self) -> float:
        self.passed_s += 0.01
        return self.passed_s


def test_fetch_pauses_by_the_schedule_beyond_its_deadline_and_goes_on_afterwards(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    node = Node(tmp_path, Publisher(), bandwidth={"clock": "utc", "schedule": [WORK]}, deadlines={"fetching": 30.0})
    wall = Wall(MONDAY_S + 12 * HOUR_S)
    node.clock = wall
    node.boot()
    node.start()
    made = node.publisher.make("1.0", weights_bytes=2_000_000)
    node.broker.offer(made)
    node.order(1, made)
    node.run_until(lambda: node.journal.deployments() and node.row.state is State.FETCHING)
    for _ in range(20):
        wall.passed_s += 10.0
        node.turn()
    assert node.row.state is State.FETCHING
    assert node.broker.sent == []
    assert node.links.limits == []
    note = "paused by the schedule until mon 19:00 (utc time)"
    node.run_until(lambda: node.reported().models[0].detail == note)
    show_status(node.settings)
    assert f"0 of {made.manifest.frame_count} frames verified, {note}" in capsys.readouterr().out
    wall.now_s += 8 * HOUR_S
    node.run_until(lambda: node.row.state is State.COMMITTED)
    assert node.links.limits == [None]


def test_fetch_makes_way_for_inference_and_takes_up_its_pace_again(tmp_path: Path) -> None:
    node = Node(tmp_path, Publisher(), bandwidth={"busy_limit_bytes_per_s": 0})
    node.start()
    old = node.publisher.make("1.0")
    node.broker.offer(old)
    node.order(1, old)
    node.run_until(lambda: node.journal.deployments() and node.row.state is State.COMMITTED)
    node.runtime.active = 1
    node.engine._ports.pacer._load.observe(node.runtime.stats(), node.clock.monotonic_s())
    made = node.publisher.make("2.0", weights_bytes=2_000_000)
    node.broker.offer(made)
    node.order(2, made)
    node.run_until(lambda: node.row.release == made.digest and node.row.state is State.FETCHING)
    for _ in range(10):
        node.turn()
    assert not any(artifact == made.artifact for artifact, _ in node.broker.sent)
    assert "paused while inference is busy" in node.reported().models[0].detail
    node.runtime.active = 0
    node.engine._ports.pacer._load._busy_until_s = 0.0
    node.run_until(lambda: node.row.state is State.COMMITTED)
