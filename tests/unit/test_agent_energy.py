"""Energy over fake sysfs trees: right unit, right label, wrap, sentinels, and never 0 for unknown."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.energy import CounterMeter, EnergySampler, EstimateMeter, PowerMeter, attribute, find_sensor
from agent.machine import Machine
from agent.settings import EnergySettings
from wire.messages import EnergyFigure, Method


def tree(root: Path, **files: str) -> Path:
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


def xgene(root: Path, chip: str = "hwmon3", cpu: int = 22_040_000, io: int = 8_000_000) -> Path:
    """As drivers/hwmon/xgene-hwmon.c shows it, with the channels in the order that its documentation denies."""
    return tree(root / f"class/hwmon/{chip}", name="apm_xgene", power1_label="IO power", power1_input=str(io),
                power2_label="CPU power", power2_input=str(cpu), temp1_label="SoC Temperature")  # fmt: skip


def rapl(root: Path, energy_uj: int, *, enabled: str = "1") -> Path:
    zone = tree(root / "class/powercap/intel-rapl:0", name="package-0", energy_uj=str(energy_uj), enabled=enabled,
                max_energy_range_uj="262143328850")  # fmt: skip
    tree(root / "class/powercap/intel-rapl:0:0", name="core", energy_uj=str(energy_uj), enabled=enabled)
    return zone


def test_xgene_channels_are_matched_by_label_and_read_as_microwatts(tmp_path):
    xgene(tmp_path)
    meter = find_sensor(tmp_path)
    assert meter.source == "xgene-hwmon:CPU power+IO power"
    assert meter.advance(10.0) is None
    increment = meter.advance(12.0)
    assert (increment.energy_j, increment.span_s) == (pytest.approx(2 * 30.04), 2.0)


def test_second_socket_is_added(tmp_path):
    xgene(tmp_path)
    xgene(tmp_path, "hwmon7", cpu=10_000_000, io=1_000_000)
    meter = find_sensor(tmp_path)
    meter.advance(0.0)
    assert meter.advance(1.0).energy_j == pytest.approx(41.04)


def test_power_is_integrated_by_trapezoids(tmp_path):
    xgene(tmp_path, cpu=10_000_000, io=1)
    meter = find_sensor(tmp_path)
    meter.advance(0.0)
    xgene(tmp_path, cpu=20_000_000, io=1)
    assert meter.advance(1.0).energy_j == pytest.approx(15.0, rel=1e-3)


def test_channel_that_disappears_makes_a_gap_and_never_a_zero(tmp_path):
    xgene(tmp_path)
    meter = find_sensor(tmp_path)
    meter.advance(0.0)
    channel = tmp_path / "class/hwmon/hwmon3/power1_input"
    channel.unlink()
    assert meter.advance(1.0) is None
    channel.write_text("8000000\n")
    assert meter.advance(2.0) is None
    assert meter.advance(3.0).span_s == 1.0


@pytest.mark.parametrize("sentinel", ["4294967295000", "0", "-5", "", "n/a"])
def test_impossible_power_is_unknown(tmp_path, sentinel):
    tree(tmp_path / "class/hwmon/hwmon0", name="power_meter", power1_average=sentinel)
    assert find_sensor(tmp_path) is None


def test_acpi_power_meter_wins_over_other_chips_and_batteries_are_no_node(tmp_path):
    tree(tmp_path / "class/hwmon/hwmon0", name="amdgpu", power1_average="90000000")
    tree(tmp_path / "class/hwmon/hwmon1", name="ina226", power1_input="5000000")
    tree(tmp_path / "class/hwmon/hwmon2", name="power_meter", power1_average="70000000")
    assert find_sensor(tmp_path).source == "hwmon:power_meter:power1_average"
    (tmp_path / "class/hwmon/hwmon2/power1_is_battery").write_text("1\n")
    assert find_sensor(tmp_path).source == "hwmon:ina226:power1_input"


def test_rapl_counts_packages_only_and_survives_the_wrap(tmp_path):
    rapl(tmp_path, 262_143_000_000)
    meter = find_sensor(tmp_path)
    assert meter.source == "powercap:package-0"
    meter.advance(0.0)
    rapl(tmp_path, 4_671_150)
    assert meter.advance(1.0).energy_j == pytest.approx(5.0)


def test_rapl_that_is_switched_off_or_unreadable_is_no_sensor(tmp_path):
    rapl(tmp_path, 0, enabled="0")
    assert find_sensor(tmp_path) is None


def test_counter_that_went_back_without_a_range_gives_nothing(tmp_path):
    zone = tree(tmp_path / "zone", energy_uj="500")
    meter = CounterMeter("powercap:x", (zone,))
    meter.advance(0.0)
    tree(zone, energy_uj="100")
    assert meter.advance(1.0) is None
    tree(zone, energy_uj="1000100")
    assert meter.advance(2.0).energy_j == pytest.approx(1.0)


@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=30), st.integers(10**9 + 1, 10**10))
def test_wrapping_counter_adds_up_to_what_was_used(tmp_path_factory, steps_uj, span_uj):
    zone = tree(tmp_path_factory.mktemp("z"), energy_uj="0", max_energy_range_uj=str(span_uj))
    meter = CounterMeter("powercap:x", (zone,))
    meter.advance(0.0)
    total, measured = 0, 0.0
    for i, step in enumerate(steps_uj):
        total += step
        tree(zone, energy_uj=str(total % span_uj))
        increment = meter.advance(float(i + 1))
        measured += increment.energy_j if increment else 0.0
    assert measured == pytest.approx(total / 1e6)


def test_node_without_sensors_gets_an_estimate_that_says_so(tmp_path):
    tree(tmp_path / "proc", stat="cpu 100 0 0 900 0 0 0 0 0 0")
    settings = EnergySettings(sysfs=tmp_path, estimate_idle_w_per_core=1.0, estimate_busy_w_per_core=3.0)
    machine = Machine(tmp_path)
    sampler = EnergySampler(settings, machine)
    sampler.sample(0.0)
    tree(tmp_path / "proc", stat="cpu 150 0 0 950 0 0 0 0 0 0")
    sampler.sample(2.0)
    figure = sampler.close_window(4.0)
    assert (figure.method, figure.source) == (Method.ESTIMATED, "estimate:busy-time")
    assert figure.power_w == pytest.approx(machine.cores() * 2.0)
    assert (figure.coverage, figure.samples) == (0.5, 1)


def test_window_in_which_nothing_is_known_has_no_figure(tmp_path):
    sampler = EnergySampler(EnergySettings(sysfs=tmp_path), Machine(tmp_path))
    sampler.sample(0.0)
    sampler.sample(1.0)
    assert sampler.close_window(1.0) is None


def test_sensor_that_falls_silent_makes_the_window_an_estimate(tmp_path):
    xgene(tmp_path)
    tree(tmp_path / "proc", stat="cpu 100 0 0 900 0 0 0 0 0 0")
    sampler = EnergySampler(EnergySettings(sysfs=tmp_path), Machine(tmp_path))
    sampler.sample(0.0)
    sampler.sample(1.0)
    assert sampler.close_window(1.0).method is Method.MEASURED
    (tmp_path / "class/hwmon/hwmon3/power1_input").unlink()
    tree(tmp_path / "proc", stat="cpu 150 0 0 950 0 0 0 0 0 0")
    sampler.sample(2.0)
    assert sampler.close_window(1.0).method is Method.ESTIMATED


def test_samples_far_apart_do_not_cover_what_lies_between(tmp_path):
    xgene(tmp_path)
    meter = find_sensor(tmp_path)
    assert isinstance(meter, PowerMeter)
    meter.advance(0.0)
    assert meter.advance(60.0) is None


@given(st.floats(0, 1e6), st.lists(st.floats(0, 100), max_size=5), st.floats(0.1, 60))
def test_attribution_conserves_energy(energy_j, busy_s, window_s):
    figure = EnergyFigure(source="x", method=Method.MEASURED, energy_j=energy_j, power_w=1.0, coverage=1.0, samples=9)
    parts, idle_j = attribute(figure, busy_s, window_s)
    assert sum(part.energy_j for part in parts) + idle_j == pytest.approx(energy_j)
    assert idle_j >= -1e-6 * max(energy_j, 1.0)
    assert all(part.method is Method.MEASURED and "busy time" in part.source for part in parts)


def test_estimate_needs_two_readings_of_proc_stat(tmp_path):
    meter = EstimateMeter(EnergySettings(), Machine(tmp_path))
    assert meter.advance(0.0) is None
    tree(tmp_path / "proc", stat="cpu 1 0 0 9 0 0 0 0 0 0")
    assert meter.advance(1.0) is None
