"""Several nodes in one process, each with the agent's own store, journal, mailbox, links and transfer, and a thread.

A child of `bench fanout`: reads its orders as JSON from stdin, fetches, prints what every node counted, and ends.
"""

import json
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from agent.journal import Journal
from agent.links import BrokerLinks
from agent.mailbox import Mailbox
from agent.settings import AgentSettings
from agent.store import Store
from agent.transfer import Transfer
from host.clock import SystemClock
from host.link import Broker, LinkUp, Received
from wire.documents import parse_document
from wire.manifest import Manifest
from wire.topics import Topics

TIMEOUT_S = 300.0
TURN_S = 0.1
"""As agent/engine.py BUSY_TURN_S."""


@dataclass(frozen=True, slots=True)
class Order:
    """One node: its place, when it starts (seconds since 1970) and how fast its link is."""

    node: str
    directory: str
    starts_s: float
    bytes_per_s: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a node saw; seconds from its start to the last frame in its journal."""

    node: str
    seconds: float
    frames: int
    duplicates: int
    refused: int


def fetch(order: Order, port: int, root: str, artifact: str, manifest: Manifest) -> Outcome:
    """One node's whole fetch, as agent/engine.py drives it."""
    directory = Path(order.directory)
    settings = AgentSettings(
        node=order.node, store=directory, trust=directory / "trust.json", root=root,
        broker=Broker(host="127.0.0.1", port=port),
    )  # fmt: skip
    mailbox, links, store = Mailbox(), BrokerLinks(settings), Store(directory)
    store.adopt(frozenset())
    journal = Journal(directory, "0" * 32)
    time.sleep(max(0.0, order.starts_s - time.time()))
    transfer = Transfer(order.node, artifact, manifest)
    transfer.start(store, journal, SystemClock())
    transfer.connect(links.bulk(mailbox.new_frames_port(), order.bytes_per_s), Topics(root), order.bytes_per_s)
    deadline_s = time.monotonic() + TIMEOUT_S
    while not transfer.fetch.is_complete and time.monotonic() < deadline_s:
        mailbox.wait(TURN_S)
        for message in mailbox.take_frames():
            if isinstance(message, Received):
                transfer.take(message)
            elif isinstance(message, LinkUp):
                transfer.link_up()
            transfer.tick()
        transfer.tick()
    seconds = time.time() - order.starts_s
    transfer.close()
    journal.close()
    done = transfer.fetch
    return Outcome(order.node, seconds, done.frames_verified, done.duplicates, transfer.refused)


def main() -> int:
    """Fetch with every node of the orders at once."""
    orders = json.loads(sys.stdin.readline())
    manifest = parse_document(Manifest, Path(orders["manifest"]).read_bytes())
    outcomes: list[Outcome] = []

    def work(order: Order) -> None:
        outcomes.append(fetch(order, orders["port"], orders["root"], orders["artifact"], manifest))

    threads = [threading.Thread(target=work, args=(Order(**order),)) for order in orders["nodes"]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(json.dumps([asdict(outcome) for outcome in outcomes]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
