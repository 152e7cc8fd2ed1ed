"""The private Mosquitto is real: it takes a connection of ours, carries a message, and is gone afterwards."""

import queue
import socket
from pathlib import Path

import pytest

from fleet.broker import PrivateBroker, _package_of, find_mosquitto
from host.mqtt import Broker, Connection, LinkUp, Received
from wire.errors import ConfigError

pytestmark = pytest.mark.e2e


def test_started_broker_carries_a_message_and_stops(tmp_path: Path) -> None:
    inbox: queue.Queue[object] = queue.Queue(16)
    with PrivateBroker(tmp_path / "broker") as broker:
        connection = Connection(Broker(host=broker.host, port=broker.port), "fleet-broker-test", inbox)
        connection.subscribe("echo", qos=1)
        connection.start()
        assert isinstance(inbox.get(timeout=10), LinkUp)
        connection.publish("echo", b"hello", qos=1)
        message = inbox.get(timeout=10)
        assert isinstance(message, Received)
        assert message.payload == b"hello"
        connection.stop()
    assert not broker.running()
    with socket.socket() as probe:
        assert probe.connect_ex((broker.host, broker.port)) != 0


def test_port_in_use_is_a_config_error_that_quotes_the_broker(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        second = PrivateBroker(tmp_path / "broker", port=taken.getsockname()[1])
        with pytest.raises(ConfigError, match="Address already in use"):
            second.start()


def test_environment_that_names_no_program_is_a_config_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOSQUITTO", "/nowhere/mosquitto")
    with pytest.raises(ConfigError, match="/nowhere/mosquitto"):
        find_mosquitto()


def test_library_names_become_debian_package_names() -> None:
    assert _package_of("libwrap.so.0") == "libwrap0"
    assert _package_of("libnewt2.so.1") == "libnewt2-1"
