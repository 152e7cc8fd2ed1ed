"""`amperage fleet`: run the control plane, publish releases, roll them out, look at nodes."""

import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from cli.fleet_client import FleetClient
from cli.terminal import AsJson, console
from wire.errors import ConfigError

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

SETTINGS = Path("/etc/amperage/fleet.toml")
DEFAULT_SOCKET = Path("/run/amperage-fleet/api.sock")
Api = Annotated[Path, typer.Option("--api", envvar="AMPERAGE_API", help="Socket of the control plane.")]
POLL_S = 0.5


@app.callback()
def _fleet() -> None:
    """Run the control plane, publish releases, roll them out, look at nodes."""


@app.command()
def serve(
    settings: Annotated[Path | None, typer.Option(help=f"Settings; {SETTINGS} when it exists.")] = None,
    directory: Annotated[
        Path | None, typer.Option(help="Instead of settings: keep everything here, with a private broker.")
    ] = None,
) -> None:
    """Run the control plane until SIGTERM."""
    from fleet.service import serve as run
    from fleet.settings import FleetSettings, settings_in
    from host.logs import configure_logs
    from host.settings import load_settings

    if settings and directory:
        raise ConfigError("give either --settings or --directory")
    chosen = settings_in(directory.resolve()) if directory else load_settings(FleetSettings, settings or SETTINGS)
    configure_logs(chosen.log_level, process="fleet")
    run(chosen)


@app.command()
def publish(
    directory: Annotated[Path, typer.Argument(help="Release directory made by `amperage forge release`.")],
    api: Api = DEFAULT_SOCKET,
    as_json: AsJson = False,
) -> None:
    """Upload a release; it is verified before it is kept."""
    with Console(stderr=True).status(f"uploading {directory.name}"):
        answer = FleetClient(api).publish(directory)
    _print(answer, as_json, f"release {answer['release']} ({answer['model']} {answer['version']}) is published")


@app.command()
def rollout(
    release: Annotated[str, typer.Argument(help="SHA-256 of the release, as `publish` printed it.")],
    nodes: Annotated[str, typer.Option(help="Node names with commas, or `all`.")],
    max_failures: Annotated[int, typer.Option(min=0, help="Nodes that may fail before the rollout stops.")] = 0,
    deadline_s: Annotated[float | None, typer.Option(help="When a silent node counts as failed.")] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the end; exit status 1 unless it succeeded.")] = False,
    api: Api = DEFAULT_SOCKET,
    as_json: AsJson = False,
) -> None:
    """Order nodes to run a release."""
    client = FleetClient(api)
    named: str | list[str] = "all" if nodes == "all" else nodes.split(",")
    order = {"release": release, "nodes": named, "max_failures": max_failures, "deadline_s": deadline_s}
    answer = client.post("/api/rollouts", order)
    if wait:
        with Console(stderr=True).status(f"rollout {answer['id']}"):
            while answer["state"] == "running":
                time.sleep(POLL_S)
                answer = client.get(f"/api/rollouts/{answer['id']}")
    _print(
        answer,
        as_json,
        f"rollout {answer['id']}: {answer['state']}{': ' + answer['reason'] if answer['reason'] else ''}",
    )
    if wait and answer["state"] != "succeeded":
        raise typer.Exit(1)


@app.command()
def rollouts(
    identity: Annotated[int | None, typer.Argument(help="One rollout by its number.")] = None,
    api: Api = DEFAULT_SOCKET,
    as_json: AsJson = False,
) -> None:
    """List rollouts, or show one with its nodes."""
    client = FleetClient(api)
    answer = client.get("/api/rollouts" if identity is None else f"/api/rollouts/{identity}")
    if as_json:
        print(json.dumps(answer))
        return
    if identity is None:
        table = Table("rollout", "model", "version", "state", "nodes", "reason")
        for row in answer:
            table.add_row(
                str(row["id"]), row["model"], row["version"], row["state"], str(len(row["nodes"])), row["reason"] or ""
            )
    else:
        table = Table("node", "outcome", "state", "reason", title=f"rollout {identity}: {answer['state']}")
        for row in answer["nodes"]:
            table.add_row(row["node"], row["outcome"], row["state"], row["reason"] or "")
    console().print(table)


@app.command()
def abort(
    identity: Annotated[int, typer.Argument(help="Number of the rollout.")],
    api: Api = DEFAULT_SOCKET,
    as_json: AsJson = False,
) -> None:
    """Stop a rollout; nodes that have not ended go back to what they ran."""
    answer = FleetClient(api).post(f"/api/rollouts/{identity}/abort", {})
    _print(answer, as_json, f"rollout {identity}: {answer['state']}")


@app.command()
def releases(api: Api = DEFAULT_SOCKET, as_json: AsJson = False) -> None:
    """List what was published."""
    answer = FleetClient(api).get("/api/releases")
    if as_json:
        print(json.dumps(answer))
        return
    table = Table("model", "version", "sequence", "release")
    for row in answer:
        table.add_row(row["model"], row["version"], str(row["sequence"]), row["release"])
    console().print(table)


@app.command()
def nodes(api: Api = DEFAULT_SOCKET, as_json: AsJson = False) -> None:
    """List nodes with what they run."""
    answer = FleetClient(api).get("/api/nodes")
    if as_json:
        print(json.dumps(answer))
        return
    table = Table("node", "online", "model", "release", "state", "serves", "reason")
    for row in answer:
        models = (row["reported"] or {}).get("models") or [{}]
        for model in models:
            table.add_row(
                row["node"], "yes" if row["online"] else "no", model.get("model", ""), model.get("version", ""),
                model.get("state", ""), model.get("serving_version") or "", model.get("reason") or "",
            )  # fmt: skip
    console().print(table)


@app.command()
def events(
    node: Annotated[str | None, typer.Option(help="Only this node.")] = None,
    limit: Annotated[int, typer.Option(min=1)] = 50,
    api: Api = DEFAULT_SOCKET,
    as_json: AsJson = False,
) -> None:
    """Show the latest lifecycle events."""
    answer = FleetClient(api).get(_target("/api/events", node, limit))
    if as_json:
        print(json.dumps(answer))
        return
    table = Table("time", "node", "model", "version", "state", "reason", "detail")
    for row in answer:
        table.add_row(
            _time(row["time_s"]), row["node"], row["model"], row["version"], row["after"], row["reason"] or "",
            (row["detail"] or "")[:60],
        )  # fmt: skip
    console().print(table)


@app.command()
def telemetry(
    node: Annotated[str | None, typer.Option(help="Only this node.")] = None,
    limit: Annotated[int, typer.Option(min=1)] = 20,
    api: Api = DEFAULT_SOCKET,
    as_json: AsJson = False,
) -> None:
    """Show the latest windows of health, inference and energy."""
    answer = FleetClient(api).get(_target("/api/telemetry", node, limit))
    if as_json:
        print(json.dumps(answer))
        return
    table = Table("time", "node", "CPU", "requests", "tokens", "p50 ms", "power", "method", "source")
    for row in answer:
        table.add_row(*_telemetry_cells(row))
    console().print(table)


def _telemetry_cells(row: dict[str, Any]) -> list[str]:
    energy = row.get("energy") or {}
    busy = row["health"].get("cpu_busy")
    models = row["inference"]
    latencies = [model["latency_p50_s"] for model in models if model.get("latency_p50_s") is not None]
    return [
        _time(row["time_s"]), row["node"], "–" if busy is None else f"{100 * busy:.0f} %",
        str(sum(model["requests"] for model in models)), str(sum(model["completion_tokens"] for model in models)),
        f"{1000 * max(latencies):.1f}" if latencies else "–",
        f"{energy['power_w']:.1f} W" if energy else "–", energy.get("method", "–"), energy.get("source", "–"),
    ]  # fmt: skip


def _target(path: str, node: str | None, limit: int) -> str:
    return f"{path}?limit={limit}" + (f"&node={node}" if node else "")


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%H:%M:%S")


def _print(answer: dict[str, Any], as_json: bool, line: str) -> None:
    print(json.dumps(answer) if as_json else line)
