"""`amperage fleet serve` as a real process, the operator's commands, and nodes of wire messages on a real broker."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fleet_process import AMPERAGE, Site
from fleet_samples import BOOT, Publisher, committed, failed, wait

from benchmarks.packs import make_artifact
from cli.fleet_client import FleetClient
from fleet.broker import PrivateBroker
from fleet.inquiry import ASK_EVERY_S
from host.link import Broker
from host.unix_http import request
from wire.errors import AmperageError, Code
from wire.messages import State
from wire.topics import Topics

pytestmark = pytest.mark.e2e


@pytest.fixture
def site(tmp_path: Path, broker: PrivateBroker, request: pytest.FixtureRequest) -> Iterator[Site]:
    site = Site(
        tmp_path, Broker(host=broker.host, port=broker.port), Topics(f"site/{request.node.name}"),
        Publisher(tmp_path / "keys"),
    )  # fmt: skip
    site.start()
    yield site
    for node in site.nodes:
        node.__exit__()
    assert site.process
    if site.process.poll() is None:
        assert site.stop() == 0, (site.directory / "log").read_text()


def amperage(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([AMPERAGE, *arguments], capture_output=True, text=True, timeout=60, check=False)


def test_release_published_and_rolled_out_by_the_commands_is_committed_everywhere(site: Site) -> None:
    for name in ("node-1", "node-2"):
        site.node(name)
    folder = site.directory / "release"
    release = site.publisher.write(folder, make_artifact())
    api = ("--api", str(site.socket))
    published = amperage("fleet", "publish", str(folder), *api, "--json")
    assert published.returncode == 0, published.stderr
    assert json.loads(published.stdout) == {"release": release, "model": "tales", "version": "1.0"}
    done = amperage("fleet", "rollout", release, "--nodes", "node-1,node-2", "--wait", *api)
    assert done.returncode == 0, done.stderr
    assert "succeeded" in done.stdout
    table = amperage("fleet", "nodes", *api)
    assert "node-1" in table.stdout
    assert "committed" in table.stdout
    nodes = json.loads(amperage("fleet", "nodes", *api, "--json").stdout)
    assert [(node["node"], node["online"], node["ordered"]) for node in nodes] == [
        ("node-1", True, {"tales": release}), ("node-2", True, {"tales": release}),
    ]  # fmt: skip
    for view in ("releases", "rollouts", "events", "telemetry"):
        assert amperage("fleet", view, *api).returncode == 0


def test_failure_over_the_limit_stops_the_rollout_and_orders_unfinished_nodes_back(site: Site) -> None:
    old, new = site.publish("1.0"), site.publish("2.0")
    good = site.node("good")
    bad = site.node("bad", lambda release: failed(release) if release == new else committed(release))
    slow = site.node("slow", lambda release: None if release == new else committed(release))
    assert site.ended(site.order(old, "good", "bad", "slow"))["state"] == "succeeded"
    ended = site.ended(site.order(new, "good", "bad", "slow"))
    assert ended["state"] == "stopped"
    assert "bad: golden_mismatch" in ended["reason"]
    assert {node["node"]: node["outcome"] for node in ended["nodes"]}["slow"] == "ordered_back"
    wait(lambda: slow.orders[-1].models[0].release == old)
    assert [order.models[0].release for order in bad.orders] == [old, new], "it ended by itself"
    generations = [order.generation for order in slow.orders]
    assert generations == sorted(set(generations))
    assert good.orders[-1].models[0].release in (old, new)
    other = site.publish("other", make_artifact(version="1.0", model="other"))
    site.order(other, "bad")
    wait(lambda: len(bad.orders) == 3)
    assert [entry.release for entry in bad.orders[-1].models] == [other, old], "what failed is not ordered again"


def test_allowed_failures_let_the_rollout_succeed_with_a_reason(site: Site) -> None:
    release = site.publish()
    site.node("good")
    site.node("bad", failed)
    ended = site.ended(site.order(release, "good", "bad", max_failures=1))
    assert ended["state"] == "succeeded"
    assert "bad: golden_mismatch" in ended["reason"]


def test_node_that_never_answers_is_reaped_at_the_deadline(site: Site) -> None:
    release = site.publish()
    ended = site.ended(site.order(release, "nobody", deadline_s=0.5))
    assert ended["state"] == "stopped"
    assert "nobody: deadline_passed" in ended["reason"]
    assert ended["nodes"][0]["outcome"] == "expired"


def test_aborted_rollout_orders_back_and_frees_the_nodes(site: Site) -> None:
    release = site.publish()
    node = site.node("slow", lambda release: None)
    identity = site.order(release, "slow")
    wait(lambda: node.orders)
    with pytest.raises(AmperageError) as refused:
        site.order(release, "slow")
    assert refused.value.code is Code.SUPERSEDED
    api = ("--api", str(site.socket))
    assert amperage("fleet", "abort", str(identity), *api).returncode == 0
    assert site.rollout(identity)["state"] == "aborted"
    wait(lambda: node.orders[-1].models == ())
    again = amperage("fleet", "abort", str(identity), *api)
    assert again.returncode == 1
    assert "does not run" in again.stderr


def test_same_failure_reported_before_the_order_does_not_count_against_it(site: Site) -> None:
    release = site.publish()
    node = site.node("node-1", failed)
    assert site.ended(site.order(release, "node-1"))["state"] == "stopped"
    identity = site.order(release, "node-1")
    wait(lambda: site.generation("node-1") == 2)
    node.say("event", node.event(1, release, State.DECODING))
    wait(lambda: node.acks.get(BOOT) == 1)
    assert site.rollout(identity)["state"] == "running", "the report is of the attempt before"
    node.report(node.orders[-1].generation, committed(release))
    assert site.ended(identity)["state"] == "succeeded"


def test_failure_after_a_new_attempt_counts_even_when_the_report_came_first(site: Site) -> None:
    release = site.publish()
    node = site.node("node-1", failed)
    assert site.ended(site.order(release, "node-1"))["state"] == "stopped"
    identity = site.order(release, "node-1")
    wait(lambda: site.generation("node-1") == 2)
    node.say("event", node.event(1, release, State.ADMITTED))
    wait(lambda: site.rollout(identity)["state"] == "stopped", ASK_EVERY_S / 2)  # without asking for the report again


def test_release_by_a_stranger_is_refused_with_the_code(site: Site) -> None:
    stranger = Publisher(site.directory / "stranger")
    folder = site.directory / "strange"
    stranger.write(folder, make_artifact())
    done = amperage("fleet", "publish", str(folder), "--api", str(site.socket), "--json")
    assert done.returncode == 1
    assert "unknown_signer" in done.stderr
    assert site.client.get("/api/releases") == []


def test_damaged_pack_is_refused_and_leaves_nothing(site: Site) -> None:
    artifact = make_artifact(data_bytes=40 * 120 * 1024)
    folder = site.directory / "damaged"
    site.publisher.write(folder, artifact)
    damaged = bytearray(artifact.pack)
    damaged[5_000] ^= 1
    (folder / f"{artifact.digest}.pack").write_bytes(damaged)
    with pytest.raises(AmperageError) as refused:
        site.client.publish(folder)
    assert refused.value.code is Code.FRAME_MISMATCH
    assert not list((site.directory / "data" / "packs").iterdir())
    with pytest.raises(AmperageError) as missing:
        site.client.post("/api/rollouts", {"release": "0" * 64, "nodes": ["node-1"]})
    assert missing.value.code is Code.DOCUMENT_MISSING


@pytest.mark.parametrize(
    ("method", "target", "body", "status"),
    [
        ("GET", "/api/nodes/none", None, 404),
        ("GET", "/api/rollouts/99", None, 404),
        ("GET", "/api/telemetry?limit=x", None, 400),
        ("GET", "/api/events?after=-1", None, 400),
        ("POST", "/api/rollouts", b"{", 422),
        ("POST", "/api/rollouts", b'{"release":"' + b"0" * 64 + b'","nodes":[]}', 422),
        ("POST", "/api/rollouts", b'{"release":"' + b"0" * 64 + b'","nodes":"all"}', 404),
        ("POST", "/api/releases", b"x" * 100_000, 422),
        ("PUT", "/api/documents/" + "0" * 64, b"{}", 422),
        ("PUT", "/api/documents/..", b"{}", 422),
        ("PUT", "/api/packs/" + "0" * 64, b"x" * 3_000_000, 404),
        ("POST", "/api/rollouts/7/abort", b"", 404),
    ],
)
def test_order_that_makes_no_sense_is_answered_with_a_code(
    site_of_module: Site, method: str, target: str, body: bytes | None, status: int
) -> None:
    answer = request(site_of_module.socket, method, target, body)
    assert answer.status == status, answer.body
    assert set(json.loads(answer.body)) == {"error", "code"}


@pytest.fixture(scope="module")
def site_of_module(tmp_path_factory: pytest.TempPathFactory, broker: PrivateBroker) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    site = Site(folder, Broker(host=broker.host, port=broker.port), Topics("site/orders"), Publisher(folder / "keys"))
    site.start()
    yield site
    assert site.stop() == 0


def test_events_are_acknowledged_once_stored_and_survive_a_kill(site: Site) -> None:
    node = site.node("node-1")
    wait(node.link.is_up)
    node.say("event", node.event(1))
    node.say("event", node.event(3))
    wait(lambda: node.acks.get(BOOT) == 1)
    node.say("event", node.event(1))  # a repetition
    node.say("event", node.event(2))
    wait(lambda: node.acks.get(BOOT) == 3)
    site.stop(signal.SIGKILL)
    site.start()
    events = site.client.get("/api/events?node=node-1")
    assert [event["seq"] for event in events] == [1, 3, 2], "by arrival"
    assert [event["seq"] for event in site.client.get(f"/api/events?after={events[0]['id']}")] == [3, 2]
    node.say("event", node.event(9, first=7))  # 4 to 6 were dropped by the node, 7 and 8 are still to come
    wait(lambda: node.acks.get(BOOT) == 6)
    assert site.client.get("/api/nodes/node-1")["lost_reports"] == 3


def test_hostile_reports_are_counted_and_harm_nobody(site: Site) -> None:
    honest, hostile = site.node("honest"), site.node("hostile")
    for node in (honest, hostile):
        wait(node.link.is_up)
    event = hostile.event(1).decode()
    payloads = {
        "event": [
            b"", b"{", b"[]", b"\xff\xfe", b"x" * 300_000, b"[" * 10_000, honest.event(1),
            event.replace('"seq":1', '"seq":0').encode(), event.replace('"seq":1', f'"seq":{1 << 70}').encode(),
            event.replace('"time_s":1.0', '"time_s":NaN').encode(),
            event.replace('"first":1', f'"first":{1 << 60}').encode(),
        ],
        "status": [b"{}", b'{"node":"honest","online":false}'],
        "reported": [b"\0", b'{"node":"hostile","generation":1e400}'],
        "telemetry": [b"{}"],
    }  # fmt: skip
    for kind, items in payloads.items():
        for payload in items:
            hostile.say(kind, payload)
    honest.say("event", honest.event(1))
    wait(lambda: honest.acks.get(BOOT) == 1)
    assert site.client.get("/api/health")["reports_refused"] == sum(map(len, payloads.values())) - 1
    assert [event["node"] for event in site.client.get("/api/events")] == ["honest"]
    assert {node["node"]: node["online"] for node in site.client.get("/api/nodes")} == {"honest": True, "hostile": True}


def test_restarted_control_plane_sends_the_same_orders_and_goes_on(site: Site) -> None:
    release = site.publish()
    node = site.node("slow", lambda release: None)
    identity = site.order(release, "slow")
    wait(lambda: node.orders)
    assert site.stop() == 0
    assert not site.socket.exists()
    site.start()
    wait(lambda: len(node.orders) == 2)
    assert node.orders[0] == node.orders[1]
    node.report(node.orders[0].generation, committed(release))
    assert site.ended(identity)["state"] == "succeeded"


def test_node_that_obeyed_a_higher_generation_is_ordered_beyond_it(site: Site) -> None:
    release = site.publish()
    node = site.node("node-1")
    assert site.ended(site.order(release, "node-1"))["state"] == "succeeded"
    node.report(41, committed(release))
    wait(lambda: site.generation("node-1") == 41)
    assert site.ended(site.order(release, "node-1"))["state"] == "succeeded"
    assert node.orders[-1].generation == 42


def test_node_off_line_is_known_and_its_late_will_does_not_bury_a_new_life(site: Site) -> None:
    node = site.node("node-1")
    wait(lambda: [row["online"] for row in site.client.get("/api/nodes")] == [True])
    node.say("status", node._status(0, online=False))
    node.say("event", node.event(1))
    wait(lambda: node.acks.get(BOOT) == 1)
    assert site.client.get("/api/nodes/node-1")["online"] is True
    node.say("status", node._status(1, online=False))
    wait(lambda: site.client.get("/api/nodes/node-1")["online"] is False)


def test_second_control_plane_on_one_socket_is_refused(site: Site) -> None:
    done = amperage("fleet", "serve", "--settings", str(site.directory / "fleet.toml"))
    assert done.returncode == 78
    assert "another process listens" in done.stderr + done.stdout
    assert site.is_up()


def test_control_plane_of_a_directory_brings_its_own_broker_and_leaves_none_behind(tmp_path: Path) -> None:
    directory = tmp_path / "fleet"
    before = amperage("fleet", "serve", "--directory", str(directory))
    assert before.returncode == 78
    assert "amperage keys init" in before.stderr
    assert amperage("keys", "init", str(directory / "keys")).returncode == 0
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([AMPERAGE, "fleet", "serve", "--directory", str(directory)], stdout=log, stderr=log)
    client = FleetClient(directory / "api.sock")
    wait((directory / "api.sock").exists)
    wait(lambda: client.get("/api/health")["status"] == "ok")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 1
    started_s = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(15) == 0
    assert time.monotonic() - started_s < 15
    assert not os.path.exists(f"/proc/{children[0]}")  # noqa: PTH110


def test_key_that_the_policy_does_not_trust_is_refused_at_the_start(tmp_path: Path) -> None:
    publisher, other = Publisher(tmp_path / "keys"), Publisher(tmp_path / "other")
    settings = tmp_path / "fleet.toml"
    settings.write_text(
        f'directory = "{tmp_path}/data"\napi_socket = "{tmp_path}/api.sock"\n'
        f'desired_key = "{other.directory}/desired.pem"\ntrust = "{publisher.directory}/trust.json"\n'
    )
    done = amperage("fleet", "serve", "--settings", str(settings))
    assert done.returncode == 78
    assert "unknown_signer" in done.stderr
