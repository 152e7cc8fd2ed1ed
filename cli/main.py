"""`amperage`, the operator's command. A sub-command's modules are imported only when it is named.

Invariant: an error of ours ends with one sentence on stderr and its own exit status, never with a traceback; anything
else is a bug and keeps its traceback.
"""

import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version

from wire.errors import AmperageError, ConfigError

COMMANDS = {
    "demo": ("cli.demo.command:demo", "demo", "Run the main job end to end on this machine."),
    "depot": ("cli.depot:depot", "fleet", "Serve packs at a site; with --upstream, fetch each of them once."),
    "fleet": ("cli.fleet:app", "fleet", "Run the control plane, publish releases, roll them out, look at nodes."),
    "forge": ("cli.forge:app", "forge", "Turn a checkpoint into a signed release."),
    "keys": ("cli.keys:app", "fleet", "Make signing keys and the trust policy of nodes."),
}
"""Sub-command: where it is, the extra that brings what it imports, its line of help."""

OURS = {"cli", "fleet", "forge", "runtime", "agent", "host", "codec", "wire"}
USAGE_STATUS = 2


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; ends the process with an exit status."""
    try:
        sys.exit(_run(list(sys.argv[1:] if arguments is None else arguments)))
    except AmperageError as error:
        print(f"amperage: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    except KeyboardInterrupt:
        sys.exit(130)  # 128 + SIGINT, as shells say it


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return 0 if arguments else USAGE_STATUS
    if arguments[0] == "--version":
        print(f"amperage {version('amperage')}")
        return 0
    if arguments[0] not in COMMANDS:
        print(f"amperage: no such command: {arguments[0]}\n\n{_help()}", file=sys.stderr)
        return USAGE_STATUS
    _load(arguments[0])(args=arguments[1:], prog_name=f"amperage {arguments[0]}")
    return 0


def _load(name: str) -> Callable[..., object]:
    """The typer application of sub-command `name`; a plain function becomes an application of one command."""
    place, extra, _ = COMMANDS[name]
    module, _, attribute = place.partition(":")
    try:
        import typer

        found = getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in OURS:
            raise
        raise ConfigError(
            f"`amperage {name}` needs {missing}, which is not installed: pip install 'amperage[{extra}]'"
        ) from error
    if isinstance(found, typer.Typer):
        return found
    application = typer.Typer(add_completion=False, rich_markup_mode=None)
    application.command()(found)
    return application


def _help() -> str:
    lines = [f"  {name:<8}{line}" for name, (_, _, line) in COMMANDS.items()]
    return "\n".join(
        [
            "Usage: amperage COMMAND ...", "", "Puts small language models on Arm edge nodes and keeps them right.", "",
            *lines, "", "`amperage COMMAND --help` tells more, `amperage --version` names the version.",
        ]
    )  # fmt: skip
