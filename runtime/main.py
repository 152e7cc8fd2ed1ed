"""`amperage-runtime`: serve, probe, tune, chat, top. onnxruntime is imported only by the commands that run models."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from wire.errors import AmperageError

DEFAULT_SETTINGS = Path("/etc/amperage/runtime.toml")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status (78 for settings that cannot be used)."""
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
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
    parser = argparse.ArgumentParser(prog="amperage-runtime", description="Inference server of an Amperage node.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    serve = commands.add_parser("serve", help="serve what the store names on the two Unix sockets")
    serve.add_argument("--settings", type=Path, default=DEFAULT_SETTINGS)
    serve.set_defaults(run=_serve)

    probe = commands.add_parser("probe", help="judge one version directory and print a report as JSON")
    probe.add_argument("--candidate", type=Path, required=True)
    probe.add_argument("--incumbent", type=Path)
    probe.add_argument("--threads", type=int, default=0, help="0 means all that are allowed")
    probe.add_argument("--cores", default="", help="stay on these, like 0-3; all that are allowed when empty")
    probe.add_argument("--memory-bytes", type=int, default=0, help="0 means a bound that follows from the weights")
    probe.add_argument("--one-session", action="store_true", help="no second packed copy of the weights for prompts")
    probe.add_argument("--cache", type=Path, help="where packed weights are kept; without it they stay on the heap")
    probe.add_argument("--tuning-s", type=float, default=60.0, help="how long other ways to run it may be tried")
    probe.add_argument("--base", help="options as JSON: only the provider or library named is tried, beside them")
    probe.add_argument("--provider", help="an execution provider of this onnxruntime")
    probe.add_argument("--library", help="NAME=PATH of a plug-in library with an execution provider")
    probe.set_defaults(run=_probe)

    tune = commands.add_parser("tune", help="try every way to run a version here, and print what each is worth")
    tune.add_argument("--settings", type=Path, default=DEFAULT_SETTINGS)
    tune.add_argument("--model", help="of those that serve; the first when absent")
    tune.add_argument("--version", help="any version of the store, by (the beginning of) its decoded digest")
    tune.add_argument("--json", action="store_true", help="print the probe's whole report instead of a table")
    tune.set_defaults(run=_tune)

    chat = commands.add_parser("chat", help="talk to a model of this node")
    chat.add_argument("--socket", type=Path, default=Path("/run/amperage/inference.sock"))
    chat.add_argument("--model", help="the first one served when absent")
    chat.add_argument("--max-tokens", type=int, default=256)
    chat.add_argument("--temperature", type=float, default=0.7)
    chat.add_argument("message", nargs="*", help="asked once; without it a conversation begins")
    chat.set_defaults(run=_chat)

    top = commands.add_parser("top", help="watch what the models of this node do")
    top.add_argument("--socket", type=Path, default=Path("/run/amperage/admin.sock"))
    top.add_argument("--once", action="store_true", help="print one table and end")
    top.set_defaults(run=_top)
    return parser


def _serve(chosen: argparse.Namespace) -> int:
    from host.logs import configure_logs
    from host.settings import load_settings
    from runtime.settings import RuntimeSettings

    settings = load_settings(RuntimeSettings, chosen.settings)
    configure_logs(settings.log_level, process="amperage-runtime")
    from runtime.server import serve

    serve(settings)
    return 0


def _probe(chosen: argparse.Namespace) -> int:
    report = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what native code prints must not get into the report
    from runtime.candidate import Foreign, Orders, probe_candidate
    from runtime.cores import parse_cores
    from runtime.providers import know_libraries
    from wire.documents import encode_document, parse_document
    from wire.serving import ExecutionOptions

    foreign = None
    if chosen.base:
        name, _, path = (chosen.library or "").partition("=")
        know_libraries({name: Path(path)} if name else {})
        base = parse_document(ExecutionOptions, chosen.base.encode())
        foreign = Foreign(base, chosen.provider, name or None)
    orders = Orders(
        chosen.candidate, chosen.incumbent, chosen.threads, chosen.memory_bytes,
        reading_session=not chosen.one_session, cache=chosen.cache, tuning_s=chosen.tuning_s, foreign=foreign,
    )  # fmt: skip
    if chosen.cores:
        os.sched_setaffinity(0, parse_cores(chosen.cores))
    data = encode_document(probe_candidate(orders))
    with os.fdopen(report, "wb") as sink:
        sink.write(data + b"\n")
    return 0


def _tune(chosen: argparse.Namespace) -> int:
    from host.settings import load_settings
    from runtime.settings import RuntimeSettings
    from runtime.tune import tune

    settings = load_settings(RuntimeSettings, chosen.settings)
    return tune(settings, model=chosen.model, version=chosen.version, as_json=chosen.json)


def _chat(chosen: argparse.Namespace) -> int:
    from runtime.console import Chat, converse

    chat = Chat(chosen.socket, chosen.model, chosen.max_tokens, chosen.temperature)
    return converse(chat, " ".join(chosen.message))


def _top(chosen: argparse.Namespace) -> int:
    from runtime.console import watch

    return watch(chosen.socket, once=chosen.once)


if __name__ == "__main__":
    sys.exit(main())
