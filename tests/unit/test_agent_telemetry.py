"""When the telemetry thread closes its windows."""

import queue
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from agent_simulators import SimulatedRuntime

from agent.machine import Machine
from agent.settings import AgentSettings
from agent.telemetry import Sampler
from host.clock import SystemClock


def test_idle_node_closes_windows_rarely_and_a_request_or_a_fetch_ends_that(tmp_path):
    settings = AgentSettings.model_validate(
        {"node": "n", "store": str(tmp_path), "trust": "t", "broker": {"host": "h"}, "telemetry_interval_s": 0.5,
         "energy": {"sysfs": str(tmp_path), "sample_interval_s": 0.05}}
    )  # fmt: skip
    runtime, received = SimulatedRuntime(tmp_path), [0]
    runtime.serving = {"tales": "a" * 64}
    windows: queue.Queue[object] = queue.Queue()
    sampler = Sampler(settings, windows, runtime, SystemClock(), Machine(tmp_path))
    sampler.start(lambda: (received[0], 0, 1), 0)
    first = windows.get(timeout=5)
    assert first.window_s < 2, "whoever set up the node waits for it"
    with pytest.raises(queue.Empty):
        windows.get(timeout=1.5)
    runtime.requests += 1
    assert windows.get(timeout=5).inference[0].requests == 1
    received[0] += 1_000_000
    assert windows.get(timeout=5).health.link_rx_bytes == 1_000_000
    sampler.stop()
