"""What a process needs beside files: settings, logs, systemd, pacing."""

import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import pytest
from pydantic import Field

from host import notify
from host.pacing import Backoff, TokenBucket
from host.settings import FilePath, Settings, load_settings
from wire.errors import ConfigError


class Inner(Settings):
    port: Annotated[int, Field(ge=1)]


class Example(Settings):
    store: FilePath
    inner: Inner
    ratio: float = 1.0


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_settings_are_read_strictly_with_paths_from_strings(tmp_path):
    path = write(tmp_path / "a.toml", 'store = "/x"\nratio = 2\n[inner]\nport = 5\n')
    assert load_settings(Example, path) == Example(store=Path("/x"), inner=Inner(port=5), ratio=2.0)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('store = "/x"\ntypo = 1\n[inner]\nport = 5\n', "typo"),
        ('store = "/x"\n[inner]\nport = "5"\n', "inner.port"),
        ('store = "/x"\n[inner]\nport = 0\n', "inner.port"),
        ("[inner]\nport = 5\n", "store"),
        ("store = \n", "TOML"),
    ],
)
def test_settings_that_are_wrong_name_file_and_key(tmp_path, text, named):
    path = write(tmp_path / "a.toml", text)
    with pytest.raises(ConfigError) as caught:
        load_settings(Example, path)
    assert str(path) in caught.value.message
    assert named in caught.value.message
    assert caught.value.exit_status == 78


def test_settings_file_that_is_missing_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        load_settings(Example, tmp_path / "a.toml")


def test_logs_are_one_json_object_per_line_with_the_process():
    code = (
        "import logging, structlog; from host.logs import configure_logs; configure_logs('info', process='agent');"
        "structlog.get_logger().info('blob_committed', size_bytes=3); structlog.get_logger().debug('hidden');"
        "logging.getLogger('uvicorn').warning('foreign %s', 'line')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    own, foreign = (json.loads(line) for line in done.stdout.splitlines())
    assert (own["event"], own["size_bytes"], own["process"], own["level"]) == ("blob_committed", 3, "agent", "info")
    assert (foreign["event"], foreign["process"], foreign["level"]) == ("foreign line", "agent", "warning")
    assert own["timestamp"].endswith("Z")


def test_notifications_reach_the_notify_socket(tmp_path, monkeypatch):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(tmp_path / "n"))
        receiver.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "n"))
        notify.notify_ready("serving")
        notify.notify_watchdog()
        notify.notify_stopping()
        assert [receiver.recv(100) for _ in range(3)] == [b"READY=1\nSTATUS=serving", b"WATCHDOG=1", b"STOPPING=1"]


def test_notification_without_systemd_does_nothing(monkeypatch):
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    notify.notify_ready()
    monkeypatch.setenv("NOTIFY_SOCKET", "/nowhere/at/all")
    notify.notify_ready()


def test_watchdog_interval_is_half_of_what_systemd_says(monkeypatch):
    monkeypatch.setenv("WATCHDOG_USEC", "20000000")
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    assert notify.watchdog_interval_s() == 10.0
    monkeypatch.setenv("WATCHDOG_PID", "1")
    assert notify.watchdog_interval_s() is None


def test_inherited_sockets_come_by_name_and_only_to_their_process(tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        code = (
            f"import os; os.dup2({listener.fileno()}, 3); os.environ['LISTEN_PID'] = str(os.getpid());"
            "from host.notify import listen_fds; s = listen_fds();"
            "print({name: sock.getsockname() for name, sock in s.items()}, os.get_inheritable(3))"
        )
        env = {**os.environ, "LISTEN_FDS": "1", "LISTEN_FDNAMES": "public"}
        done = subprocess.run([sys.executable, "-c", code], env=env, pass_fds=[listener.fileno()], capture_output=True,
                              text=True, check=True)  # fmt: skip
    assert done.stdout.strip() == f"{{'public': '{tmp_path}/s'}} False"
    assert notify.listen_fds() == {}


def test_token_bucket_pays_debt_by_waiting():
    bucket = TokenBucket(rate_per_s=100.0, burst=50.0)
    assert bucket.delay_s(0.0) == 0.0
    bucket.take(150.0)
    assert bucket.delay_s(0.0) == pytest.approx(1.0)
    assert bucket.delay_s(0.5) == pytest.approx(0.5)
    assert bucket.delay_s(100.0) == 0.0
    assert bucket.level == 50.0


def test_backoff_grows_to_its_cap_and_starts_over():
    backoff = Backoff(1.0, 8.0, random.Random(1))
    delays = [backoff.next_s() for _ in range(6)]
    assert all(limit / 2 <= delay <= limit for delay, limit in zip(delays, (1, 2, 4, 8, 8, 8), strict=True))
    backoff.reset()
    assert backoff.next_s() <= 1.0
