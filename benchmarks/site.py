"""What `bench transfer` and `bench fanout` are measured on: a release of a chosen size, a depot, an agent, its events.

Every part is the project's own and a process of its own: the depot (`python -m benchmarks.site`), the agent
(`amperage-agent run`), the runtime. This process orders and listens, as the control plane does.
"""

import argparse
import queue
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cli.demo.processes import Child
from fleet import carousel
from fleet.broker import PrivateBroker
from fleet.depot import Depot
from fleet.library import Library
from forge.build import build_version
from forge.release import make_release
from host.keys import Signer, create_key, load_signer
from host.link import Broker, Received
from host.mqtt import Connection
from wire.digest import digest_of
from wire.documents import encode_document, parse_document
from wire.manifest import FileEntry, Manifest
from wire.messages import Ack, Desired, DesiredModel, Event, State
from wire.signing import Role, RoleKeys, TrustPolicy
from wire.topics import Topics

SAMPLES = Path(__file__).resolve().parent.parent / "samples"
NODE = "node-1"
MODEL = "tales"
TIMEOUT_S = 120.0
BALLAST_FILE = "ballast.bin"
BALLAST_DEVIATION = 2.3
"""Of the ballast's nibbles, in steps: how int4 weights are distributed (benchmarks/artifact.py)."""


class Keys:
    """The operator: two keys and the policy that names them."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        release, desired = create_key(directory / "release.pem"), create_key(directory / "desired.pem")
        self.policy = directory / "trust.json"
        policy = TrustPolicy(release=RoleKeys(keys=(release,)), desired=RoleKeys(keys=(desired,)))
        self.policy.write_bytes(encode_document(policy))
        self.release: Signer = load_signer(directory / "release.pem")
        self.desired: Signer = load_signer(directory / "desired.pem")


@dataclass(frozen=True, slots=True)
class Release:
    """A signed release in a directory as `amperage forge release` leaves it."""

    digest: str
    envelope: bytes
    artifact: str
    document: bytes
    manifest: Manifest
    pack: Path

    @property
    def raw_bytes(self) -> int:
        """Bytes of the decoded files."""
        return sum(entry.size_bytes for entry in self.manifest.version.files)


def make_heavy_release(directory: Path, signer: Signer, wire_bytes: int) -> Release:
    """The small sample model with a file beside it that makes its pack about `wire_bytes` long.

    The file is drawn as int4 weights are, so that it compresses and decodes as weights do; the probe sees the model.
    """
    version_dir = directory / "version"
    version = build_version(SAMPLES / "tales-5m-base", version_dir, (MODEL, "1.0"))
    plain = sum(entry.size_bytes for entry in version.files)
    size = _write_ballast(version_dir / BALLAST_FILE, wire_bytes - plain)
    digest = digest_of((version_dir / BALLAST_FILE).read_bytes())
    entry = FileEntry(path=BALLAST_FILE, size_bytes=size, sha256=digest)
    heavy = version.model_copy(update={"files": (*version.files, entry)})
    (version_dir / "version.json").write_bytes(encode_document(heavy))
    summary = make_release(version_dir, directory / "release", signer, sequence=1)
    document_path = next((directory / "release").glob("*.manifest.json"))
    document = document_path.read_bytes()
    artifact = digest_of(document)
    manifest = parse_document(Manifest, document)
    envelope = (directory / "release" / "release.json").read_bytes()
    return Release(summary.release, envelope, artifact, document, manifest, document_path.with_name(f"{artifact}.pack"))


def _write_ballast(path: Path, wire_bytes: int) -> int:
    """Write bytes of two normal nibbles whose order-0 entropy is about `wire_bytes`; returns how many there are."""
    chance = np.random.default_rng(7)
    steps = np.arange(16) - 7.5
    weight = np.exp(-0.5 * (steps / BALLAST_DEVIATION) ** 2)
    share = weight / weight.sum()
    bits = -2 * float((share * np.log2(share)).sum())
    nibble_of = np.searchsorted(np.cumsum(share), np.arange(256) / 256, side="right").clip(0, 15).astype(np.uint8)
    byte_of = (nibble_of[:, None] | nibble_of[None, :] << 4).reshape(-1)
    size = int(wire_bytes * 8 / bits)
    with path.open("wb") as file:
        for start in range(0, size, 1 << 24):
            draws = chance.integers(0, 1 << 16, min(1 << 24, size - start), np.uint16)
            file.write(byte_of[draws].tobytes())
    return size


class Fleet:
    """Orders one node and hears its events, on one connection; `events` gets every Event once."""

    def __init__(self, broker: Broker, topics: Topics, keys: Keys) -> None:
        self._topics, self._keys, self._node = topics, keys, NODE
        self._inbox: queue.Queue[object] = queue.Queue(4096)
        self._link = Connection(broker, "bench-fleet", self._inbox)
        self._link.subscribe(topics.every_node("event"), qos=1)
        self._seen: set[tuple[str, int]] = set()
        self._generation = 0
        self._link.start()

    def close(self) -> None:
        """Disconnect."""
        self._link.stop()

    def offer(self, release: Release) -> None:
        """Publish the release's documents."""
        self._put(self._topics.document(release.digest), release.envelope)
        self._put(self._topics.document(release.artifact), release.document)

    def order(self, release: Release | None) -> float:
        """Order the node to run `release`, or nothing; returns the wall clock just before it was published."""
        self._generation += 1
        models = (DesiredModel(model=MODEL, release=release.digest),) if release else ()
        desired = Desired(node=self._node, generation=self._generation, models=models)
        envelope = self._keys.desired.sign(Role.DESIRED, encode_document(desired))
        now_s = time.time()
        self._put(self._topics.desired(self._node), envelope)
        return now_s

    def wait_for(self, *states: State, release: Release | None = None) -> dict[State, float]:
        """Seconds since 1970 by state entered, by the node's clock, until one of `states` was entered.

        Only by `release`, when it is given.
        """
        entered: dict[State, float] = {}
        deadline_s = time.monotonic() + TIMEOUT_S
        while not entered.keys() & set(states):
            event = self._next_event(deadline_s - time.monotonic())
            if release is not None and event.release != release.digest:
                continue
            entered[event.after] = event.time_s
            if event.after in (State.FAILED, State.ROLLED_BACK) and event.after not in states:
                raise RuntimeError(f"the release ended as {event.after}: {event.reason}, {event.detail}")
        return entered

    def _next_event(self, timeout_s: float) -> Event:
        while True:
            try:
                message = self._inbox.get(timeout=max(0.0, timeout_s))
            except queue.Empty:
                raise RuntimeError(f"the node told nothing new within {TIMEOUT_S:g} s; is its agent alive?") from None
            if not isinstance(message, Received):
                continue
            message.ack()
            event = parse_document(Event, message.payload)
            self._link.publish(
                self._topics.ack(self._node), encode_document(Ack(acks={event.boot_id: event.seq})), qos=1
            )
            if (event.boot_id, event.seq) not in self._seen:
                self._seen.add((event.boot_id, event.seq))
                return event

    def _put(self, topic: str, payload: bytes) -> None:
        if not self._link.publish(topic, payload, qos=1, retain=True).wait(10):
            raise RuntimeError(f"the broker did not take {topic}")


@contextmanager
def running(*children: Child) -> Iterator[None]:
    """Start them in order; stop them in reverse order."""
    started: list[Child] = []
    try:
        for child in children:
            child.start()
            started.append(child)
        yield
    finally:
        for child in reversed(started):
            child.stop()


def depot_child(broker: PrivateBroker, root: str, directory: Path, artifact: tuple[str, bytes, Path]) -> Child:
    """A depot process over a library that holds an artifact: its digest, its manifest as bytes and its pack."""
    digest, document, path = artifact
    library = Library(directory / "library")
    library.put_manifest(digest, document)
    upload = library.begin_upload(digest)
    with path.open("rb") as pack:
        while part := pack.read(1 << 20):
            upload.feed(part)
    upload.commit()
    upload.discard()
    command = [sys.executable, "-m", "benchmarks.site", str(broker.port), root, str(directory / "library")]
    return Child("depot", command, directory / "depot.log")


_LATE = "import sys, agent.acquire as a, agent.main as m; a.is_time_to_unpack = lambda *_: False; sys.exit(m.main())"
_AGENT = {True: [sys.executable, "-m", "agent.main"], False: [sys.executable, "-c", _LATE]}


def agent_children(
    broker: Broker, root: str, directory: Path, keys: Keys, *, decodes_early: bool = True
) -> tuple[Child, Child]:
    """The node's runtime and its agent (in this order), whose files are below `directory`.

    Without `decodes_early` the decoder is started after the last frame, so that a fetch can be measured by itself.
    """
    directory.mkdir()
    (directory / "store").mkdir()
    sockets = f'public_socket = "{directory}/inference.sock"\nadmin_socket = "{directory}/admin.sock"\n'
    (directory / "runtime.toml").write_text(f'store = "{directory}/store"\nthreads = 1\n{sockets}')
    (directory / "agent.toml").write_text(
        f'node = "{NODE}"\nstore = "{directory}/store"\ntrust = "{keys.policy}"\nroot = "{root}"\n'
        "soak_s = 0.0\n"
        f'[broker]\nhost = "{broker.host}"\nport = {broker.port}\n[runtime]\n{sockets}'
    )
    runtime = [sys.executable, "-m", "runtime.main", "serve", "--settings", str(directory / "runtime.toml")]
    agent = [*_AGENT[decodes_early], "run", "--settings", str(directory / "agent.toml")]
    return (
        Child("runtime", runtime, directory / "runtime.log"),
        Child("agent", agent, directory / "agent.log"),
    )


def main() -> int:
    """The depot's process: serves until SIGTERM, then says how many frames it published."""
    parser = argparse.ArgumentParser(prog="benchmarks.site")
    parser.add_argument("port", type=int)
    parser.add_argument("root")
    parser.add_argument("library", type=Path)
    options = parser.parse_args()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    carousel.BUDGET_PASSES = 1_000_000  # a node that fetches the same pack for every round is no greedy one
    depot = Depot(Broker(host="127.0.0.1", port=options.port), Topics(options.root), Library(options.library))
    depot.start()
    signal.sigwait({signal.SIGTERM})
    depot.stop()
    print(depot.published, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
