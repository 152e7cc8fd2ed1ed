"""`amperage-agent run` as a real process, with a runtime that is a stub behind a real admin socket."""

import json
import signal
import socketserver
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from http.server import BaseHTTPRequestHandler
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "unit"))

from agent_simulators import NODE, Made, Publisher, SimulatedRuntime
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from fleet_process import Site

from agent.store import Store
from host.link import Broker
from wire.bitmap import Bitmap
from wire.documents import encode_document
from wire.errors import AmperageError
from wire.serving import ProbeRequest
from wire.topics import Topics


class RuntimeStub:
    """The admin socket of a runtime, over the simulated one."""

    def __init__(self, path: Path, runtime: SimulatedRuntime) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._answer(lambda: encode_document(runtime.stats()))

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                model, verb = self.path.split("/")[-2:]
                calls: dict[str, Callable[[], bytes]] = {
                    "probe": lambda: encode_document(runtime.probe(model, ProbeRequest.model_validate_json(body))),
                    "load": lambda: (runtime.load(model), b"{}")[1],
                    "unload": lambda: (runtime.unload(model), b"{}")[1],
                }
                self._answer(calls[verb])

            def _answer(self, call: Callable[[], bytes]) -> None:
                try:
                    status, body = 200, call()
                except AmperageError as error:
                    status, body = 503, json.dumps({"error": error.message, "code": error.code}).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

            def address_string(self) -> str:
                return "unix"

        self.server = socketserver.ThreadingUnixStreamServer(str(path), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class Agent:
    """`amperage-agent run` and its directory."""

    def __init__(
        self, directory: Path, broker: Broker, topics: Topics, publisher: Publisher, extra: str = "", name: str = NODE
    ) -> None:
        self.directory = directory
        self.name = name
        self.store = Store(directory / "store")
        (directory / "trust.json").write_bytes(encode_document(publisher.policy))
        (directory / "agent.toml").write_text(
            f'node = "{name}"\nstore = "{directory}/store"\ntrust = "{directory}/trust.json"\nroot = "{topics.root}"\n'
            f"soak_s = 0.2\ntelemetry_interval_s = 0.5\ntelemetry_idle_interval_s = 0.5\n{extra}\n"
            f'[broker]\nhost = "{broker.host}"\nport = {broker.port}\n'
            f"keepalive_s = {broker.keepalive_s}\nreconnect_max_s = {broker.reconnect_max_s}\n"
            f'[runtime]\nadmin_socket = "{directory}/admin.sock"\n'
        )
        self.runtime = SimulatedRuntime(directory / "store")
        self.stub = RuntimeStub(directory / "admin.sock", self.runtime)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "agent.main", "run", "--settings", str(self.directory / "agent.toml")]
        with (self.directory / "agent.log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def journalled(self, made: Made) -> Bitmap | None:
        path = self.directory / "store/journal.sqlite"
        if not path.exists():
            return None
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as journal:
            try:
                row = journal.execute(
                    "SELECT frames, verified FROM fetch WHERE artifact = ?", (made.artifact,)
                ).fetchone()
            except sqlite3.OperationalError:
                return None
        return Bitmap(*row) if row else None

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            assert self.process.wait(10) == 0
        self.stub.close()


def publisher_in(directory: Path) -> Publisher:
    """A publisher whose online key and policy are files in `directory`, as the control plane reads them."""
    directory.mkdir()
    publisher = Publisher()
    pem = publisher.desired_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (directory / "desired.pem").write_bytes(pem)
    (directory / "desired.pem").chmod(0o600)
    (directory / "trust.json").write_bytes(encode_document(publisher.policy))
    publisher.directory = directory
    return publisher


def publish(site: Site, made: Made) -> None:
    """Give a release that nodes can decode to the control plane."""
    folder = site.directory / f"release-{made.version.version}"
    folder.mkdir()
    (folder / f"{made.artifact}.manifest.json").write_bytes(encode_document(made.manifest))
    (folder / f"{made.artifact}.pack").write_bytes(made.pack)
    (folder / "release.json").write_bytes(made.release)
    site.client.publish(folder)


def wait(seen: Callable[[], object], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not seen():
        assert time.monotonic() < deadline, "not seen in time"
        threading.Event().wait(0.01)
