"""What an operator asks a node for on its own terminal: status, doctor, energy. Plain text, no network but doctor's."""

import queue
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from agent.energy import EnergySampler
from agent.journal import JOURNAL_FILE
from agent.machine import Machine
from agent.pacer import pace
from agent.runtime_client import RuntimeClient
from agent.settings import AgentSettings
from agent.store import Store
from agent.trust import load_trust
from host.files import free_bytes
from host.link import LinkDown, LinkUp
from host.mqtt import Connection
from wire.bitmap import Bitmap
from wire.errors import AmperageError, Code, StoreError, TransferError
from wire.messages import State

BROKER_TIMEOUT_S = 5.0
GIB = 1 << 30


def show_status(settings: AgentSettings) -> int:
    """Print what serves and what is on its way, from the disk alone."""
    store = Store(settings.store)
    print(f"node {settings.node}, store {settings.store}")
    serving = store.serving().models
    for entry in serving:
        whole = "" if store.has_version(entry.decoded) else "  (its version is missing from the store)"
        print(f"  serves {entry.model} {entry.version}  version {entry.decoded[:12]}{whole}")
    if not serving:
        print("  serves nothing")
    print(f"  bandwidth: {_bandwidth(settings)}")
    journal = settings.store / JOURNAL_FILE
    if journal.exists():
        _show_journal(journal)
    return 0


def show_energy(settings: AgentSettings, seconds: float) -> int:
    """Sample for a while and print the figure with its provenance."""
    sampler = EnergySampler(settings.energy, Machine())
    started_s = time.monotonic()
    while time.monotonic() - started_s < seconds:
        sampler.sample(time.monotonic())
        time.sleep(settings.energy.sample_interval_s)
    figure = sampler.close_window(time.monotonic() - started_s)
    if figure is None:
        print("energy unknown: no sensor answered and /proc/stat gives nothing to estimate from")
        return 1
    print(f"{figure.power_w:.2f} W, {figure.energy_j:.1f} J  {figure.method.value} by {figure.source}")
    print(f"coverage {100 * figure.coverage:.0f} %, {figure.samples} samples in {seconds:g} s")
    return 0


def examine(settings: AgentSettings) -> int:
    """Check everything that the agent needs; 0 when all is well."""
    checks: list[tuple[str, Callable[[], str]]] = [
        ("trust", lambda: _trust(settings)),
        ("store", lambda: f"{free_bytes(_existing(settings.store)) / GIB:.1f} GiB free"),
        ("serving", lambda: f"{len(Store(settings.store).serving().models)} models"),
        ("runtime", lambda: _runtime(settings)),
        ("broker", lambda: _broker(settings)),
        ("energy", lambda: EnergySampler(settings.energy, Machine()).source),
    ]
    faults = 0
    for name, check in checks:
        try:
            print(f"ok    {name:8} {check()}")
        except AmperageError as error:
            faults += 1
            print(f"fault {name:8} {error.message}")
    return 1 if faults else 0


def _show_journal(path: Path) -> None:
    try:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=2.0)) as journal:
            rows = journal.execute("SELECT model, version, state, reason, detail, artifact FROM deployments").fetchall()
            fetches = dict(journal.execute("SELECT artifact, verified FROM fetch").fetchall())
            sizes = dict(journal.execute("SELECT artifact, frames FROM fetch").fetchall())
            held = journal.execute("SELECT value FROM facts WHERE name = 'pace'").fetchone()
            waiting = journal.execute("SELECT COUNT(*) FROM outbox").fetchone()[0]
    except sqlite3.Error as error:
        raise StoreError(Code.CORRUPT, f"{path}: {error}; is it another user's? try with sudo") from error
    for model, version, state, reason, detail, artifact in rows:
        print(f"  {model} {version or '?'}: {state}" + (f" ({reason}: {detail})" if reason else ""))
        if artifact in fetches:
            why = f", {bytes(held[0]).decode()}" if held and held[0] and state == State.FETCHING else ""
            print(f"    {len(Bitmap(sizes[artifact], fetches[artifact]))} of {sizes[artifact]} frames verified{why}")
    print(f"  {waiting} reports wait for the fleet")


def _bandwidth(settings: AgentSettings) -> str:
    """What holds now by cap and schedule, and what inference would change."""
    now = pace(settings, time.time(), busy=False)
    limit, busy = now.limit_bytes_per_s, pace(settings, time.time(), busy=True)
    text = now.why or ("no limit" if limit is None else f"at most {limit} bytes/s")
    return text if busy == now else f"{text}; {busy.why}"


def _trust(settings: AgentSettings) -> str:
    load_trust(settings.trust)
    return str(settings.trust)


def _existing(path: Path) -> Path:
    if not path.is_dir():
        raise StoreError(Code.IO_ERROR, f"{path} does not exist; create it for the agent's user")
    return path


def _runtime(settings: AgentSettings) -> str:
    stats = RuntimeClient(settings.runtime.admin_socket).stats()
    return f"pid {stats.pid}, {len(stats.models)} models"


def _broker(settings: AgentSettings) -> str:
    inbox: queue.Queue[object] = queue.Queue(8)
    link = Connection(settings.broker, f"{settings.node}-doctor", inbox)
    link.start()
    try:
        message = inbox.get(timeout=BROKER_TIMEOUT_S)
    except queue.Empty:
        message = LinkDown("", 0, "no answer")
    finally:
        link.stop()
    where = f"{settings.broker.host}:{settings.broker.port}"
    if isinstance(message, LinkUp):
        return where
    reason = message.reason if isinstance(message, LinkDown) else "no answer"
    raise TransferError(Code.BROKER_UNREACHABLE, f"{reason}; check [broker] and the network to {where}")
