"""The command: set the stage, play the eight steps, say how it ended."""

import signal
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cli.demo import fault_steps, main_steps, telemetry_step
from cli.demo.display import Display
from cli.demo.facts import Facts
from cli.demo.observer import Observer
from cli.demo.processes import Child, Site, program, succeed, wait_for
from cli.demo.stage import Stage
from fleet.broker import PrivateBroker
from host.files import remove_tree
from host.mqtt import Broker
from wire.messages import Event, Reported
from wire.topics import Topics

WIDTH = 116
"""Columns of the output where no terminal sets them."""

STEPS = (
    main_steps.forge_release,
    main_steps.first_rollout,
    main_steps.chat_over_socket,
    main_steps.update_under_load,
    fault_steps.kill_and_resume,
    fault_steps.refuse_bad_release,
    fault_steps.flipped_bit_and_stranger,
    telemetry_step.show_telemetry,
)


app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def demo(
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the facts of the run to this file.")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Leave everything running and print how to talk to it.")] = False,
    samples: Annotated[Path, typer.Option(help="Folder of the sample checkpoints.")] = Path("samples"),
    picture: Annotated[Path | None, typer.Option(help="Save what was shown as an SVG picture.")] = None,
) -> None:
    """Forge a model, roll it out to three nodes, talk to it, update it, kill a node, and refuse a bad release."""
    signal.signal(signal.SIGTERM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    console = Console()
    if picture is not None or not console.is_terminal:
        console = Console(record=picture is not None, width=WIDTH)
    started_s = time.monotonic()
    directory = Path(tempfile.mkdtemp(prefix="amperage-"))  # short: a Unix socket's path may have 107 bytes
    facts = Facts(expected_steps=len(STEPS))
    broker = PrivateBroker(directory / "broker")
    stage: Stage | None = None
    try:
        with broker, Display(console) as display:
            stage = _set_stage(directory, samples.resolve(), display, facts, broker)
            for play in STEPS:
                play(stage)
            display.show(main_steps.size_table(stage))
            _say_how_it_ended(stage, started_s)
            if keep:
                _keep_running(stage)
    finally:
        if stage is not None:
            stage.observer.stop()
            stage.site.stop()
        if json_path is not None:
            facts.write(json_path)
        if picture is not None:
            console.save_svg(str(picture), title="scripts/demo")
        if facts.held:
            remove_tree(directory)
        else:
            console.print(f"[yellow]logs are in {directory}[/yellow]")
    raise typer.Exit(0 if facts.held else 1)


def _set_stage(directory: Path, samples: Path, display: Display, facts: Facts, broker: PrivateBroker) -> Stage:
    """Keys, control plane and witness; the steps start the nodes."""
    succeed(["keys", "init", str(directory / "keys")])
    topics = Topics()

    def on_event(event: Event) -> None:
        display.lifecycle(
            event.node, event.version or f"{event.release[:5]}…", event.after, event.detail or event.reason or ""
        )

    def on_reported(reported: Reported) -> None:
        for model in reported.models:
            if model.frames_total and model.frames_verified is not None:
                display.transfer(reported.node, model.version, model.frames_verified, model.frames_total)

    observer = Observer(Broker(host=broker.host, port=broker.port), topics, on_event, on_reported)
    site = Site(directory, broker.host, broker.port, directory / "keys" / "trust.json")
    stage = Stage(directory, samples, display, facts, site, observer)
    settings = directory / "fleet.toml"
    settings.write_text(
        f'directory = "{directory}/fleet"\napi_socket = "{stage.api}"\n'
        f'desired_key = "{stage.keys}/desired.pem"\ntrust = "{stage.keys}/trust.json"\n'
        f'[broker]\nhost = "{broker.host}"\nport = {broker.port}\n'
    )
    command = [program("amperage"), "fleet", "serve", "--settings", str(settings)]
    site.add(Child("control plane", command, directory / "fleet.log"))
    observer.start()
    wait_for("the control plane's socket", stage.api.exists, 30)
    return stage


def _say_how_it_ended(stage: Stage, started_s: float) -> None:
    seconds = time.monotonic() - started_s
    held = sum(check.held for step in stage.facts.steps for check in step.checks)
    total = sum(len(step.checks) for step in stage.facts.steps)
    verdict = (
        "[bold green]Every step held[/bold green]" if stage.facts.held else "[bold red]Not every step held[/bold red]"
    )
    stage.display.say(f"{verdict}: {held} of {total} checks in {seconds:.0f} s.")


def _keep_running(stage: Stage) -> None:
    node = stage.site.nodes["node-1"]
    stage.display.say(
        f"\nStill running in {stage.directory}. Talk to it:\n"
        f"  curl --unix-socket {node.socket} http://localhost/v1/chat/completions \\\n"
        "       -H 'Content-Type: application/json' \\\n"
        '       -d \'{"model":"tales","messages":[{"role":"user","content":"The captain"}],"max_tokens":60}\'\n'
        f"  {program('amperage-runtime')} chat --socket {node.socket}\n"
        f"  {program('amperage')} fleet nodes --api {stage.api}\n"
        "Press Ctrl-C to stop everything."
    )
    try:
        signal.pause()
    except KeyboardInterrupt:
        stage.display.say("Stopping.")
