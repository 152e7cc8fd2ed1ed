"""The shipped configurations work: the broker's by a broker with certificates, the settings by the programs' models."""

import datetime as dt
import importlib
import ipaddress
import os
import queue
import re
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePrivateKey, generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from agent.settings import AgentSettings
from fleet.broker import find_mosquitto
from host.link import Broker, LinkDown, LinkUp, Received
from host.mqtt import Connection
from host.settings import Settings, load_settings
from runtime.settings import RuntimeSettings
from wire.topics import Topics

PACKAGING = Path(__file__).resolve().parents[2] / "packaging"
TOPICS = Topics()
FROM_NODE = ("status", "reported", "event", "telemetry", "want")
TO_NODE = ("desired", "ack")
DIGEST = "a" * 64
WAIT_S = 10.0


class Authority:
    """A certificate authority that lives as long as a test."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.key = generate_private_key(SECP256R1())
        self.name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "Test authority")])
        self._write("ca", self._certificate(self.name, self.key, is_authority=True), self.key)

    def issue(self, common_name: str) -> None:
        """Write NAME.crt and NAME.key."""
        key = generate_private_key(SECP256R1())
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, common_name)])
        self._write(common_name, self._certificate(name, key, is_authority=False), key)

    def _certificate(self, name: x509.Name, key: EllipticCurvePrivateKey, *, is_authority: bool) -> x509.Certificate:
        now = dt.datetime.now(dt.UTC)
        return (
            x509.CertificateBuilder(self.name, name, key.public_key(), x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(minutes=5))
            .not_valid_after(now + dt.timedelta(hours=1))
            .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
            .add_extension(
                x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False
            )
            .sign(self.key, hashes.SHA256())
        )

    def _write(self, stem: str, certificate: x509.Certificate, key: EllipticCurvePrivateKey) -> None:
        (self.directory / f"{stem}.crt").write_bytes(certificate.public_bytes(Encoding.PEM))
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        (self.directory / f"{stem}.key").write_bytes(pem)


class Client:
    """One identity at the site's broker and what it received."""

    def __init__(self, port: int, authority: Authority, common_name: str, client_id: str = "") -> None:
        broker = Broker(
            host="127.0.0.1", port=port, ca_file=authority.directory / "ca.crt",
            certificate_file=authority.directory / f"{common_name}.crt",
            key_file=authority.directory / f"{common_name}.key",
        )  # fmt: skip
        self.inbox: queue.Queue[Any] = queue.Queue(100)
        self.link = Connection(broker, client_id or common_name, self.inbox)
        self.link.subscribe("amperage/#", qos=1)
        self.link.start()
        self.first = self.inbox.get(timeout=WAIT_S)

    def say(self, topic: str, payload: bytes = b"x") -> None:
        assert self.link.publish(topic, payload, qos=1).wait(WAIT_S), f"{topic} was not acknowledged"

    def heard_until(self, last: str) -> list[str]:
        """Topics of the messages up to the one on `last`; a broker keeps one publisher's messages in order."""
        topics: list[str] = []
        while last not in topics:
            message = self.inbox.get(timeout=WAIT_S)
            if isinstance(message, Received):
                message.ack()
                topics.append(message.topic)
        return topics


class Site:
    """The broker of packaging/ with its paths rewritten, and clients of it."""

    def __init__(self, directory: Path) -> None:
        self.authority = Authority(directory)
        for name in ("broker", "fleet", "n1", "n2"):
            self.authority.issue(name)
        text = (PACKAGING / "mosquitto.conf").read_text()
        text = text.replace("/etc/mosquitto/amperage", str(directory)).replace("/var/lib/mosquitto/", f"{directory}/")
        text = text.replace("log_dest syslog", "log_dest stderr").replace("listener 8883", "listener 0 127.0.0.1")
        if os.geteuid() == 0:
            text += "user root\n"
        self.directory, self.text, self.clients = directory, text, list[Connection]()
        (directory / "acl").write_text((PACKAGING / "mosquitto.acl").read_text())

    @contextmanager
    def run(self) -> Iterator[None]:
        program = find_mosquitto()
        configuration, log = self.directory / "mosquitto.conf", self.directory / "log"
        for self.port in free_ports():
            configuration.write_text(self.text.replace("listener 0 ", f"listener {self.port} "))
            with log.open("wb") as sink:
                process = subprocess.Popen(
                    [str(program.path), "-c", str(configuration)], env=program.environment(), stderr=sink, stdout=sink
                )
            if self._listens(process, log):
                break
        try:
            yield
        finally:
            for client in self.clients:
                client.stop()
            process.terminate()
            process.wait(WAIT_S)

    def connect(self, common_name: str, client_id: str = "") -> Client:
        client = Client(self.port, self.authority, common_name, client_id)
        self.clients.append(client.link)
        assert isinstance(client.first, LinkUp)
        return client

    def _listens(self, process: subprocess.Popen[bytes], log: Path) -> bool:
        """Whether it took the port; another program may have been faster."""
        deadline_s = time.monotonic() + WAIT_S
        while time.monotonic() < deadline_s and process.poll() is None:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return process.poll() is None
            time.sleep(0.02)
        process.kill()
        process.wait()
        assert "Address already in use" in log.read_text(), log.read_text()
        return False


def free_ports() -> Iterator[int]:
    for _ in range(5):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        yield port
    raise AssertionError("no port stayed free for long enough")


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path)
    with made.run():
        yield made


def test_node_is_heard_on_each_of_its_topics_and_on_no_other(site: Site) -> None:
    fleet, node = site.connect("fleet"), site.connect("n1")
    for kind in (*FROM_NODE, *TO_NODE):
        node.say(f"amperage/node/n2/{kind}")
    for kind in TO_NODE:
        node.say(f"amperage/node/n1/{kind}")
    node.say(TOPICS.frames(DIGEST))
    node.say(TOPICS.document(DIGEST))
    allowed = [f"amperage/node/n1/{kind}" for kind in FROM_NODE]
    for topic in allowed:
        node.say(topic)
    assert fleet.heard_until(allowed[-1]) == allowed


def test_node_hears_what_is_meant_for_it_and_nothing_else(site: Site) -> None:
    fleet, node, other = site.connect("fleet"), site.connect("n1"), site.connect("n2")
    for kind in FROM_NODE:
        other.say(f"amperage/node/n2/{kind}")
    for kind in TO_NODE:
        fleet.say(f"amperage/node/n2/{kind}")
    allowed = [*(f"amperage/node/n1/{kind}" for kind in TO_NODE), TOPICS.frames(DIGEST), TOPICS.document(DIGEST)]
    for topic in allowed:
        fleet.say(topic)
    assert node.heard_until(allowed[-1]) == allowed


def test_bulk_connection_of_a_node_has_the_nodes_rights(site: Site) -> None:
    fleet, bulk = site.connect("fleet"), site.connect("n1", "n1-bulk")
    fleet.say(TOPICS.frames(DIGEST))
    assert bulk.heard_until(TOPICS.frames(DIGEST)) == [TOPICS.frames(DIGEST)]
    bulk.say(TOPICS.want("n1"))
    assert fleet.heard_until(TOPICS.want("n1"))[-1] == TOPICS.want("n1")


def test_certificate_of_another_authority_is_refused(site: Site, tmp_path: Path) -> None:
    (tmp_path / "foreign").mkdir()
    foreign = Authority(tmp_path / "foreign")
    foreign.issue("n1")
    (tmp_path / "foreign" / "ca.crt").write_bytes((tmp_path / "ca.crt").read_bytes())
    refused = Client(site.port, foreign, "n1")
    refused.link.stop()
    assert isinstance(refused.first, LinkDown)


def test_gateway_carries_for_its_own_nodes_and_orders_nobody(tmp_path: Path) -> None:
    site = Site(tmp_path)
    site.authority.issue("gate-7")
    acl = (tmp_path / "acl").read_text()
    (tmp_path / "acl").write_text(re.sub(r"^#(user|topic) ", r"\1 ", acl, flags=re.MULTILINE))
    with site.run():
        fleet, gateway = site.connect("fleet"), site.connect("gate-7")
        for kind in (*FROM_NODE, *TO_NODE):
            gateway.say(f"amperage/node/n1/{kind}")
        for kind in TO_NODE:
            gateway.say(f"amperage/node/gate-7a/{kind}")
        gateway.say(TOPICS.frames(DIGEST))
        allowed = [f"amperage/node/gate-7a/{kind}" for kind in FROM_NODE if kind != "want"] + [TOPICS.want("gate-7")]
        for topic in allowed:
            gateway.say(topic)
        assert fleet.heard_until(allowed[-1]) == allowed
        heard = [TOPICS.desired("gate-7a"), TOPICS.ack("gate-7a"), TOPICS.document(DIGEST), TOPICS.frames(DIGEST)]
        for topic in (TOPICS.desired("n1"), *heard):
            fleet.say(topic)
        assert gateway.heard_until(heard[-1]) == heard


def test_access_list_speaks_of_every_topic_that_exists() -> None:
    text = (PACKAGING / "mosquitto.acl").read_text()
    named = set(re.findall(r"^(?:pattern|topic) (?:read|write) (\S+)", text, re.MULTILINE))
    kinds = {"frames/+", "doc/+"} | {f"node/{who}/{kind}" for who in ("+", "%u") for kind in (*FROM_NODE, *TO_NODE)}
    assert named == {f"amperage/{kind}" for kind in kinds}
    builders = {name for name in dir(Topics) if not name.startswith("_")} - {"root", "every_node", "node_of"}
    assert builders == {*FROM_NODE, *TO_NODE, "frames", "document"}


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("agent.toml", AgentSettings),
        ("runtime.toml", RuntimeSettings),
        ("fleet.toml", "fleet.settings:FleetSettings"),
        ("depot.toml", "fleet.settings:DepotSettings"),
    ],
)
def test_example_settings_are_taken_and_show_the_defaults(
    name: str, model: type[Settings] | str, tmp_path: Path
) -> None:
    if isinstance(model, str):
        module, _, attribute = model.partition(":")
        model = getattr(importlib.import_module(module), attribute)
    plain = load_settings(model, PACKAGING / name)
    text = re.sub(r"^#(\w+ = )", r"\1", (PACKAGING / name).read_text(), flags=re.MULTILINE)
    (tmp_path / name).write_text(text)
    shown = load_settings(model, tmp_path / name)
    if model is AgentSettings:
        example = re.sub(r"^#   ", "", text, flags=re.MULTILINE)
        assert example != text
        (tmp_path / name).write_text(example)
        assert load_settings(AgentSettings, tmp_path / name).bandwidth.schedule[0].limit_bytes_per_s == 0
    assert shown.model_dump(exclude={"deadlines"}) == plain.model_dump(exclude={"deadlines"})
