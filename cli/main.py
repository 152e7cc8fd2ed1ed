"""Entry point: chooses the sub-command and turns typed errors into one line and an exit status."""

import importlib
import sys
from typing import Any

import typer
from typer.core import TyperGroup

from wire.errors import AmperageError

SUBCOMMANDS = {
    "keys": ("cli.keys", "Make signing keys and the trust policy of nodes."),
    "forge": ("cli.forge", "Turn a checkpoint into a signed release."),
    "fleet": ("cli.fleet", "Run the control plane, publish releases, roll them out, look at nodes."),
    "demo": ("cli.demo.command", "Run the main job end to end on this machine."),
}


class LazyGroup(TyperGroup):
    """Loads a sub-command's module only when it is named."""

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002  click's signature
        """Names, in the order of the work."""
        return list(SUBCOMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ARG002
        """Import the sub-command's typer application, or return None when there is none of that name."""
        if cmd_name not in SUBCOMMANDS:
            return None
        module = importlib.import_module(SUBCOMMANDS[cmd_name][0])
        command = typer.main.get_command(module.app)
        command.name = cmd_name
        return command

    def format_commands(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002
        """Help without importing anything."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in SUBCOMMANDS.items()])


app = typer.Typer(
    cls=LazyGroup, no_args_is_help=True, add_completion=False, rich_markup_mode=None,
    help="Amperage puts small language models on Arm edge nodes and keeps them right.",
)  # fmt: skip


@app.callback()
def _root() -> None:
    """Amperage puts small language models on Arm edge nodes and keeps them right."""


def main() -> None:
    """Console entry point."""
    try:
        app()
    except AmperageError as error:
        print(f"amperage: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
