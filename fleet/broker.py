"""A private Mosquitto: for tests, the demo, and a control plane without a broker of its own.

Owns the broker's process and its configuration in one directory. It listens on the loopback address only, lets
everybody in, and keeps nothing over a restart: retained state is published again by those who own it.
Where the program comes from: $MOSQUITTO, else PATH, else Debian's packages unpacked below the virtual environment,
which takes apt-get and dpkg-deb but no root. A crash leaves at most a folder that nobody uses.
"""

import fcntl
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from host.files import make_directory, read_bounded, remove_tree
from wire.errors import ConfigError

LOOPBACK = "127.0.0.1"
MAX_PACKET_BYTES = 1024 * 1024
"""A frame message is below 128 KiB, the want of a 40 GiB artifact about 60 KiB."""
MAX_QUEUED_BYTES = 64 * 1024 * 1024
MAX_QUEUED_MESSAGES = 1000
"""What may wait for one client. QoS 0 frames are counted, not weighed: about 120 MB for a node that reads slowly."""
LOG_LIMIT_BYTES = 1024 * 1024
START_TIMEOUT_S = 10.0
STOP_TIMEOUT_S = 5.0
START_ATTEMPTS = 5
COMMAND_TIMEOUT_S = 120.0
LIBRARY_ROUNDS = 8
"""A library that was unpacked may need another one; Mosquitto 2.0.11 on Debian 12 takes two rounds."""
OPERATOR_LINE = "install it with `apt-get install mosquitto`, or set MOSQUITTO to the path of a Mosquitto 2 program"


@dataclass(frozen=True, slots=True)
class Program:
    """How to start Mosquitto."""

    path: Path
    library_path: str = ""

    def environment(self) -> dict[str, str]:
        """The environment to start it with."""
        parts = [part for part in (self.library_path, os.environ.get("LD_LIBRARY_PATH", "")) if part]
        return {**os.environ, "LD_LIBRARY_PATH": ":".join(parts)} if parts else dict(os.environ)


class PrivateBroker:
    """One Mosquitto on the loopback address; a context manager. `port` 0 means any free port."""

    def __init__(self, directory: Path, port: int = 0) -> None:
        self.host = LOOPBACK
        self.port = port
        self._directory = directory
        self._any_port = port == 0
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start it and wait until it accepts connections; raises ConfigError when there is none to start."""
        program = find_mosquitto()
        make_directory(self._directory, mode=0o700)
        for _ in range(START_ATTEMPTS if self._any_port else 1):
            if self._any_port:
                self.port = _free_port()
            self._launch(program)
            if self._accepts():
                return
            self.stop()  # another process may have taken the port in between
        said = read_bounded(self._log, LOG_LIMIT_BYTES).decode(errors="replace").strip().splitlines()
        raise ConfigError(f"{program.path} does not start: {said[-1] if said else 'it said nothing'}; see {self._log}")

    def stop(self) -> None:
        """Stop it; idempotent."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def running(self) -> bool:
        """True while the process lives."""
        return self._process is not None and self._process.poll() is None

    @property
    def _log(self) -> Path:
        return self._directory / "mosquitto.log"

    def _launch(self, program: Program) -> None:
        configuration = self._directory / "mosquitto.conf"
        configuration.write_text(_configuration(self.port))
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [str(program.path), "-c", str(configuration)], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env=program.environment(),
            )  # fmt: skip

    def _accepts(self) -> bool:
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while self.running() and time.monotonic() < deadline_s:
            with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
                probe.settimeout(1.0)
                if probe.connect_ex((self.host, self.port)) == 0:
                    # A program that lost the race for the port ends at once: whose port this is shows a moment later.
                    return not self._ends_within(0.05)
            time.sleep(0.01)
        return False

    def _ends_within(self, timeout_s: float) -> bool:
        try:
            return self._process is None or self._process.wait(timeout_s) is not None
        except subprocess.TimeoutExpired:
            return False


def find_mosquitto() -> Program:
    """The program to run; unpacks Debian's packages when the machine has none. Raises ConfigError with what to do."""
    named = os.environ.get("MOSQUITTO")
    if named:
        if not os.access(named, os.X_OK):
            raise ConfigError(f"MOSQUITTO names {named}, which is no program; correct it or unset it")
        return Program(Path(named))
    installed = shutil.which("mosquitto", path=os.environ.get("PATH", os.defpath) + ":/usr/sbin:/usr/local/sbin")
    if installed:
        return Program(Path(installed))
    unpacked = Path(sys.prefix) / "opt" / "mosquitto"
    with _lock(unpacked.with_name("mosquitto.lock")):
        if not unpacked.exists():
            _unpack_packages(unpacked)
    return _program_in(unpacked)


def _configuration(port: int) -> str:
    lines = [
        f"listener {port} {LOOPBACK}",
        "allow_anonymous true",
        "persistence false",
        f"max_packet_size {MAX_PACKET_BYTES}",
        f"max_queued_bytes {MAX_QUEUED_BYTES}",
        f"max_queued_messages {MAX_QUEUED_MESSAGES}",
        "set_tcp_nodelay true",
        "log_dest stderr",
        "log_type error",
        "log_type warning",
    ]
    if os.geteuid() == 0:
        lines.append("user root")  # otherwise it drops to a user that may not exist here
    return "\n".join(lines) + "\n"


def _free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """One process at a time: two test runs may want to unpack at once."""
    make_directory(path.parent)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _unpack_packages(target: Path) -> None:
    """Put Mosquitto and the libraries that this system lacks below `target`."""
    for tool in ("apt-get", "dpkg-deb", "ldd"):
        if shutil.which(tool) is None:
            raise ConfigError(f"there is no Mosquitto, and no {tool} to fetch it with: {OPERATOR_LINE}")
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="unpacking-") as name:
        work = Path(name)
        tree = work / "tree"
        wanted = {"mosquitto"}
        for _ in range(LIBRARY_ROUNDS):
            _add_packages(sorted(wanted), work, tree)
            wanted = {_package_of(library) for library in _missing_libraries(_program_in(tree))}
            if not wanted:
                tree.rename(target)
                return
    raise ConfigError(f"Debian's Mosquitto still lacks {', '.join(sorted(wanted))}: {OPERATOR_LINE}")


def _add_packages(packages: list[str], work: Path, tree: Path) -> None:
    downloads = work / "downloads"
    downloads.mkdir()
    _run(["apt-get", "download", "--quiet", *packages], downloads)
    for package in sorted(downloads.glob("*.deb")):
        _run(["dpkg-deb", "--extract", str(package), str(tree)], work)
    remove_tree(downloads)


def _program_in(tree: Path) -> Program:
    libraries = sorted({str(path.parent) for path in tree.rglob("*.so.*")})
    return Program(tree / "usr" / "sbin" / "mosquitto", ":".join(libraries))


def _missing_libraries(program: Program) -> list[str]:
    lines = subprocess.run(
        ["ldd", str(program.path)], capture_output=True, text=True, check=False, timeout=COMMAND_TIMEOUT_S,
        env=program.environment(),
    ).stdout.splitlines()  # fmt: skip
    return [line.split()[0] for line in lines if line.endswith("not found")]


def _package_of(library: str) -> str:
    """Debian's name for the package of a shared library: libwrap.so.0 is in libwrap0, libnewt2.so.1 in libnewt2-1."""
    name, _, number = library.partition(".so.")
    return f"{name}-{number}" if re.search(r"\d$", name) else f"{name}{number}"


def _run(command: list[str], directory: Path) -> None:
    try:
        subprocess.run(
            command, cwd=directory, check=True, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except (subprocess.SubprocessError, OSError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        raise ConfigError(f"there is no Mosquitto, and `{command[0]}` failed ({said[-1]}): {OPERATOR_LINE}") from error
