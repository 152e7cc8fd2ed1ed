"""The depot over a real Mosquitto, with nodes that fetch by the agent's own protocol logic."""

import queue
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fleet_samples import BOOT, FetchingNode, wait

from benchmarks.packs import Artifact, make_artifact
from fleet.broker import PrivateBroker
from fleet.depot import Depot
from fleet.library import Library
from host.link import Broker
from host.mqtt import Connection
from wire.bitmap import Bitmap
from wire.documents import encode_document
from wire.manifest import FRAME_BYTES
from wire.messages import Status, Want
from wire.topics import Topics

pytestmark = pytest.mark.e2e

FRAMES = 150


@pytest.fixture(scope="module")
def artifact() -> Artifact:
    return make_artifact(FRAMES * FRAME_BYTES - 5)


@pytest.fixture
def library(tmp_path: Path, artifact: Artifact) -> Library:
    library = Library(tmp_path / "library")
    put(library, artifact)
    return library


@pytest.fixture
def address(broker: PrivateBroker) -> Broker:
    return Broker(host=broker.host, port=broker.port, reconnect_max_s=0.25)


@pytest.fixture
def topics(request: pytest.FixtureRequest) -> Topics:
    return Topics(f"test/{request.node.name}")


@pytest.fixture
def depot(address: Broker, topics: Topics, library: Library) -> Iterator[Depot]:
    """Serves already: a want has QoS 0, and one that is said before the depot listens is nobody's."""
    link = Connection(address, "early", queue.Queue(64))
    link.start()
    early = Status(node="early", online=False, boot_id=BOOT, session=1)
    wait(link.is_up)
    link.publish(topics.status("early"), encode_document(early), qos=1, retain=True)
    depot = Depot(address, topics, library)
    depot.start()
    wait(lambda: depot._presence.get("early"))
    link.stop()
    yield depot
    depot.stop()


def put(library: Library, artifact: Artifact) -> None:
    library.put_manifest(artifact.digest, artifact.document)
    upload = library.begin_upload(artifact.digest)
    upload.feed(artifact.pack)
    upload.commit()
    upload.discard()


def test_one_node_gets_the_pack_and_every_frame_crosses_once(
    address: Broker, topics: Topics, depot: Depot, artifact: Artifact
) -> None:
    with FetchingNode(address, topics, "node-1", artifact) as node:
        assert node.done.wait(30)
    assert bytes(node.pack) == artifact.pack
    assert depot.published == artifact.manifest.frame_count
    assert node.fetch.refused == 0


def test_two_nodes_at_once_cost_little_more_than_one(
    address: Broker, topics: Topics, depot: Depot, artifact: Artifact
) -> None:
    first, second = (FetchingNode(address, topics, f"node-{i}", artifact) for i in (1, 2))
    with first, second:
        assert first.done.wait(30)
        assert second.done.wait(30)
    assert bytes(first.pack) == bytes(second.pack) == artifact.pack
    assert depot.published <= 1.2 * artifact.manifest.frame_count


def test_several_artifacts_are_served_in_turn(
    address: Broker, topics: Topics, depot: Depot, library: Library, artifact: Artifact
) -> None:
    small = make_artifact(20 * FRAME_BYTES, seed=2, version="2.0")
    put(library, small)
    with (
        FetchingNode(address, topics, "node-1", artifact) as one,
        FetchingNode(address, topics, "node-2", small) as two,
    ):
        assert one.done.wait(30)
        assert two.done.wait(30)
    assert bytes(two.pack) == small.pack
    assert bytes(one.pack) == artifact.pack


def test_depot_that_starts_anew_in_the_middle_finishes_the_fetch(
    address: Broker, topics: Topics, library: Library, artifact: Artifact
) -> None:
    first, second = Depot(address, topics, library), Depot(address, topics, library)
    first.start()
    try:
        with FetchingNode(address, topics, "node-1", artifact) as node:
            wait(lambda: node.fetch.frames_verified > 10)
            first.stop()
            second.start()
            assert node.done.wait(30)
        assert bytes(node.pack) == artifact.pack
        assert first.epoch != second.epoch
    finally:
        first.stop()
        second.stop()


def test_node_whose_will_is_published_is_sent_nothing_more(
    address: Broker, topics: Topics, depot: Depot, artifact: Artifact
) -> None:
    link = Connection(address, "ghost", queue.Queue(64))
    link.start()
    wait(link.is_up)
    want = Want(
        node="ghost", artifact=artifact.digest, frames=artifact.manifest.frame_count,
        missing=Want.encode_missing(Bitmap.full(artifact.manifest.frame_count)), credit=4,
    )  # fmt: skip
    link.publish(topics.want("ghost"), encode_document(want))
    wait(lambda: depot.published == 4)
    offline = Status(node="ghost", online=False, boot_id=BOOT, session=1)
    link.publish(topics.status("ghost"), encode_document(offline), qos=1)
    wait(lambda: depot._presence.get("ghost"))
    assert all(offer.carousel.readers == 0 for offer in depot._offers.values())
    link.stop()


def test_depot_knows_how_many_nodes_could_come(
    address: Broker, topics: Topics, depot: Depot, artifact: Artifact
) -> None:
    link = Connection(address, "others", queue.Queue(64))
    link.start()
    wait(link.is_up)
    try:
        for name, online in (("node-1", True), ("node-2", True), ("gone", True), ("gone", False)):
            status = Status(node=name, online=online, boot_id=BOOT, session=1)
            link.publish(topics.status(name), encode_document(status), qos=1)
        wait(lambda: (gone := depot._presence.get("gone")) and not gone.online)
        with FetchingNode(address, topics, "node-1", artifact):
            wait(lambda: depot._offers)
            assert next(iter(depot._offers.values())).carousel.company == 2
    finally:
        link.stop()


def test_hostile_messages_are_counted_and_others_are_served(
    address: Broker, topics: Topics, depot: Depot, artifact: Artifact
) -> None:
    link = Connection(address, "hostile", queue.Queue(64))
    link.start()
    wait(link.is_up)
    frames = artifact.manifest.frame_count
    honest = Want(node="node-1", artifact=artifact.digest, frames=frames, missing="", credit=1)
    first = Want.encode_missing(Bitmap(frames + 1, bytes([1] + [0] * (frames // 8))))  # fits the true number too
    assert (frames + 1 + 7) // 8 == (frames + 7) // 8
    bad = [
        b"", b"{", b"\xff" * 100, b'{"schema":2}',
        encode_document(honest),  # in the name of another node
        encode_document(honest.model_copy(update={"node": "hostile"})),  # a bitmap that does not fit
        encode_document(honest.model_copy(update={"node": "hostile", "frames": frames + 1, "missing": first})),
        encode_document(honest.model_copy(update={"node": "hostile", "artifact": "f" * 64})),
        encode_document(honest.model_copy(update={"node": "hostile", "missing": "!"})),
    ]  # fmt: skip
    for payload in bad:
        link.publish(topics.want("hostile"), payload, qos=1)
    link.publish(topics.status("hostile"), b"[]", qos=1)
    wait(lambda: depot.refusals.count == len(bad) + 1)
    with FetchingNode(address, topics, "node-1", artifact) as node:
        assert node.done.wait(30)
    link.stop()


def test_broker_restart_in_the_middle_of_a_fetch_finishes_it(
    tmp_path: Path, topics: Topics, library: Library, artifact: Artifact
) -> None:
    broker = PrivateBroker(tmp_path / "broker")
    broker.start()
    second = PrivateBroker(tmp_path / "second", port=broker.port)
    address = Broker(host=broker.host, port=broker.port, reconnect_max_s=0.25)
    depot = Depot(address, topics, library)
    depot.start()
    try:
        with FetchingNode(address, topics, "node-1", artifact) as node:
            wait(lambda: node.fetch.frames_verified > 10)
            broker.stop()
            second.start()
            started_s = time.monotonic()
            assert node.done.wait(30)
        assert bytes(node.pack) == artifact.pack
        assert time.monotonic() - started_s < 30
    finally:
        depot.stop()
        broker.stop()
        second.stop()


def test_pack_that_was_cut_on_disk_is_reported_and_others_are_served(
    address: Broker, topics: Topics, depot: Depot, library: Library, artifact: Artifact
) -> None:
    cut = make_artifact(20 * FRAME_BYTES, seed=3, version="3.0")
    put(library, cut)
    path = library.pack_path(cut.digest)
    assert path
    with path.open("r+b") as pack:
        pack.truncate(5 * FRAME_BYTES)
    with FetchingNode(address, topics, "node-1", cut) as unlucky, FetchingNode(address, topics, "n2", artifact) as node:
        assert node.done.wait(30)
        wait(lambda: unlucky.fetch.frames_verified >= 4)
        assert not unlucky.fetch.refused
