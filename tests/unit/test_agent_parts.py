"""The agent's smaller parts: settings, admission, soak, machine, telemetry windows, commands, what it imports."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from agent_simulators import Publisher

from agent import main as agent_main
from agent.admission import Fitness, check_room, choose, open_release
from agent.machine import Machine
from agent.settings import AgentSettings
from agent.soak import SILENT_POLLS_LIMIT, Soak, expected_speed
from agent.telemetry import window_figures
from agent.trust import PinnedTrust, load_trust
from host.settings import load_settings
from wire.digest import digest_of
from wire.documents import encode_document
from wire.errors import ArtifactError, Code, ConfigError, DeployError
from wire.manifest import Requirements
from wire.messages import State
from wire.release import ArtifactRef, DeltaRef, Release, Variant
from wire.serving import INTEGER_PREPACK_FACTOR, PREPACK_FACTOR, ModelStats, RuntimeStats

MINIMAL = 'node = "n"\nstore = "/s"\ntrust = "/t"\n[broker]\nhost = "h"\n'
PLENTY = Fitness(1 << 40, 1 << 40, frozenset({"asimddp"}), frozenset())


def settings_of(tmp_path: Path, text: str) -> AgentSettings:
    path = tmp_path / "agent.toml"
    path.write_text(text)
    return load_settings(AgentSettings, path)


def test_minimal_settings_have_the_defaults_of_the_tables(tmp_path):
    settings = settings_of(tmp_path, MINIMAL)
    assert settings.deadline_s(State.PROBING) == 600.0
    assert settings.runtime.admin_socket == Path("/run/amperage/admin.sock")


def test_soak_longer_than_its_deadline_moves_the_deadline(tmp_path):
    settings = settings_of(tmp_path, "soak_s = 80000\n" + MINIMAL)
    assert settings.deadline_s(State.SOAKING) > 80_000


def test_deadline_of_an_unknown_or_final_state_is_refused(tmp_path):
    for state in ("flying", "committed"):
        with pytest.raises(ConfigError, match="no such state"):
            settings_of(tmp_path, MINIMAL + f"[deadlines]\n{state} = 5\n")


@pytest.mark.parametrize("root", ["a/+", "#", "", "a//b", "/a"])
def test_topic_root_that_could_match_others_is_refused(tmp_path, root):
    with pytest.raises(ConfigError, match="root"):
        settings_of(tmp_path, f'root = "{root}"\n' + MINIMAL)


def test_trust_that_is_missing_or_broken_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match="missing"):
        load_trust(tmp_path / "trust.json")
    (tmp_path / "trust.json").write_bytes(b"{}")
    with pytest.raises(ConfigError, match="trust"):
        load_trust(tmp_path / "trust.json")


def variant(name: str, *, ram: int = 0, features: tuple[str, ...] = (), deltas: tuple[DeltaRef, ...] = ()) -> Variant:
    requirements = Requirements(ram_bytes=ram, disk_bytes=0, cpu_features=features)
    full = ArtifactRef(manifest="f" * 64, wire_bytes=1000)
    return Variant(name=name, decoded="d" * 64, full=full, deltas=deltas, requirements=requirements)


def release(*variants: Variant) -> Release:
    return Release(model="tales", version="1", sequence=1, variants=variants)


def test_first_variant_that_fits_is_chosen_by_its_smallest_delta():
    deltas = (
        DeltaRef(manifest="a" * 64, wire_bytes=300, base="1" * 64),
        DeltaRef(manifest="b" * 64, wire_bytes=100, base="2" * 64),
        DeltaRef(manifest="c" * 64, wire_bytes=10, base="3" * 64),
    )
    node = Fitness(1000, 0, frozenset(), frozenset({"1" * 64, "2" * 64}))
    choice = choose(
        release(variant("big", ram=2000), variant("sve", features=("sve",)), variant("x", deltas=deltas)), node
    )
    assert (choice.variant.name, choice.artifact.manifest, choice.base) == ("x", "b" * 64, "2" * 64)


def test_delta_that_costs_more_than_the_full_artifact_is_not_taken():
    delta = DeltaRef(manifest="a" * 64, wire_bytes=1000, base="1" * 64)
    node = Fitness(1000, 0, frozenset(), frozenset({"1" * 64}))
    assert choose(release(variant("x", deltas=(delta,))), node).base is None


def test_node_that_fits_nothing_is_told_what_each_variant_needs():
    node = Fitness(10, 0, frozenset(), frozenset())
    with pytest.raises(DeployError, match=r"big: needs 2000 bytes.*sve: needs CPU features sve") as caught:
        choose(release(variant("big", ram=2000), variant("sve", features=("sve",))), node)
    assert caught.value.code is Code.UNFIT_NODE


@pytest.mark.parametrize(
    ("sessions", "factor"),
    [(0, 1.0), (1, 1.0 + PREPACK_FACTOR), (2, 1.0 + PREPACK_FACTOR + INTEGER_PREPACK_FACTOR)],
)
def test_room_is_needed_for_pack_version_and_packed_weights(sessions: int, factor: float):
    made = Publisher().make("1.0", weights_bytes=10_000)
    decoded = sum(len(content) for content in made.files.values())
    needed = len(made.pack) + round(decoded * factor) + 7
    short = Fitness(None, needed - 1, frozenset(), frozenset())
    with pytest.raises(DeployError, match=str(needed)) as caught:
        check_room(made.manifest, short, 7, sessions)
    assert caught.value.code is Code.NO_SPACE
    assert ('disk = "small"' in caught.value.message) == bool(sessions)
    check_room(made.manifest, Fitness(None, needed, frozenset(), frozenset()), 7, sessions)


def test_release_of_another_model_is_refused():
    publisher = Publisher()
    with pytest.raises(ArtifactError) as caught:
        open_release(PinnedTrust(publisher.policy), publisher.make("1.0").release, "another")
    assert caught.value.code is Code.BAD_DOCUMENT


def stats(decoded: str = "d" * 64, pid: int = 1, **more) -> RuntimeStats:
    figures = {"requests": 20, "failures": 0, "prompt_tokens": 0, "completion_tokens": 0, "busy_s": 1.0, "active": 0}
    row = ModelStats(model="tales", version="1", decoded=decoded, **{**figures, **more})
    return RuntimeStats(pid=pid, started_s=1.0, models=(row,))


@pytest.mark.parametrize(
    ("after", "fault"),
    [
        (stats(requests=40), None),
        (stats(requests=140, failures=2), None),
        (stats(requests=40, failures=1), "1 of 20 requests failed"),
        (stats(pid=2), "started again"),
        (stats(decoded="e" * 64), "no longer serves"),
        (stats(tokens_per_s=34.0), None),
        (stats(tokens_per_s=33.0), "slower"),
        (stats(tokens_per_s=1.0, requests=3), None),
    ],
)
def test_soak_judges_what_changed_since_its_beginning(after, fault):
    soak = Soak("tales", "d" * 64, 100.0)
    assert soak.judge(stats()) is None
    found = soak.judge(after)
    assert (found is None) if fault is None else (fault in found)


def test_soak_bears_some_silence_but_not_for_long():
    soak = Soak("tales", "d" * 64, None)
    for _ in range(SILENT_POLLS_LIMIT - 1):
        assert soak.silence() is None
    soak.judge(stats())
    verdicts = [soak.silence() for _ in range(SILENT_POLLS_LIMIT)]
    assert verdicts[:-1] == [None] * (SILENT_POLLS_LIMIT - 1)
    assert "stopped answering" in verdicts[-1]


def test_expected_speed_is_the_slower_of_what_is_known():
    loaded = stats(tokens_per_s=40.0).models[0]
    assert expected_speed(100.0, loaded) == 40.0
    assert expected_speed(100.0, stats(tokens_per_s=40.0, requests=2).models[0]) == 100.0
    assert expected_speed(None, None) is None


def test_machine_that_gives_nothing_leaves_every_figure_absent(tmp_path):
    machine = Machine(tmp_path)
    assert machine.cpu_times() is None
    assert machine.memory() == (None, None)
    assert (machine.load_1min(), machine.memory_pressure_10s(), machine.temperature_c()) == (None, None, None)
    assert machine.pss_bytes(1) is None
    assert machine.cpu_features() == frozenset()


def test_machine_reads_proc_and_sys_with_their_units(tmp_path):
    for name, text in {
        "proc/stat": "cpu  10 0 5 80 5 0 0 0 0 0\ncpu0 1 1 1 1 1 1 1 1\n",
        "proc/meminfo": "MemTotal:  2048 kB\nMemFree: 1 kB\nMemAvailable:   1024 kB\n",
        "proc/loadavg": "0.50 0.1 0.1 1/100 5\n",
        "proc/pressure/memory": "some avg10=1.25 avg60=0.00 avg300=0.00 total=1\nfull avg10=9.00 total=0\n",
        "proc/7/smaps_rollup": "0 [rollup]\nRss: 9 kB\nPss:                 12 kB\nPss_Dirty: 1 kB\n",
        "proc/cpuinfo": "processor : 0\nFeatures\t: fp asimd asimddp\n",
        "sys/class/thermal/thermal_zone0/temp": "0\n",
        "sys/class/thermal/thermal_zone1/temp": "48500\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    machine = Machine(tmp_path)
    assert (machine.cpu_times().busy, machine.cpu_times().total) == (15, 100)
    assert machine.memory() == (1024 * 1024, 2048 * 1024)
    assert (machine.load_1min(), machine.memory_pressure_10s(), machine.temperature_c()) == (0.5, 1.25, 48.5)
    assert machine.pss_bytes(7) == 12 * 1024
    assert machine.cpu_features() == {"fp", "asimd", "asimddp"}


def test_window_counts_from_the_reading_before_and_anew_after_a_load():
    before = stats(requests=10, completion_tokens=100, busy_s=1.0).models
    after = stats(requests=15, completion_tokens=160, busy_s=1.5, latency_p50_s=0.2).models
    (row,) = window_figures(before, after)
    assert (row.requests, row.completion_tokens, row.busy_s, row.latency_p50_s) == (5, 60, 0.5, 0.2)
    (reset,) = window_figures(after, stats(requests=2, completion_tokens=7, busy_s=0.1).models)
    assert (reset.requests, reset.completion_tokens) == (2, 7)
    (quiet,) = window_figures(after, after)
    assert (quiet.requests, quiet.latency_p50_s) == (0, None)


def test_command_with_wrong_settings_ends_with_status_78(tmp_path, capsys):
    (tmp_path / "agent.toml").write_text("node = 5\n")
    assert agent_main.main(["status", "--settings", str(tmp_path / "agent.toml")]) == 78
    assert "agent.toml" in capsys.readouterr().err


def test_status_of_a_fresh_node_needs_nothing_but_the_disk(tmp_path, capsys):
    settings = MINIMAL.replace("/s", str(tmp_path / "store"))
    (tmp_path / "agent.toml").write_text(settings)
    assert agent_main.main(["status", "--settings", str(tmp_path / "agent.toml")]) == 0
    assert "serves nothing" in capsys.readouterr().out


def test_doctor_names_every_fault_and_what_to_do(tmp_path, capsys):
    text = MINIMAL.replace("/s", str(tmp_path)).replace('host = "h"', 'host = "127.0.0.1"\nport = 1')
    (tmp_path / "agent.toml").write_text(text)
    assert agent_main.main(["doctor", "--settings", str(tmp_path / "agent.toml")]) == 1
    out = capsys.readouterr().out
    assert "ok    store" in out
    assert all(f"fault {name}" in out for name in ("trust", "runtime", "broker"))


def test_agent_process_never_loads_what_is_not_its_own():
    """As on a node, where rich and cryptography are not installed: two libraries take them when they find them."""
    code = """
import json, sys
sys.modules["rich"] = sys.modules["cryptography"] = None
import agent.main, agent.console, agent.decoding, host.mqtt, host.logs
host.logs.configure_logs(process="agent")
print(json.dumps(sorted({name.partition(".")[0] for name, module in sys.modules.items() if module})))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(json.loads(done.stdout))
    forbidden = {"numpy", "onnxruntime", "onnx", "cryptography", "rich", "typer", "codec", "runtime", "fleet", "forge",
                 "cli", "tokenizers", "zstandard", "starlette", "uvicorn", "jinja2"}  # fmt: skip
    assert loaded & forbidden == set()
    assert {"agent", "host", "wire", "paho", "pydantic"} <= loaded


def test_trust_policy_document_is_what_the_keys_command_writes(tmp_path):
    policy = Publisher().policy
    (tmp_path / "trust.json").write_bytes(encode_document(policy))
    made = Publisher().make("1.0")
    assert open_release(load_trust(tmp_path / "trust.json"), made.release, "tales").version == "1.0"
    assert made.digest == digest_of(made.release)
