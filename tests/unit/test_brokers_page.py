"""docs/brokers.md says what packaging/mosquitto.conf sets and what the messages of wire/ measure."""

import re
from pathlib import Path

from agent.settings import AgentSettings
from fleet import broker as private
from fleet.ingest import REPORT_LIMIT_BYTES
from host.mqtt import IN_FLIGHT_MESSAGES
from wire.documents import DOCUMENT_LIMIT_BYTES
from wire.messages import FRAME_MESSAGE_LIMIT_BYTES
from wire.topics import Topics

PROJECT = Path(__file__).resolve().parents[2]
PAGE = (PROJECT / "docs/brokers.md").read_text()
AWS_PAYLOAD_BYTES = 128 * 1024


def settings_in(text: str) -> dict[str, str]:
    lines = (line for line in text.splitlines() if line and not line.startswith("#"))
    return dict(line.split(maxsplit=1) for line in lines)


SHIPPED = settings_in((PROJECT / "packaging/mosquitto.conf").read_text())
SHOWN = settings_in(re.search(r"```conf\n(.*?)```", PAGE, re.DOTALL)[1])


def test_page_shows_the_limits_that_are_shipped_and_explains_each() -> None:
    assert {key: SHIPPED.get(key) for key in SHOWN} == SHOWN
    limits = {key for key in SHIPPED if key.startswith(("max_", "autosave"))}
    assert limits <= set(SHOWN), f"not on the page: {limits - set(SHOWN)}"
    for key in SHOWN:
        assert f"**`{key}`**" in PAGE, f"{key} is set and not explained"


def test_private_broker_has_the_limits_of_the_shipped_one() -> None:
    ours = settings_in(private._configuration(1883))
    for key in ("max_packet_size", "max_queued_messages", "max_queued_bytes", "set_tcp_nodelay"):
        assert ours[key] == SHIPPED[key]


def test_every_message_passes_the_limits_that_the_page_names() -> None:
    topic = Topics("a" * 32).frames("f" * 64)
    assert FRAME_MESSAGE_LIMIT_BYTES + len(topic) + 9 < AWS_PAYLOAD_BYTES < int(SHIPPED["max_packet_size"])
    assert int(SHIPPED["max_packet_size"]) > REPORT_LIMIT_BYTES
    assert int(SHIPPED["max_inflight_messages"]) >= IN_FLIGHT_MESSAGES
    for number in (FRAME_MESSAGE_LIMIT_BYTES, AWS_PAYLOAD_BYTES, DOCUMENT_LIMIT_BYTES, REPORT_LIMIT_BYTES):
        assert re.search(rf"\b{number}\b", PAGE), f"the page does not say {number}"


def test_idle_intervals_are_those_of_the_agent() -> None:
    defaults = AgentSettings.model_validate({"node": "n", "store": "s", "trust": "t", "broker": {"host": "h"}})
    assert f"`telemetry_idle_interval_s = {defaults.telemetry_idle_interval_s}`" in PAGE
    assert f"keepalive_s = {defaults.broker.keepalive_s}`" in PAGE
