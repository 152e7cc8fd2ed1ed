"""Artifacts, releases and a node of wire messages, for the tests of the control plane."""

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from benchmarks.packs import Artifact
from host.keys import create_key, load_signer
from host.link import Broker, LinkUp, Received, Will
from host.mqtt import Connection
from wire.bitmap import Bitmap
from wire.digest import digest_of
from wire.documents import encode_document, parse_document
from wire.fetch import Fetch, Judgement, credit_for
from wire.manifest import Requirements
from wire.messages import Ack, Desired, Event, FrameMessage, ModelReport, Reported, State, Status, Want
from wire.release import ArtifactRef, DeltaRef, Release, Variant
from wire.signing import Role, RoleKeys, TrustPolicy, open_envelope
from wire.topics import Topics

BOOT = "0123456789abcdef" * 2


def wait(seen: Callable[[], object], timeout_s: float = 20.0) -> None:
    """Poll until `seen` is true; fails after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not seen():
        assert time.monotonic() < deadline, "not seen in time"
        time.sleep(0.01)


class Publisher:
    """The operator: keys, trust and releases."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(exist_ok=True)
        self.directory = directory
        release, desired = create_key(directory / "release.pem"), create_key(directory / "desired.pem")
        self.trust = TrustPolicy(release=RoleKeys(keys=(release,)), desired=RoleKeys(keys=(desired,)))
        (directory / "trust.json").write_bytes(encode_document(self.trust))
        self.signer = load_signer(directory / "release.pem")
        self.online = load_signer(directory / "desired.pem")

    def release(self, full: Artifact, sequence: int = 1, delta: Artifact | None = None) -> bytes:
        """The signed envelope of a release."""
        deltas = ()
        if delta is not None:
            assert delta.manifest.base
            deltas = (DeltaRef(manifest=delta.digest, wire_bytes=len(delta.pack), base=delta.manifest.base),)
        variant = Variant(
            name="int4", decoded=full.manifest.decoded, deltas=deltas,
            full=ArtifactRef(manifest=full.digest, wire_bytes=len(full.pack)),
            requirements=Requirements(ram_bytes=0, disk_bytes=0),
        )  # fmt: skip
        version = full.manifest.version
        payload = Release(model=version.model, version=version.version, sequence=sequence, variants=(variant,))
        return self.signer.sign(Role.RELEASE, encode_document(payload))

    def write(self, directory: Path, full: Artifact, sequence: int = 1, delta: Artifact | None = None) -> str:
        """A release directory as `amperage forge release` leaves it; returns the release's digest."""
        directory.mkdir()
        for artifact in filter(None, (full, delta)):
            (directory / f"{artifact.digest}.manifest.json").write_bytes(artifact.document)
            (directory / f"{artifact.digest}.pack").write_bytes(artifact.pack)
        envelope = self.release(full, sequence, delta)
        (directory / "release.json").write_bytes(envelope)
        return digest_of(envelope)


class FetchingNode:
    """A node that fetches one pack through the real broker by the agent's own protocol logic."""

    def __init__(self, broker: Broker, topics: Topics, name: str, artifact: Artifact) -> None:
        self.name = name
        self.artifact = artifact
        self.pack = bytearray(len(artifact.pack))
        self.fetch = Fetch(
            name, artifact.digest, artifact.manifest, Bitmap(artifact.manifest.frame_count), credit_for(0)
        )
        self.frames_received = 0
        self.done = threading.Event()
        self._topics = topics
        self._inbox: queue.Queue[object] = queue.Queue(1024)
        self._link = Connection(broker, f"{name}-bulk", self._inbox)
        self._link.subscribe(topics.frames(artifact.digest))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name)

    def __enter__(self) -> Self:
        self._link.start()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._link.stop()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                message = self._inbox.get(timeout=0.05)
            except queue.Empty:
                message = None
            if isinstance(message, LinkUp):
                self.fetch.begin_session()
            elif isinstance(message, Received):
                self._take(FrameMessage.parse(message.payload))
            if self._link.is_up() and not self.fetch.is_complete:
                want = self.fetch.want(time.monotonic())
                if want is not None:
                    self._say(want)

    def _take(self, message: FrameMessage) -> None:
        self.frames_received += 1
        if self.fetch.is_complete or self.fetch.judge(message) is not Judgement.NEW:
            return
        start = self.fetch.offset(message.frame)
        self.pack[start : start + len(message.data)] = message.data
        self.fetch.wrote(message.frame, time.monotonic())
        if self.fetch.needs_index:
            self.fetch.open_index(bytes(self.pack[: self.artifact.manifest.index_size_bytes]))
        if self.fetch.is_complete:
            self._say(self.fetch.farewell())
            self.done.set()

    def _say(self, want: Want) -> None:
        self._link.publish(self._topics.want(self.name), encode_document(want))


@dataclass
class ReportingNode:
    """A node as the control plane sees it: obeys orders at once, in the way that `answer` says."""

    broker: Broker
    topics: Topics
    name: str
    trust: TrustPolicy
    answer: Callable[[str], ModelReport | None]
    boot_id: str = BOOT
    orders: list[Desired] = field(default_factory=list)
    acks: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._inbox: queue.Queue[object] = queue.Queue(1024)
        will = lambda session: Will(self.topics.status(self.name), self._status(session, online=False))  # noqa: E731
        self.link = Connection(self.broker, self.name, self._inbox, will=will)
        self.link.subscribe(self.topics.desired(self.name), qos=1)
        self.link.subscribe(self.topics.ack(self.name), qos=1)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=self.name)

    def __enter__(self) -> Self:
        self.link.start()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.link.stop()

    def say(self, kind: str, payload: bytes, *, retain: bool = False) -> None:
        assert self.link.publish(getattr(self.topics, kind)(self.name), payload, qos=1, retain=retain).wait(5)

    def report(self, generation: int, *models: ModelReport) -> None:
        reported = Reported(node=self.name, boot_id=self.boot_id, generation=generation, models=models)
        self.link.publish(self.topics.reported(self.name), encode_document(reported), qos=1, retain=True)

    def event(self, seq: int, release: str = "0" * 64, after: State = State.ADMITTED, first: int = 1) -> bytes:
        return encode_document(
            Event(
                node=self.name, boot_id=self.boot_id, seq=seq, first=first, time_s=seq, model="tales", release=release,
                version="1.0", before=None, after=after,
            )
        )  # fmt: skip

    def _status(self, session: int, *, online: bool) -> bytes:
        return encode_document(Status(node=self.name, online=online, boot_id=self.boot_id, session=session))

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                message = self._inbox.get(timeout=0.05)
            except queue.Empty:
                continue
            if isinstance(message, LinkUp):
                self.link.publish(
                    self.topics.status(self.name), self._status(message.session, online=True), qos=1, retain=True
                )
            elif isinstance(message, Received):
                self._take(message)
                message.ack()

    def _take(self, message: Received) -> None:
        if message.topic == self.topics.ack(self.name):
            self.acks.update(parse_document(Ack, message.payload).acks)
            return
        desired = parse_document(Desired, open_envelope(message.payload, Role.DESIRED, self.trust))
        self.orders.append(desired)
        reports = [report for entry in desired.models if (report := self.answer(entry.release)) is not None]
        self.report(desired.generation, *reports)


def committed(release: str) -> ModelReport:
    return ModelReport(model="tales", release=release, version="1.0", state=State.COMMITTED, serving_version="1.0")


def failed(release: str, reason: str = "golden_mismatch") -> ModelReport:
    return ModelReport(
        model="tales", release=release, version="1.0", state=State.FAILED, reason=reason, detail="0.9 is over 0.1"
    )
