"""Step 8: what the nodes measured of themselves, as the control plane stored it."""

import json
from functools import partial
from typing import Any

from rich.table import Table

from cli.demo.main_steps import NODES
from cli.demo.processes import succeed, wait_for
from cli.demo.stage import Stage

MIB = 1 << 20


def show_telemetry(stage: Stage) -> None:
    """Print health, tokens, latency and energy of every node, and check that each figure has its provenance."""
    with stage.step(8, "Telemetry: health, tokens, latency, energy") as step:
        latest: dict[str, dict[str, Any]] = {}
        totals: dict[str, dict[str, float]] = {}
        for node in stage.site.nodes:
            windows = wait_for(f"telemetry of {node}", partial(_windows, stage, node), 30)
            latest[node] = windows[-1]
            totals[node] = _totals(windows)
        stage.display.show(_health_table(latest))
        stage.display.show(_inference_table(latest, totals))
        step.figures |= {"latest": latest, "totals": totals}
        for node, window in latest.items():
            energy: dict[str, Any] = window.get("energy") or {}
            step.check(
                f"{node}: energy carries source and method",
                bool(energy.get("source")) and energy.get("method") in ("measured", "estimated"),
                f"{energy.get('method')} by {energy.get('source')}, {energy.get('power_w', 0):.1f} W",
            )
            health = window["health"]
            step.check(
                f"{node}: health was measured", health.get("cpu_busy") is not None and health.get("disk_free_bytes"),
                f"CPU {100 * (health.get('cpu_busy') or 0):.0f} %",
            )  # fmt: skip
        for node in NODES:
            tokens = int(totals[node]["completion_tokens"])
            step.check(f"{node}: tokens were counted", node != "node-1" or tokens > 0, f"{tokens:,} tokens")


def _windows(stage: Stage, node: str) -> list[dict[str, Any]] | None:
    """All stored windows of `node`, oldest first, or None while there is none with energy."""
    text = succeed(["fleet", "telemetry", "--node", node, "--limit", "1000", "--api", str(stage.api), "--json"])
    windows: list[dict[str, Any]] = sorted(json.loads(text), key=lambda window: window["time_s"])
    return windows if windows and windows[-1].get("energy") else None


def _totals(windows: list[dict[str, Any]]) -> dict[str, float]:
    """Sums over all windows; latencies are the medians of the windows that had requests."""
    rows = [row for window in windows for row in window["inference"]]
    busy = [row for row in rows if row["requests"]]
    return {
        "requests": sum(row["requests"] for row in rows),
        "failures": sum(row["failures"] for row in rows),
        "completion_tokens": sum(row["completion_tokens"] for row in rows),
        "energy_j": sum(window["energy"]["energy_j"] for window in windows if window.get("energy")),
        "latency_p50_s": _median([row["latency_p50_s"] for row in busy if row.get("latency_p50_s") is not None]),
        "first_token_p50_s": _median([r["first_token_p50_s"] for r in busy if r.get("first_token_p50_s") is not None]),
    }


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2] if values else 0.0


def _shown(value: float | None, unit: str, scale: float = 1.0, digits: int = 1) -> str:
    """A figure with its unit, or a dash: unknown is absent, never zero."""
    return "–" if value is None else f"{value * scale:,.{digits}f} {unit}"


def _health_table(latest: dict[str, dict[str, Any]]) -> Table:
    titles = ("node", "CPU", "free RAM", "pressure", "temp", "free disk", "link in", "restarts", "agent PSS")
    table = Table(*titles, title="Health (latest window)")
    for node, window in latest.items():
        health = window["health"]
        table.add_row(
            node,
            _shown(health.get("cpu_busy"), "%", 100, 0),
            _shown(health.get("memory_available_bytes"), "GiB", 1 / (1024 * MIB)),
            _shown(health.get("memory_pressure_10s"), "%"),
            _shown(health.get("temperature_c"), "°C"),
            _shown(health.get("disk_free_bytes"), "GiB", 1 / (1024 * MIB)),
            _shown(health.get("link_rx_bytes"), "KiB", 1 / 1024),
            str(health.get("agent_restarts", 0)),
            _shown(health.get("agent_pss_bytes"), "MiB", 1 / MIB),
        )
    return table


def _inference_table(latest: dict[str, dict[str, Any]], totals: dict[str, dict[str, float]]) -> Table:
    titles = ("node", "requests", "failed", "tokens", "latency p50", "first token p50", "energy", "method", "source")
    table = Table(*titles, title="Inference and energy (whole run)")
    for node, total in totals.items():
        energy = latest[node]["energy"]
        table.add_row(
            node, f"{total['requests']:,.0f}", f"{total['failures']:,.0f}", f"{total['completion_tokens']:,.0f}",
            _shown(total["latency_p50_s"] or None, "ms", 1000), _shown(total["first_token_p50_s"] or None, "ms", 1000),
            _shown(total["energy_j"], "J"), energy["method"], energy["source"],
        )  # fmt: skip
    return table
