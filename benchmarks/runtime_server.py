"""Our runtime as a process of its own over a store of its own, for the benchmarks that ask it over its sockets."""

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.decoder_models import ROOT
from benchmarks.harness import PeerAbsent
from host.unix_http import request
from wire.documents import encode_document
from wire.manifest import VersionDocument
from wire.serving import ExecutionOptions, Serving, ServingModel

MODEL = "bench"
READY_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class RuntimeServer:
    """A running runtime; `versions` are in its store, by their decoded digests."""

    home: Path
    pid: int
    options: ExecutionOptions

    @property
    def public(self) -> Path:
        """The socket of the applications."""
        return self.home / "public.sock"

    def serve(self, version: VersionDocument) -> None:
        """Name `version` in serving.json and have it loaded; returns when it takes requests."""
        _name(self.home, version, self.options)
        self._ask(f"/v2/repository/models/{MODEL}/load")

    def settle(self) -> None:
        """Return when what drained is closed and its memory was given back, which happens after it is off the list."""
        while any(row["draining"] for row in json.loads(self._ask("/v2/repository/index"))):
            time.sleep(0.05)
        before = math.inf
        while (now := self.rss_bytes()) < before:
            before = now
            time.sleep(1.0)

    def rss_bytes(self) -> int:
        """Resident memory of the process."""
        rows = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in rows if line.startswith("VmRSS:"))

    def _ask(self, target: str) -> bytes:
        answer = request(self.home / "admin.sock", "POST", target, b"{}", timeout_s=60.0)
        if answer.status != 200:
            raise RuntimeError(answer.body[:300].decode(errors="replace"))
        return answer.body


@contextmanager
def runtime_server(
    versions: Sequence[tuple[Path, VersionDocument]], options: ExecutionOptions, settings: Mapping[str, object]
) -> Iterator[RuntimeServer]:
    """A runtime that serves the first of `versions` under MODEL. Raises PeerAbsent when it does not become ready."""
    with tempfile.TemporaryDirectory(prefix="amperage-bench-") as folder:
        home = Path(folder)
        (home / "store" / "versions").mkdir(parents=True)
        for directory, version in versions:
            (home / "store" / "versions" / version.decoded_digest()).symlink_to(directory)
        _name(home, versions[0][1], options)
        places = {"store": "store", "public_socket": "public.sock", "admin_socket": "admin.sock"}
        lines = {name: str(home / place) for name, place in places.items()} | {"log_level": "error"} | dict(settings)
        text = "".join(f"{name} = {json.dumps(value)}\n" for name, value in lines.items())
        (home / "runtime.toml").write_text(text)
        command = [sys.executable, "-P", "-m", "runtime.main", "serve", "--settings", str(home / "runtime.toml")]
        with running(command, dict(os.environ)) as process:
            until_s = time.perf_counter() + READY_TIMEOUT_S
            while not _is_ready(home / "public.sock"):
                if time.perf_counter() > until_s or process.poll() is not None:
                    raise PeerAbsent("the runtime does not become ready")
                time.sleep(0.05)
            yield RuntimeServer(home, process.pid, options)


@contextmanager
def running(command: list[str], environment: dict[str, str]) -> Iterator["subprocess.Popen[bytes]"]:
    """A silent process, killed at the end."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment, cwd=ROOT)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _name(home: Path, version: VersionDocument, options: ExecutionOptions) -> None:
    entry = ServingModel(
        model=MODEL, release="0" * 64, version=version.version, decoded=version.decoded_digest(), cpu="bench",
        onnxruntime="bench", options=options,
    )  # fmt: skip
    path = home / "store" / "serving.json"
    temporary = path.with_suffix(".new")
    temporary.write_bytes(encode_document(Serving(models=(entry,))))
    temporary.rename(path)


def _is_ready(socket: Path) -> bool:
    try:
        return request(socket, "GET", "/v2/health/ready").status == 200
    except Exception:  # noqa: BLE001  it is not there yet, in whatever way
        return False
