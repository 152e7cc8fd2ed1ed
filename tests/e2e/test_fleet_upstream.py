"""What a gateway fetches, over a real Mosquitto with a real depot at its other side."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fleet_samples import FetchingNode, wait

from benchmarks.packs import Artifact, make_artifact
from fleet.broker import PrivateBroker
from fleet.depot import Depot
from fleet.library import FETCHING, Library
from fleet.partial import Partial
from fleet.settings import UpstreamSettings
from fleet.upstream import Upstream
from host.link import Broker, Received
from wire.digest import digest_of
from wire.manifest import FRAME_BYTES
from wire.messages import FrameMessage
from wire.topics import Topics

pytestmark = pytest.mark.e2e

ALWAYS = {"start": "00:00", "end": "24:00"}


@pytest.fixture(scope="module")
def artifact() -> Artifact:
    return make_artifact(40 * FRAME_BYTES - 5)


@pytest.fixture
def topics(request: pytest.FixtureRequest) -> Topics:
    return Topics(f"upstream/{request.node.name}")


@pytest.fixture
def depot(tmp_path: Path, broker: PrivateBroker, topics: Topics, artifact: Artifact) -> Iterator[Depot]:
    library = Library(tmp_path / "origin")
    library.put_manifest(artifact.digest, artifact.document)
    upload = library.begin_upload(artifact.digest)
    upload.feed(artifact.pack)
    upload.commit()
    upload.discard()
    depot = Depot(Broker(host=broker.host, port=broker.port), topics, library)
    depot.start()
    yield depot
    depot.stop()


@pytest.fixture
def library(tmp_path: Path, artifact: Artifact) -> Library:
    library = Library(tmp_path / "gateway")
    library.put_manifest(artifact.digest, artifact.document)
    return library


def settings(broker: PrivateBroker, **more: object) -> UpstreamSettings:
    address = {"host": broker.host, "port": broker.port}
    return UpstreamSettings.model_validate({"name": "gate", "broker": address, **more})


def fetched(upstream: Upstream, library: Library, artifact: Artifact) -> bytes:
    """The pack, wanted until it is whole."""
    wait(lambda: upstream.partial(artifact.digest) is None and library.pack_path(artifact.digest), 30)
    return library.path_of(artifact.digest).read_bytes()


def test_partial_with_damage_is_taken_up_and_only_the_damage_fetched(
    depot: Depot, broker: PrivateBroker, topics: Topics, library: Library, artifact: Artifact
) -> None:
    path = library.path_of(artifact.digest).with_name(f".{artifact.digest}{FETCHING}")
    damaged = bytearray(artifact.pack)
    for frame in (7, 8, 30):
        damaged[artifact.manifest.frame_range(frame)[0]] ^= 1
    path.write_bytes(damaged)
    upstream = Upstream(settings(broker), topics, library)
    upstream.start()
    assert fetched(upstream, library, artifact) == artifact.pack
    upstream.stop()
    assert depot.published == upstream.received == 3
    assert not path.exists()


def test_damage_to_the_index_means_that_nothing_is_known(library: Library, artifact: Artifact) -> None:
    path = library.path_of(artifact.digest)
    path.write_bytes(b"\0" + artifact.pack[1:])
    partial = Partial(artifact.manifest, path)
    assert partial.bits == 0
    partial.close()


def test_pause_makes_no_connection_and_a_cap_holds(
    depot: Depot, broker: PrivateBroker, topics: Topics, library: Library, artifact: Artifact
) -> None:
    pause = {"schedule": [{**ALWAYS, "limit_bytes_per_s": 0}]}
    upstream = Upstream(settings(broker, bandwidth=pause), topics, library)
    upstream.start()
    wait(lambda: upstream.partial(artifact.digest) is not None)
    assert upstream._link is None
    upstream.stop()
    rate = 2_000_000
    upstream = Upstream(settings(broker, bandwidth_limit_bytes_per_s=rate), topics, library)
    upstream.start()
    started_s = time.monotonic()
    assert fetched(upstream, library, artifact) == artifact.pack
    assert time.monotonic() - started_s > 0.7 * len(artifact.pack) / rate
    upstream.stop()


def test_artifact_that_no_order_names_is_not_fetched(
    depot: Depot, broker: PrivateBroker, topics: Topics, tmp_path: Path, artifact: Artifact
) -> None:
    upstream = Upstream(settings(broker), topics, Library(tmp_path / "empty"))
    gateway = Depot(Broker(host=broker.host, port=broker.port), Topics("upstream/site"), Library(tmp_path / "empty"),
                    source=upstream)  # fmt: skip
    upstream.start()
    gateway.start()
    with FetchingNode(Broker(host=broker.host, port=broker.port), Topics("upstream/site"), "n1", artifact):
        wait(lambda: gateway.refusals.count)
    gateway.stop()
    upstream.stop()
    assert upstream.received == depot.published == 0


def test_artifact_whose_index_is_wrong_is_tried_once(
    broker: PrivateBroker, topics: Topics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its frames are the signed ones, and no index: asking again would only cost the link."""
    monkeypatch.setattr("fleet.upstream.RETRY_S", 0.0)
    made = make_artifact()
    index = bytes(made.manifest.index_size_bytes)
    wrong = Artifact(made.manifest.model_copy(update={"index_frames": (digest_of(index),)}), index)
    library = Library(tmp_path / "gateway")
    library.put_manifest(wrong.digest, wrong.document)
    upstream = Upstream(settings(broker), topics, library)
    upstream.partial(wrong.digest)
    upstream._begin_and_end()
    assert upstream.partial(wrong.digest) is not None
    frame = FrameMessage(1, 1, 0, index).encode()
    upstream._take(Received(topics.frames(wrong.digest), frame, 1, False, 1, 0, lambda _session, _mid: None))
    assert upstream.partial(wrong.digest) is None
    upstream._begin_and_end()
    assert upstream.partial(wrong.digest) is None
