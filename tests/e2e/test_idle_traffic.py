"""What an idle node costs in a month: a real agent's bytes on a real broker are counted, the rest is multiplied."""

import sys
import threading
from pathlib import Path

import pytest
from agent_process import Agent, publish, publisher_in
from agent_simulators import NODE
from fleet_process import Site
from fleet_samples import wait
from toxics import Toxics

from agent.settings import AgentSettings
from fleet.broker import PrivateBroker
from host.link import Broker
from wire.topics import Topics

pytestmark = [pytest.mark.e2e, pytest.mark.full]

MONTH_S = 30 * 86_400
HEADER_BYTES = 52
"""IPv4 and TCP with time stamps (RFC 791, RFC 9293, RFC 7323); every packet counted is acknowledged by another."""
TLS_RECORD_BYTES = 29
"""Of AES-GCM in TLS 1.2 (RFC 5288); TLS 1.3 takes 22. Reckoned, not measured: this broker speaks plain TCP."""
LIMIT_BYTES = 20_000_000
WINDOWS = 10
PINGS = 4


def counted(proxy: Toxics) -> int:
    """Bytes on the wire so far, headers, acknowledgements and TLS included."""
    packets = proxy.packets_up + proxy.packets_down
    return proxy.bytes_up + proxy.bytes_down + (2 * HEADER_BYTES + TLS_RECORD_BYTES) * packets


def test_idle_node_sends_and_receives_at_most_20_mb_a_month(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    topics, publisher = Topics("idle"), publisher_in(tmp_path / "keys")
    with PrivateBroker(tmp_path / "broker") as broker, Toxics(broker.host, broker.port) as proxy:
        site = Site(tmp_path, Broker(host=broker.host, port=broker.port), topics, publisher)
        site.start()
        (tmp_path / "node").mkdir()
        through = Broker(host=proxy.host, port=proxy.port, keepalive_s=5)
        agent = Agent(tmp_path / "node", through, topics, publisher)
        agent.start()
        made = publisher.make("1.0")
        wait(lambda: site.client.get("/api/nodes"))
        publish(site, made)
        assert site.ended(site.order(made.digest, NODE))["state"] == "succeeded"
        reports = lambda: len(site.client.get("/api/telemetry?limit=1000"))  # noqa: E731
        wait(lambda: reports() > 3)
        before, began = counted(proxy), reports()
        wait(lambda: reports() >= began + WINDOWS, 30)
        window_bytes = (counted(proxy) - before) / (reports() - began)
        agent.close()

        quiet = tmp_path / "quiet"
        quiet.mkdir()
        silent = Agent(quiet, through, topics, publisher, "")
        settings = (quiet / "agent.toml").read_text().replace("interval_s = 0.5", "interval_s = 600.0")
        (quiet / "agent.toml").write_text(settings)
        silent.start()
        wait(lambda: site.client.get(f"/api/nodes/{NODE}")["online"])
        wait(lambda: reports() > 0)
        threading.Event().wait(4.0)  # reports of the start, and what the broker retains
        before = counted(proxy)
        threading.Event().wait(5.0 * PINGS)
        ping_bytes = (counted(proxy) - before) / PINGS
        silent.close()
        assert site.stop() == 0
    defaults = AgentSettings.model_validate({"node": "n", "store": "s", "trust": "t", "broker": {"host": "h"}})
    windows, pings = MONTH_S / defaults.telemetry_idle_interval_s, MONTH_S / defaults.broker.keepalive_s
    month_bytes = windows * window_bytes + pings * ping_bytes
    with capsys.disabled():
        sys.stdout.write(
            f"\nidle: {window_bytes:.0f} B per window x {windows:.0f} + {ping_bytes:.0f} B per ping x {pings:.0f} "
            f"= {month_bytes / 1e6:.1f} MB a month (limit {LIMIT_BYTES / 1e6:.0f})\n"
        )
    assert 0 < ping_bytes < 1000
    assert window_bytes > 500
    assert month_bytes <= LIMIT_BYTES
