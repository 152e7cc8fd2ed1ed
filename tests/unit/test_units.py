"""systemd's own verdict on the units, users and folders, and that they name what the programs use by default."""

import configparser
import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from agent.settings import AgentSettings, RuntimeSockets
from host.settings import load_settings
from runtime.settings import RuntimeSettings
from wire.errors import ConfigError

UNITS = Path(__file__).resolve().parents[2] / "systemd"
SERVICES = ("amperage-agent.service", "amperage-runtime.service")
SOCKETS = ("amperage-inference.socket", "amperage-admin.socket")
EXPOSURE_LIMIT = 15
"""Tenths of systemd's exposure level; a unit without any hardening has 96."""

needs_analyze = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files to other users")


def read_unit(name: str) -> configparser.RawConfigParser:
    """A unit file; of a key that is repeated, all values, one per line."""

    class Repeated(dict[str, str]):
        def __setitem__(self, key: str, value: str) -> None:
            if isinstance(value, list) and key in self:
                value = [*self[key], *value]
            super().__setitem__(key, value)

    unit = configparser.RawConfigParser(strict=False, dict_type=Repeated, delimiters=("=",))
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(UNITS / name)
    return unit


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@needs_analyze
def test_systemd_finds_no_fault_in_the_units(tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    for name in (*SERVICES, *SOCKETS):
        text = (UNITS / name).read_text()
        for command in ("amperage-agent", "amperage-runtime"):
            text = text.replace(f"/opt/amperage/venv/bin/{command}", str(program))
        (tmp_path / name).write_text(text)
    said = run("systemd-analyze", "verify", "--man=no", *(str(tmp_path / name) for name in (*SERVICES, *SOCKETS)))
    assert str(tmp_path) not in said
    assert "amperage" not in said


@needs_analyze
@pytest.mark.parametrize("name", SERVICES)
def test_exposure_of_a_service_stays_low(name: str) -> None:
    run(
        "systemd-analyze",
        "security",
        "--offline=true",
        f"--threshold={EXPOSURE_LIMIT}",
        "--no-pager",
        str(UNITS / name),
    )


@pytest.mark.parametrize("name", SERVICES)
def test_service_survives_what_it_must_and_stops_at_unusable_settings(name: str) -> None:
    service = read_unit(name)["Service"]
    assert service["RestartPreventExitStatus"] == str(ConfigError.exit_status)
    assert service["OOMPolicy"] == "continue"
    assert service["PrivateUsers"] == "no"  # peer credentials would be 65534
    assert "ProcSubset" not in service  # /proc/cpuinfo and /proc/meminfo are needed
    assert "InaccessiblePaths" not in service
    assert "ORT_DISABLE_TELEMETRY=1" in service["Environment"].split()


@pytest.mark.parametrize("program", ["agent", "runtime"])
def test_service_that_must_notify_does(program: str) -> None:
    service = read_unit(f"amperage-{program}.service")["Service"]
    code = "".join(path.read_text() for path in (UNITS.parent / program).glob("*.py"))
    assert service["Type"] == "notify"
    assert "notify_ready(" in code
    assert "WatchdogSec" in service
    assert "notify_watchdog(" in code


def test_runtime_reaches_no_network_and_may_pin_its_threads() -> None:
    service = read_unit("amperage-runtime.service")["Service"]
    assert service["PrivateNetwork"] == "yes"
    assert service["RestrictAddressFamilies"] == "AF_UNIX"
    assert "ReadWritePaths" not in service  # with ProtectSystem=strict the store cannot be written
    assert service["ProtectSystem"] == "strict"
    packaged = load_settings(RuntimeSettings, UNITS.parent / "packaging" / "runtime.toml")
    assert packaged.cache == Path("/var/cache") / service["CacheDirectory"]  # what it can write instead
    assert "@resources" not in service["SystemCallFilter"]


def test_sockets_are_where_both_programs_look_and_open_to_the_right_users() -> None:
    agent, runtime = RuntimeSockets(), RuntimeSettings(store=Path("/var/lib/amperage"))
    assert (agent.public_socket, agent.admin_socket) == (runtime.public_socket, runtime.admin_socket)
    public, admin = (read_unit(name)["Socket"] for name in SOCKETS)
    assert public["ListenStream"] == str(runtime.public_socket)
    assert admin["ListenStream"] == str(runtime.admin_socket)
    assert (public["SocketMode"], public["SocketGroup"]) == ("0660", "amperage-clients")
    assert (admin["SocketMode"], admin["SocketUser"]) == ("0600", "amperage-agent")


def test_programs_are_started_with_arguments_that_they_take() -> None:
    agent = read_unit("amperage-agent.service")["Service"]["ExecStart"].split()
    runtime = read_unit("amperage-runtime.service")["Service"]["ExecStart"].split()
    assert agent[1:] == ["run", "--settings", "/etc/amperage/agent.toml"]
    assert runtime[1:] == ["serve", "--settings", "/etc/amperage/runtime.toml"]
    assert "store" in AgentSettings.model_fields


@needs_root
@pytest.mark.skipif(shutil.which("systemd-sysusers") is None, reason="systemd-sysusers is not installed")
def test_users_and_folders_are_made_as_the_units_expect(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    run("systemd-sysusers", f"--root={tmp_path}", str(UNITS / "sysusers.d" / "amperage.conf"))
    run("systemd-tmpfiles", f"--root={tmp_path}", "--create", str(UNITS / "tmpfiles.d" / "amperage.conf"))
    groups = dict(line.split(":")[0::2][:2] for line in (tmp_path / "etc" / "group").read_text().split())
    members = {line.split(":")[0]: line.split(":")[3] for line in (tmp_path / "etc" / "group").read_text().split()}
    users = {line.split(":")[0]: line.split(":")[2] for line in (tmp_path / "etc" / "passwd").read_text().splitlines()}
    assert members["amperage-store"] == "amperage-runtime"
    assert members["amperage-clients"] == ""
    store = (tmp_path / "var" / "lib" / "amperage").stat()
    assert stat.S_IMODE(store.st_mode) == 0o2750
    assert (str(store.st_uid), str(store.st_gid)) == (users["amperage-agent"], groups["amperage-store"])
