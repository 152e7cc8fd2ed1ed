"""The demo's real processes: one broker, one control plane, and an agent and a runtime for every node.

Every process writes to a log file of its own in the demo's folder. Nothing here judges; it starts, waits and kills.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from wire.errors import AmperageError, Code, TransferError

Seen = TypeVar("Seen")
POLL_S = 0.05


def wait_for(what: str, look: Callable[[], Seen | None], timeout_s: float) -> Seen:
    """Poll `look` until it returns something true; TransferError(fetch_stalled) that names `what` after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while True:
        seen = look()
        if seen:
            return seen
        if time.monotonic() > deadline:
            raise TransferError(Code.FETCH_STALLED, f"{what} was not seen within {timeout_s:g} s; look into the logs")
        time.sleep(POLL_S)


def program(name: str) -> str:
    """Path of one of our own commands, from the environment that runs this process."""
    return str(Path(sys.executable).with_name(name))


@dataclass(slots=True)
class Child:
    """One long-running process."""

    name: str
    command: list[str]
    log: Path
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it in its own session, so that a signal to the demo reaches it only through us."""
        with self.log.open("ab") as sink:
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, start_new_session=True,
                env={**os.environ, "ORT_DISABLE_TELEMETRY": "1"},
            )  # fmt: skip

    def running(self) -> bool:
        """True while it runs."""
        return self.process is not None and self.process.poll() is None

    def kill(self) -> None:
        """SIGKILL it and its children, as a power cut would, and wait until it is gone."""
        if self.process is not None and self.running():
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def stop(self, timeout_s: float = 10.0) -> None:
        """SIGTERM, then SIGKILL after `timeout_s`."""
        if self.process is None or not self.running():
            return
        self.process.terminate()
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()

    def tail(self, lines: int = 12) -> str:
        """The end of its log."""
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return "\n".join(text.splitlines()[-lines:])


@dataclass(slots=True)
class Node:
    """An agent and a runtime with directories and sockets of their own."""

    name: str
    directory: Path
    agent: Child
    runtime: Child

    @property
    def store(self) -> Path:
        """Root of the node's store."""
        return self.directory / "store"

    @property
    def socket(self) -> Path:
        """The public inference socket."""
        return self.directory / "inference.sock"

    def start(self) -> None:
        """Start both processes and wait for the sockets."""
        self.runtime.start()
        wait_for(f"{self.name}'s inference socket", self.socket.exists, 30)
        self.agent.start()


@dataclass(slots=True)
class Site:
    """Everything that runs, stopped in reverse order of starting."""

    directory: Path
    broker_host: str
    broker_port: int
    trust: Path
    children: list[Child] = field(default_factory=list)
    nodes: dict[str, Node] = field(default_factory=dict)

    def add_node(self, name: str, *, bandwidth_limit_bytes_per_s: int = 0, soak_s: float = 4.0) -> Node:
        """Write a node's two settings files and start its processes."""
        home = self.directory / name
        (home / "store").mkdir(parents=True)
        agent_settings = home / "agent.toml"
        runtime_settings = home / "runtime.toml"
        agent_settings.write_text(
            f'node = "{name}"\nstore = "{home}/store"\ntrust = "{self.trust}"\n'
            f"bandwidth_limit_bytes_per_s = {bandwidth_limit_bytes_per_s}\nsoak_s = {soak_s}\n"
            "telemetry_interval_s = 2.0\ntelemetry_idle_interval_s = 2.0\n"
            f'[broker]\nhost = "{self.broker_host}"\nport = {self.broker_port}\n'
            f'[runtime]\npublic_socket = "{home}/inference.sock"\nadmin_socket = "{home}/admin.sock"\n'
        )
        runtime_settings.write_text(
            f'store = "{home}/store"\npublic_socket = "{home}/inference.sock"\nadmin_socket = "{home}/admin.sock"\n'
            f'cache = "{home}/cache"\nthreads = 1\n'
        )
        agent = [program("amperage-agent"), "run", "--settings", str(agent_settings)]
        runtime = [program("amperage-runtime"), "serve", "--settings", str(runtime_settings)]
        node = Node(
            name, home, Child(f"{name} agent", agent, home / "agent.log"),
            Child(f"{name} runtime", runtime, home / "runtime.log"),
        )  # fmt: skip
        self.nodes[name] = node
        self.children += [node.runtime, node.agent]
        node.start()
        return node

    def add(self, child: Child) -> Child:
        """Start another process under this site's care."""
        self.children.append(child)
        child.start()
        return child

    def dead(self) -> list[Child]:
        """Processes that ended although nobody asked them to."""
        return [child for child in self.children if child.process is not None and not child.running()]

    def stop(self) -> None:
        """Stop everything, newest first."""
        for child in reversed(self.children):
            child.stop()


def run_command(arguments: list[str], timeout_s: float = 120.0) -> subprocess.CompletedProcess[str]:
    """Run one of the operator's commands to its end; never raises for its exit status."""
    return subprocess.run(
        [program("amperage"), *arguments], capture_output=True, text=True, timeout=timeout_s, check=False,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip


def succeed(arguments: list[str], timeout_s: float = 120.0) -> str:
    """Run an operator's command that must succeed and return its standard output."""
    done = run_command(arguments, timeout_s)
    if done.returncode != 0:
        message = (done.stderr or done.stdout).strip()[-600:]
        raise AmperageError(
            Code.INTERNAL, f"`amperage {' '.join(arguments[:2])}` ended with {done.returncode}: {message}"
        )
    return done.stdout
