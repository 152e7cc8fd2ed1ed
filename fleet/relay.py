"""What a gateway carries between two brokers, packs aside: orders and documents down to its site, reports up.

Owns one thread and two connections. Invariants: nothing is altered, and nothing carried here can make a node install
anything, because nodes check signatures and digests themselves; only the topics of nodes that speak at the site are
subscribed upstream, each by its name. Nothing is kept over a crash: both brokers retain what matters, nodes hold their
events until the fleet acknowledges them, and whatever is connected anew is told everything again.
"""

import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import structlog

from fleet.ingest import KINDS, NUMBERED, REPORT_LIMIT_BYTES
from fleet.library import Library
from fleet.outbox import Outbox
from fleet.refusals import Refusals
from fleet.settings import UpstreamSettings
from host.link import Broker, LinkDown, LinkUp, Received
from host.mqtt import Connection
from wire.digest import verify_digest
from wire.documents import DOCUMENT_LIMIT_BYTES, parse_document
from wire.errors import AmperageError, ArtifactError, Code, TransferError
from wire.messages import Desired
from wire.release import Release
from wire.signing import Role, unverified_payload
from wire.topics import Topics

log = structlog.get_logger()

INBOX_MESSAGES = 4096
NODES_MOST = 4096
"""Nodes of one site; a name beyond them is refused, because every name costs two subscriptions upstream."""
TURN_S = 0.25
PUMP_S = 0.02


@dataclass(slots=True)
class _Node:
    """One node of the site."""

    desired: bytes | None = None
    releases: frozenset[str] = frozenset()
    told: dict[str, bytes] = field(default_factory=dict)
    """Its retained reports by topic, for an upstream broker that has forgotten them."""


class Relay:
    """Carries for the nodes of a site; `on_death` is called when its thread dies."""

    def __init__(
        self,
        upstream: UpstreamSettings,
        site: Broker,
        topics: Topics,
        library: Library,
        on_death: Callable[[], None] = lambda: None,
    ) -> None:
        self.refusals = Refusals()
        self._topics, self._library, self._on_death, self._allowed = topics, library, on_death, upstream.nodes
        self._inbox: queue.Queue[Any] = queue.Queue(INBOX_MESSAGES)
        self._upstream = Connection(upstream.broker, upstream.name, self._inbox)
        self._site = Connection(site, f"gateway:{upstream.name}", self._inbox)
        for kind in KINDS:
            self._site.subscribe(topics.every_node(kind), qos=1)
        self._down, self._up = Outbox(self._site), Outbox(self._upstream)
        self._nodes: dict[str, _Node] = {}
        self._documents: dict[str, bytes] = {}
        """Releases and manifests that were ordered here, by digest."""
        self._manifests: set[str] = set()
        self._asked: set[str] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="relay")

    def start(self) -> None:
        """Connect both ways and work in a thread."""
        self._upstream.start()
        self._site.start()
        self._thread.start()

    def stop(self) -> None:
        """Stop and disconnect; idempotent."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()
        self._upstream.stop()
        self._site.stop()

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                waits = self._down.pump() | self._up.pump()
                with suppress(queue.Empty):
                    self._take(self._inbox.get(timeout=PUMP_S if waits else TURN_S))
        except BaseException:
            log.exception("relay_died")
            self._on_death()
            raise

    def _take(self, message: object) -> None:
        if isinstance(message, LinkUp):
            log.info("link_up", client=message.client_id)
            self._tell_everything(message.client_id)
        elif isinstance(message, LinkDown):
            log.warning("link_down", client=message.client_id, reason=message.reason)
        elif isinstance(message, Received):
            try:
                self._carry(message)
            except AmperageError as error:
                self.refusals.add(message.topic, error)
            message.ack()

    def _tell_everything(self, client_id: str) -> None:
        if client_id == self._upstream.client_id:
            for node in self._nodes.values():
                for topic, payload in node.told.items():
                    self._up.put(topic, payload, retain=True)
            return
        for digest, document in self._documents.items():
            self._down.put(self._topics.document(digest), document, retain=True)
        for name, node in self._nodes.items():
            if node.desired is not None:
                self._down.put(self._topics.desired(name), node.desired, retain=True)

    def _carry(self, message: Received) -> None:
        name, kind = self._topics.node_of(message.topic) or ("", "")
        if kind in KINDS:
            self._carry_up(name, kind, message)
        elif kind == "desired" and name in self._nodes:
            self._carry_order(name, message.payload)
        elif kind == "ack" and name in self._nodes:
            self._send(self._site, message)
        elif message.topic.startswith(self._topics.document("")):
            self._carry_document(message.topic.removeprefix(self._topics.document("")), message.payload)

    def _carry_up(self, name: str, kind: str, message: Received) -> None:
        node = self._node(name)
        if node is None:
            return
        if len(message.payload) > REPORT_LIMIT_BYTES:
            raise ArtifactError(Code.BAD_DOCUMENT, f"{kind} of {len(message.payload)} bytes is too large to carry")
        if kind in NUMBERED:
            self._send(self._upstream, message)
        elif node.told.get(message.topic) != message.payload:
            node.told[message.topic] = message.payload
            self._up.put(message.topic, message.payload, retain=True)

    def _node(self, name: str) -> _Node | None:
        """The node of that name, now known; None when it is none of ours."""
        node = self._nodes.get(name)
        if node is None and (not self._allowed or name in self._allowed):
            if len(self._nodes) >= NODES_MOST:
                raise ArtifactError(Code.WRONG_NODE, f"more than {NODES_MOST} nodes at one site; name them in `nodes`")
            node = self._nodes[name] = _Node()
            for topic in (self._topics.desired(name), self._topics.ack(name)):
                self._upstream.subscribe(topic, qos=1)
            log.info("node_found", node=name, nodes=len(self._nodes))
        return node

    def _send(self, link: Connection, message: Received) -> None:
        """Hand on what its sender repeats until it is answered: it may be lost here."""
        with suppress(TransferError):
            link.publish(message.topic, message.payload, qos=1)

    def _carry_order(self, name: str, payload: bytes) -> None:
        """Whether an order is good is for the node to say; what it names will be asked for in a moment."""
        node = self._nodes[name]
        node.desired, before = payload, node.releases
        self._down.put(self._topics.desired(name), payload, retain=True)
        node.releases = _releases_in(payload)
        if node.releases != before:
            self._follow()

    def _carry_document(self, digest: str, payload: bytes) -> None:
        if digest not in self._asked or not payload:
            return
        if len(payload) > DOCUMENT_LIMIT_BYTES:
            raise ArtifactError(Code.BAD_DOCUMENT, f"document of {len(payload)} bytes is too large to carry")
        verify_digest(payload, digest, "a document")
        if digest in self._manifests:
            self._library.put_manifest(digest, payload)
        self._keep(digest, payload)
        self._follow()

    def _follow(self) -> None:
        """Ask for the documents that the orders of the site lead to; forget those they no longer lead to."""
        releases = {digest for node in self._nodes.values() for digest in node.releases}
        opened = [_manifests_in(self._documents[digest]) for digest in releases & self._documents.keys()]
        self._manifests = set().union(*opened)
        for digest in self._manifests - self._documents.keys():
            document = self._library.document(digest)
            if document is not None:
                self._keep(digest, document)
        wanted = releases | self._manifests
        self._documents = {digest: document for digest, document in self._documents.items() if digest in wanted}
        asked = wanted - self._documents.keys()
        for digest in asked - self._asked:
            self._upstream.subscribe(self._topics.document(digest), qos=1)
        for digest in self._asked - asked:
            self._upstream.unsubscribe(self._topics.document(digest))
        self._asked = asked

    def _keep(self, digest: str, payload: bytes) -> None:
        self._documents[digest] = payload
        self._down.put(self._topics.document(digest), payload, retain=True)


def _releases_in(order: bytes) -> frozenset[str]:
    if not order:
        return frozenset()  # a cleared retained message orders nothing
    desired = parse_document(Desired, unverified_payload(order, Role.DESIRED))
    return frozenset(entry.release for entry in desired.models)


def _manifests_in(envelope: bytes) -> frozenset[str]:
    try:
        release = parse_document(Release, unverified_payload(envelope, Role.RELEASE))
    except ArtifactError:  # of a newer form, or no release at all: that is for the node to say
        return frozenset()
    return frozenset(
        reference.manifest for variant in release.variants for reference in (variant.full, *variant.deltas)
    )
