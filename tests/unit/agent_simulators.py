"""Simulators at the agent's ports: a broker with a depot, a runtime, a decoder, a publisher who signs.

No test is in here; the unit tests and the child of the crash matrix import it. Everything is deterministic: frames move
only when `pump` is called.
"""

import base64
import contextlib
import hashlib
import random
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from agent import engine
from agent.decoding import DecodeOrder
from agent.deployment import Ports
from agent.engine import Engine
from agent.journal import Journal
from agent.machine import Machine
from agent.mailbox import Mailbox, Port, Workshop
from agent.pacer import Pacer
from agent.reporting import Identity, Reporter
from agent.settings import AgentSettings
from agent.store import Store
from agent.trust import PinnedTrust
from host.clock import SystemClock
from host.link import LinkFigures, LinkUp, Publication, Received
from wire.bitmap import Bitmap
from wire.digest import digest_of
from wire.documents import encode_document, parse_document
from wire.errors import AmperageError, ArtifactError, Code, DeployError, StoreError, TransferError
from wire.index import Index, Section, SectionCodec, encode_index, index_size
from wire.manifest import (
    FRAME_BYTES,
    SECTION_LIMIT_BYTES,
    DecoderConfig,
    FileEntry,
    Manifest,
    Requirements,
    TensorColumns,
    VersionDocument,
)
from wire.messages import Desired, DesiredModel, FrameMessage, Want
from wire.release import ArtifactRef, DeltaRef, Release, Variant
from wire.serving import (
    ExecutionOptions,
    ModelStats,
    ProbeReport,
    ProbeRequest,
    ProbeVerdict,
    RuntimeStats,
)
from wire.signing import (
    PAYLOAD_TYPES,
    Envelope,
    EnvelopeSignature,
    PublicKey,
    Role,
    RoleKeys,
    TrustPolicy,
    pre_authentication_encoding,
)
from wire.topics import Topics

engine.IDLE_TURN_S = 0.02  # a simulated link rings nobody's bell
NODE = "node-1"
MODEL = "tales"
TOPICS = Topics()


@dataclass(frozen=True)
class Made:
    """A version, its pack and its signed release."""

    version: VersionDocument
    manifest: Manifest
    pack: bytes
    release: bytes
    files: dict[str, bytes]

    @property
    def artifact(self) -> str:
        return digest_of(encode_document(self.manifest))

    @property
    def digest(self) -> str:
        return digest_of(self.release)

    @property
    def decoded(self) -> str:
        return self.manifest.decoded

    def frame(self, frame: int) -> bytes:
        start, end = self.manifest.frame_range(frame)
        return self.pack[start:end]


class Publisher:
    """Holds the keys and makes releases whose packs are raw sections of random files."""

    def __init__(self, seed: int = 1) -> None:
        self.release_key = Ed25519PrivateKey.from_private_bytes(hashlib.sha256(b"release%d" % seed).digest())
        self.desired_key = Ed25519PrivateKey.from_private_bytes(hashlib.sha256(b"desired%d" % seed).digest())
        self.policy = TrustPolicy(
            release=RoleKeys(keys=(public(self.release_key),)), desired=RoleKeys(keys=(public(self.desired_key),))
        )

    def make(self, version: str, *, weights_bytes: int = 700_000, base: Made | None = None, ram_bytes: int = 0) -> Made:
        draw = random.Random(version)
        files = {
            "golden.json": b"{}" + version.encode(),
            "model.onnx": draw.randbytes(3000),
            "weights.bin": draw.randbytes(weights_bytes),
        }
        entries = tuple(FileEntry(path=n, size_bytes=len(d), sha256=digest_of(d)) for n, d in files.items())
        config = DecoderConfig(layers=1, hidden_size=8, kv_heads=1, head_size=8, vocab_size=8, context_tokens=8)
        document = VersionDocument(model=MODEL, version=version, config=config, files=entries, tensors=TensorColumns())
        manifest, pack = make_pack(document, files, base.decoded if base else None, ram_bytes)
        ref = {"manifest": digest_of(encode_document(manifest)), "wire_bytes": len(pack)}
        deltas = (DeltaRef(**ref, base=base.decoded),) if base else ()
        full = ArtifactRef(manifest="f" * 64, wire_bytes=len(pack) + 1) if base else ArtifactRef(**ref)
        variant = Variant(
            name="int4", decoded=manifest.decoded, full=full, deltas=deltas, requirements=manifest.requirements
        )
        release = Release(model=MODEL, version=version, sequence=1, variants=(variant,))
        return Made(document, manifest, pack, sign(self.release_key, Role.RELEASE, encode_document(release)), files)

    def desired(self, generation: int, made: Made | None, node: str = NODE) -> bytes:
        models = (DesiredModel(model=MODEL, release=made.digest),) if made else ()
        desired = Desired(node=node, generation=generation, models=models)
        return sign(self.desired_key, Role.DESIRED, encode_document(desired))


def make_pack(
    version: VersionDocument, files: dict[str, bytes], base: str | None, ram_bytes: int
) -> tuple[Manifest, bytes]:
    import zlib

    data, sections = b"", []
    for stream, content in enumerate(files.values()):
        for start in range(0, len(content), SECTION_LIMIT_BYTES):
            part = content[start : start + SECTION_LIMIT_BYTES]
            sections.append(Section(stream, 0, SectionCodec.RAW, len(part), len(part), zlib.crc32(part)))
            data += part
    hashes = tuple(hashlib.sha256(data[i : i + FRAME_BYTES]).digest() for i in range(0, len(data), FRAME_BYTES))
    index = encode_index(Index(hashes, tuple(sections)))
    assert len(index) == index_size(len(hashes), len(sections))
    manifest = Manifest(
        decoded=version.decoded_digest(), version=version, base=base, operations="f" * len(files),
        index_size_bytes=len(index),
        index_frames=tuple(digest_of(index[i : i + FRAME_BYTES]) for i in range(0, len(index), FRAME_BYTES)),
        pack_size_bytes=len(index) + len(data), golden=version.files[0].sha256,
        requirements=Requirements(ram_bytes=ram_bytes, disk_bytes=0),
    )  # fmt: skip
    return manifest, index + data


def public(key: Ed25519PrivateKey) -> PublicKey:
    return PublicKey(ed25519=key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw).hex())


def sign(key: Ed25519PrivateKey, role: Role, payload: bytes) -> bytes:
    kind = PAYLOAD_TYPES[role]
    signature = key.sign(pre_authentication_encoding(kind, payload))
    return encode_document(
        Envelope(
            payloadType=kind,
            payload=base64.b64encode(payload).decode(),
            signatures=(EnvelopeSignature(keyid=public(key).keyid, sig=base64.b64encode(signature).decode()),),
        )
    )


@dataclass
class SimulatedBroker:
    """Retained messages, everything that was published, and a depot that answers wants."""

    retained: dict[str, bytes] = field(default_factory=dict)
    published: list[tuple[str, bytes]] = field(default_factory=list)
    links: list["SimulatedLink"] = field(default_factory=list)
    packs: dict[str, Made] = field(default_factory=dict)
    sent: list[tuple[str, int]] = field(default_factory=list)
    wants: list[Want] = field(default_factory=list)
    tamper: Callable[[FrameMessage], list[FrameMessage]] | None = None
    epoch: int = 7
    connects: int = 0

    def offer(self, made: Made) -> None:
        """Publish a release's documents and give its pack to the depot."""
        self.packs[made.artifact] = made
        self.put(TOPICS.document(made.digest), made.release)
        self.put(TOPICS.document(made.artifact), encode_document(made.manifest))

    def put(self, topic: str, payload: bytes) -> None:
        """Publish a retained message as the fleet does."""
        self.retained[topic] = payload
        for link in list(self.links):
            link.deliver(topic, payload, retained=False)

    def of(self, topic: str) -> list[bytes]:
        return [payload for where, payload in self.published if where == topic]

    def take(self, link: "SimulatedLink", topic: str, payload: bytes, retain: bool) -> None:
        self.published.append((topic, payload))
        if retain:
            self.retained[topic] = payload
        if topic == TOPICS.want(NODE):
            self._answer(link, parse_document(Want, payload, limit_bytes=1 << 23))

    def _answer(self, link: "SimulatedLink", want: Want) -> None:
        self.wants.append(want)
        made = self.packs[want.artifact]
        ahead = link.seq - (want.seen_seq if want.seen_epoch == self.epoch else 0)
        for frame in want.missing_frames():
            if ahead >= want.credit:
                return
            if frame not in link.asked:
                ahead += 1
                link.seq += 1
                link.asked.add(frame)
                self.sent.append((want.artifact, frame))
                message = FrameMessage(self.epoch, link.seq, frame, made.frame(frame))
                for tampered in self.tamper(message) if self.tamper else [message]:
                    link.deliver(TOPICS.frames(want.artifact), tampered.encode(), retained=False)


class SimulatedLink:
    """One connection to a SimulatedBroker; `pump` moves what waits into the bounded inbox."""

    def __init__(self, broker: SimulatedBroker, client_id: str, inbox: Port) -> None:
        self.broker, self.client_id, self.inbox = broker, client_id, inbox
        self.topics: set[str] = set()
        self.waiting: deque[object] = deque()
        self.up = False
        self.stopped = False
        self.acked: list[str] = []
        self.asked: set[int] = set()
        self.seq = 0

    def start(self) -> None:
        self.up = True
        self.broker.connects += 1
        self.broker.links.append(self)
        self.waiting.append(LinkUp(self.client_id, self.broker.connects))
        for topic in self.topics:
            self._deliver_retained(topic)

    def stop(self, timeout_s: float = 1.0) -> None:
        self.up, self.stopped = False, True
        if self in self.broker.links:
            self.broker.links.remove(self)

    def publish(self, topic: str, payload: bytes, *, qos: int = 0, retain: bool = False) -> Publication:
        publication = Publication(len(payload))
        if self.up:
            self.broker.take(self, topic, payload, retain)
        publication.settle(sent=self.up)
        return publication

    def subscribe(self, topic: str, *, qos: int = 0) -> None:
        self.topics.add(topic)
        if self.up:
            self._deliver_retained(topic)

    def unsubscribe(self, topic: str) -> None:
        self.topics.discard(topic)

    def is_up(self) -> bool:
        return self.up

    def figures(self) -> LinkFigures:
        return LinkFigures(0, 0, 1, 0.0)

    def deliver(self, topic: str, payload: bytes, *, retained: bool) -> None:
        if topic in self.topics:
            self.waiting.append(
                Received(topic, payload, 1, retained, 1, 0, lambda _session, _mid: self.acked.append(topic))
            )

    def pump(self) -> None:
        while self.waiting and not self.inbox.full():
            self.inbox.put_nowait(self.waiting.popleft())

    def _deliver_retained(self, topic: str) -> None:
        if topic in self.broker.retained:
            self.deliver(topic, self.broker.retained[topic], retained=True)


class SimulatedLinks:
    """The Links port over one SimulatedBroker."""

    def __init__(self, broker: SimulatedBroker) -> None:
        self.broker = broker
        self.made: list[SimulatedLink] = []
        self.limits: list[int | None] = []

    def control(self, inbox: Port, will: object) -> SimulatedLink:
        return self._make(NODE, inbox)

    def bulk(self, inbox: Port, limit_bytes_per_s: int | None) -> SimulatedLink:
        self.limits.append(limit_bytes_per_s)
        return self._make(f"{NODE}-bulk", inbox)

    def pump(self) -> None:
        for link in self.made:
            if not link.stopped:
                link.pump()

    def _make(self, client_id: str, inbox: Port) -> SimulatedLink:
        link = SimulatedLink(self.broker, client_id, inbox)
        self.made.append(link)
        return link


@dataclass
class SimulatedRuntime:
    """Serves what serving.json names; verdicts, refusals and silence can be ordered."""

    store: Path
    verdicts: dict[str, ProbeVerdict] = field(default_factory=dict)
    refuses: set[str] = field(default_factory=set)
    reachable: bool = True
    failures: int = 0
    active: int = 0
    requests: int = 10
    pid: int = 100
    tokens_per_s: float | None = 100.0
    serving: dict[str, str] = field(default_factory=dict)
    options: ExecutionOptions = field(default_factory=lambda: ExecutionOptions(threads=1))
    hold: threading.Event = field(default_factory=threading.Event)
    """While it is clear, probes do not end."""
    probes: list[ProbeRequest] = field(default_factory=list)
    loads: list[str] = field(default_factory=list)
    unloads: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.hold.set()
        with contextlib.suppress(StoreError):
            self.serving = {entry.model: entry.decoded for entry in Store(self.store).serving().models}

    def probe(self, model: str, request: ProbeRequest) -> ProbeReport:
        self._reach()
        self.probes.append(request)
        verdict = self.verdicts.get(request.candidate, ProbeVerdict.PASSED)
        self.hold.wait(10)
        options = self.options if verdict is ProbeVerdict.PASSED else None
        prepack = digest_of(request.candidate.encode()) if options and request.prepack else None
        return ProbeReport(
            verdict=verdict, detail=verdict.value, options=options, prepack=prepack, cpu="x", tokens_per_s=100.0
        )

    def load(self, model: str) -> None:
        self._reach()
        entry = Store(self.store).served(model)
        decoded = entry.decoded if entry else ""
        self.loads.append(decoded)
        if decoded in self.refuses:
            raise DeployError(Code.LOAD_FAILED, "the session refused the model")
        self.serving[model] = decoded

    def unload(self, model: str) -> None:
        self._reach()
        self.unloads.append(model)
        self.serving.pop(model, None)

    def stats(self) -> RuntimeStats:
        self._reach()
        rows = [
            ModelStats(model=model, version="1", decoded=decoded, requests=self.requests, failures=self.failures,
                       prompt_tokens=1, completion_tokens=1, busy_s=0.1, active=self.active,
                       tokens_per_s=self.tokens_per_s)
            for model, decoded in self.serving.items()
        ]  # fmt: skip
        return RuntimeStats(pid=self.pid, started_s=1.0, models=tuple(rows))

    def _reach(self) -> None:
        if not self.reachable:
            raise TransferError(Code.RUNTIME_UNREACHABLE, "simulated silence")


class SimulatedDecoder:
    """Decodes the raw packs of `make_pack` in this process, when somebody waits for it."""

    def __init__(self) -> None:
        self.error: AmperageError | None = None
        self.begun: list[SimulatedDecode] = []

    def begin(self, order: DecodeOrder) -> "SimulatedDecode":
        self.begun.append(SimulatedDecode(order, self))
        return self.begun[-1]

    def decode(self, order: DecodeOrder) -> None:
        if self.error is not None:
            raise self.error
        manifest = parse_document(Manifest, order.manifest.read_bytes())
        pack = order.pack.read_bytes()
        at = manifest.index_size_bytes
        for entry in manifest.version.files:
            content = pack[at : at + entry.size_bytes]
            at += entry.size_bytes
            if digest_of(content) != entry.sha256:
                raise ArtifactError(Code.DIGEST_MISMATCH, f"{entry.path} is not what the manifest says")
            (order.into / entry.path).write_bytes(content)
        (order.into / "version.json").write_bytes(encode_document(manifest.version))


class SimulatedDecode:
    """One decoding; `frames` are those that it was told of, in order."""

    def __init__(self, order: DecodeOrder, decoder: SimulatedDecoder) -> None:
        self.order, self.decoder = order, decoder
        self.frames: list[int] = []
        self.cancelled = False

    def add(self, frames: Sequence[int]) -> None:
        self.frames += frames

    def wait(self, deadline_s: float) -> None:
        self.decoder.decode(self.order)

    def cancel(self) -> None:
        self.cancelled = True


class Node:
    """An engine over simulators, driven turn by turn; `restart` makes a new one on the same disk."""

    def __init__(self, directory: Path, publisher: Publisher, **overrides: object) -> None:
        self.directory = directory
        self.publisher = publisher
        self.settings = AgentSettings.model_validate(
            {"node": NODE, "store": str(directory / "store"), "trust": "unused", "broker": {"host": "unused"},
             "soak_s": 0.0, "disk_reserve_bytes": 0, **overrides}
        )  # fmt: skip
        self.broker = SimulatedBroker()
        self.clock = SystemClock()
        self.boots = 0
        self.boot()

    def boot(self) -> None:
        """A new process: nothing is kept but the disk and the broker."""
        self.boots += 1
        store_path = self.settings.store
        self.mailbox = Mailbox()
        self.journal = Journal(store_path, f"{self.boots:032x}")
        self.store = Store(store_path)
        self.links = SimulatedLinks(self.broker)
        self.broker.links.clear()
        self.runtime = SimulatedRuntime(store_path)
        self.decoder = SimulatedDecoder()
        identity = Identity(NODE, self.journal.boot_id, TOPICS)
        self.reporter = Reporter(identity, self.journal, self.store, self.clock, self.settings.outbox_limit)
        self.control = self.links.control(self.mailbox.control, None)
        workshop = Workshop(self.mailbox.control)
        self.engine = Engine(
            Ports(
                settings=self.settings, topics=TOPICS, journal=self.journal, store=self.store,
                trust=PinnedTrust(self.publisher.policy), runtime=self.runtime, decoder=self.decoder, links=self.links,
                control=self.control, clock=self.clock, machine=Machine(), mailbox=self.mailbox,
                pacer=Pacer(self.settings, self.runtime, self.clock, workshop), workshop=workshop,
                reporter=self.reporter,
            )
        )  # fmt: skip

    def start(self) -> None:
        self.engine.start()

    def turn(self) -> None:
        self.links.pump()
        self.engine.turn()

    def run_until(self, seen: Callable[[], object], timeout_s: float = 10.0) -> None:
        """Turn the engine until `seen` is true; fails the test after `timeout_s`."""
        deadline = SystemClock().monotonic_s() + timeout_s
        while not seen():
            assert SystemClock().monotonic_s() < deadline, f"not seen; {self.journal.deployments()}"
            self.turn()

    def order(self, generation: int, made: Made | None) -> None:
        self.broker.put(TOPICS.desired(NODE), self.publisher.desired(generation, made))

    @property
    def row(self):
        return self.journal.deployments()[-1]

    def verified(self, made: Made) -> Bitmap | None:
        return self.journal.verified(made.artifact)

    def reported(self):
        from wire.messages import Reported

        return parse_document(Reported, self.broker.retained[TOPICS.reported(NODE)])

    def events(self):
        from wire.messages import Event

        return [parse_document(Event, payload) for payload in self.broker.of(TOPICS.event(NODE))]
