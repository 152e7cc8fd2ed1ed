"""`amperage fleet serve` as a real process, and what a test asks of it."""

import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fleet_samples import Publisher, ReportingNode, committed, wait

from benchmarks.packs import Artifact, make_artifact
from cli.fleet_client import FleetClient
from host.link import Broker
from wire.errors import AmperageError
from wire.messages import ModelReport
from wire.topics import Topics

AMPERAGE = str(Path(sys.executable).with_name("amperage"))
Answer = Callable[[str], ModelReport | None]


@dataclass
class Site:
    """A control plane's process and what belongs to it."""

    directory: Path
    broker: Broker
    topics: Topics
    publisher: Publisher
    deadline_s: float = 60.0
    process: subprocess.Popen[bytes] | None = None
    nodes: list[ReportingNode] = field(default_factory=list)

    @property
    def socket(self) -> Path:
        return self.directory / "api.sock"

    @property
    def client(self) -> FleetClient:
        return FleetClient(self.socket)

    def start(self) -> None:
        settings = self.directory / "fleet.toml"
        settings.write_text(
            f'directory = "{self.directory}/data"\napi_socket = "{self.socket}"\nroot = "{self.topics.root}"\n'
            f'desired_key = "{self.publisher.directory}/desired.pem"\ntrust = "{self.publisher.directory}/trust.json"\n'
            f"rollout_deadline_s = {self.deadline_s}\n"
            f'[broker]\nhost = "{self.broker.host}"\nport = {self.broker.port}\n'
        )
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [AMPERAGE, "fleet", "serve", "--settings", str(settings)], stdout=log, stderr=log
            )
        wait(self.is_up)

    def is_up(self) -> bool:
        try:
            return bool(self.client.get("/api/health")["status"] == "ok")
        except AmperageError:
            assert self.process
            assert self.process.poll() is None, (self.directory / "log").read_text()
            return False

    def stop(self, number: int = signal.SIGTERM) -> int:
        assert self.process
        self.process.send_signal(number)
        return self.process.wait(15)

    def node(self, name: str, answer: Answer = committed) -> ReportingNode:
        node = ReportingNode(self.broker, self.topics, name, self.publisher.trust, answer)
        self.nodes.append(node)
        node.__enter__()
        return node

    def publish(self, name: str = "1.0", artifact: Artifact | None = None) -> str:
        folder = self.directory / f"release-{name}"
        self.publisher.write(folder, artifact or make_artifact(version=name, seed=len(name)))
        return str(self.client.publish(folder)["release"])

    def order(self, release: str, *nodes: str, **choices: Any) -> int:
        return int(self.client.post("/api/rollouts", {"release": release, "nodes": list(nodes), **choices})["id"])

    def rollout(self, identity: int) -> dict[str, Any]:
        return dict(self.client.get(f"/api/rollouts/{identity}"))

    def generation(self, node: str) -> int:
        """What the node last reported to have accepted."""
        return int((self.client.get(f"/api/nodes/{node}")["reported"] or {}).get("generation", 0))

    def ended(self, identity: int) -> dict[str, Any]:
        wait(lambda: self.rollout(identity)["state"] != "running")
        return self.rollout(identity)
