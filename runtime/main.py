"""`amperage-runtime`: serve, probe, chat, top. argparse and plain text: a node has no operator's libraries."""

import argparse
import os
import sys
from pathlib import Path

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # before anything imports onnxruntime

from host.logs import configure_logs
from host.settings import load_settings
from runtime.settings import RuntimeSettings
from wire.errors import AmperageError

SETTINGS_FILE = Path("/etc/amperage/runtime.toml")


def main(arguments: list[str] | None = None) -> int:
    """Console entry point; returns the exit status."""
    chosen = _parser().parse_args(arguments)
    try:
        status: int = chosen.run(chosen)
    except AmperageError as error:
        sys.stderr.write(f"amperage-runtime: {error}\n")
        return error.exit_status
    except KeyboardInterrupt:
        return 130
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="amperage-runtime", description="Serve models on Unix sockets.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    serve = commands.add_parser("serve", help="serve what serving.json names")
    serve.add_argument("--settings", type=Path, default=SETTINGS_FILE, help="runtime.toml")
    serve.set_defaults(run=_serve)
    probe = commands.add_parser("probe", help="judge one version directory and print a report as JSON")
    probe.add_argument("--candidate", type=Path, required=True, help="version directory")
    probe.add_argument("--incumbent", type=Path, help="version directory to measure beside it")
    probe.add_argument("--threads", type=int, default=1)
    probe.add_argument("--memory-bytes", type=int, default=0, help="limit of the address space; 0 for none")
    probe.set_defaults(run=_probe)
    chat = commands.add_parser("chat", help="talk to a model on this node")
    _add_socket(chat)
    chat.add_argument("--model", help="the only model when there is just one")
    chat.add_argument("--max-tokens", type=int, default=200)
    chat.add_argument("prompt", nargs="*", help="one question; without it, questions are read from standard input")
    chat.set_defaults(run=_chat)
    top = commands.add_parser("top", help="show what the models of this node are doing")
    _add_socket(top)
    top.add_argument("--once", action="store_true", help="print once and end")
    top.set_defaults(run=_top)
    return parser


def _add_socket(parser: argparse.ArgumentParser) -> None:
    default = RuntimeSettings.model_fields["public_socket"].default
    parser.add_argument("--socket", type=Path, default=default, help=f"public socket ({default})")


def _serve(chosen: argparse.Namespace) -> int:
    settings = load_settings(RuntimeSettings, chosen.settings)
    configure_logs(settings.log_level, process="runtime")
    from runtime.server import serve

    return serve(settings)


def _probe(chosen: argparse.Namespace) -> int:
    from runtime.probe import probe_child

    return probe_child(chosen.candidate, chosen.incumbent, chosen.threads, chosen.memory_bytes)


def _chat(chosen: argparse.Namespace) -> int:
    from runtime.console import chat

    return chat(chosen.socket, chosen.model, " ".join(chosen.prompt), chosen.max_tokens)


def _top(chosen: argparse.Namespace) -> int:
    from runtime.console import top

    return top(chosen.socket, once=chosen.once)


if __name__ == "__main__":
    sys.exit(main())
