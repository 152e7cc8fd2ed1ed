"""`amperage-agent`: builds the agent from its settings, runs it until a signal, and the operator's small commands.

A signal only ends the wait of the main thread; the engine takes a Stop from its mailbox like any message. A defect in
any thread ends the process with status 1: systemd starts it anew and the journal resumes.
"""

import argparse
import signal
import sys
import threading
import uuid
from pathlib import Path

import structlog

from agent.decoding import ChildDecoder
from agent.deployment import Ports
from agent.engine import Engine, Stop
from agent.journal import Journal
from agent.links import BrokerLinks
from agent.machine import Machine
from agent.mailbox import Mailbox, Workshop
from agent.pacer import Pacer
from agent.reporting import Identity, Reporter
from agent.runtime_client import RuntimeClient
from agent.settings import AgentSettings
from agent.store import Store
from agent.telemetry import Sampler
from agent.trust import load_trust
from host.clock import SystemClock
from host.files import lock_directory, make_directory
from host.link import Will
from host.logs import configure_logs
from host.settings import load_settings
from wire.errors import AmperageError
from wire.topics import Topics

log = structlog.get_logger()

SIGNALS = {signal.SIGTERM, signal.SIGINT}
WATCH_S = 1.0
STOP_TIMEOUT_S = 10.0
DEFAULT_SETTINGS = Path("/etc/amperage/agent.toml")


def main(arguments: list[str] | None = None) -> int:
    """Entry point; the exit status is that of wire/errors.py."""
    options = _parser().parse_args(arguments)
    try:
        settings = load_settings(AgentSettings, options.settings)
        if options.command == "run":
            return run(settings)
        from agent import console  # what only an operator's terminal needs, the daemon does not load

        if options.command == "status":
            return console.show_status(settings)
        if options.command == "doctor":
            return console.examine(settings)
        return console.show_energy(settings, options.seconds)
    except AmperageError as error:
        sys.stderr.write(f"amperage-agent: {error.message} [{error.code.value}]\n")
        return error.exit_status


def run(settings: AgentSettings) -> int:
    """The daemon; returns after SIGTERM or SIGINT, raises what ended the engine."""
    configure_logs(settings.log_level, process="agent")
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # before any thread, so that only the wait below sees them
    make_directory(settings.store)
    lock = lock_directory(settings.store)
    boot_id = uuid.uuid4().hex
    journal = Journal(settings.store, boot_id)
    mailbox, links, clock, machine = Mailbox(), BrokerLinks(settings), SystemClock(), Machine()
    store, topics = Store(settings.store), Topics(settings.root)
    reporter = Reporter(Identity(settings.node, boot_id, topics), journal, store, clock, settings.outbox_limit)
    runtime, workshop = RuntimeClient(settings.runtime.admin_socket), Workshop(mailbox.control)

    def will(session: int) -> Will:
        return Will(topics.status(settings.node), reporter.status(session, online=False))

    ports = Ports(
        settings=settings, topics=topics, journal=journal, store=store, trust=load_trust(settings.trust),
        runtime=runtime, decoder=ChildDecoder(), links=links, control=links.control(mailbox.control, will),
        clock=clock, machine=machine, mailbox=mailbox, pacer=Pacer(settings, runtime, clock, workshop),
        workshop=workshop, reporter=reporter,
    )  # fmt: skip
    log.info("agent_started", node=settings.node, boot_id=boot_id, boots=journal.boots, lock=lock)
    sampler = Sampler(settings, mailbox.control, runtime, clock, machine)
    sampler.start(links.totals, journal.boots - 1)
    try:
        _serve(Engine(ports), mailbox)
    finally:
        sampler.stop()
        journal.close()
    log.info("agent_stopped", node=settings.node)
    return 0


def _serve(engine: Engine, mailbox: Mailbox) -> None:
    fault: list[BaseException] = []

    def work() -> None:
        try:
            engine.run()
        except BaseException as error:  # noqa: BLE001  handed to the main thread, which raises it
            fault.append(error)

    thread = threading.Thread(target=work, name="engine", daemon=True)
    thread.start()
    while thread.is_alive() and signal.sigtimedwait(SIGNALS, WATCH_S) is None:
        continue
    if thread.is_alive():
        mailbox.control.put(Stop(), timeout=STOP_TIMEOUT_S)
        thread.join(STOP_TIMEOUT_S)
    if fault:
        log.error("engine_failed", error=str(fault[0]), exc_info=fault[0])
        raise fault[0]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="amperage-agent", description="The Amperage daemon of a node.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in (
        ("run", "run the daemon"), ("status", "show what serves and what is on its way"),
        ("doctor", "check everything that the agent needs"), ("energy", "sample the node's power"),
    ):  # fmt: skip
        command = commands.add_parser(name, help=what, description=what)
        command.add_argument("--settings", type=Path, default=DEFAULT_SETTINGS, help="agent.toml")
        if name == "energy":
            command.add_argument("--seconds", type=float, default=5.0, help="how long to sample")
    return parser


if __name__ == "__main__":
    sys.exit(main())
