"""A node behind a link of 1 Mbit/s, and how soon it obeys while frames fill it; part of `bench transfer`.

The link is a proxy whose connections share one queue and one rate in each direction, as behind a modem: what waits in
the queue is in everybody's way. Emulated: no packet is lost, and the broker's side of it has no other traffic.
"""

import asyncio
import base64
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from benchmarks.harness import ROUNDS, Row, Samples, at_most, row
from benchmarks.site import Fleet, Keys, Release, agent_children, running
from host.link import Broker
from wire.digest import digest_of
from wire.documents import encode_document, parse_document
from wire.messages import State
from wire.release import Release as ReleaseDocument
from wire.signing import Role

BYTES_PER_S = 1_000_000 / 8
CHUNK_BYTES = 1460
QUEUE_CHUNKS = 32
"""46 KB, 0.37 s at 1 Mbit/s."""
BUFFER_BYTES = 16 * 1024
OBEY_LIMIT_S = 1.0
FETCHING_FOR_S = 3.0
"""Long enough that the link and its queue are full of frames."""


class ThinLink:
    """The proxy, a context manager; `address` is where clients connect."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="thin-link", daemon=True)
        self._ready = threading.Event()
        self._port = 0

    def __enter__(self) -> Self:
        self._thread.start()
        self._ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join()

    @property
    def address(self) -> Broker:
        """The broker at the other end of this link."""
        return self._broker.model_copy(update={"port": self._port})

    def _run(self) -> None:
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self) -> None:
        self._end = asyncio.Event()
        queues: list[asyncio.Queue[tuple[asyncio.StreamWriter, bytes]]] = [asyncio.Queue(QUEUE_CHUNKS) for _ in "ud"]
        carriers = [asyncio.create_task(_carry(queue)) for queue in queues]
        pumps: set[asyncio.Task[None]] = set()

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            far_reader, far_writer = await asyncio.open_connection(
                self._broker.host, self._broker.port, limit=BUFFER_BYTES
            )
            for pair in ((reader, far_writer, queues[0]), (far_reader, writer, queues[1])):
                pumps.add(asyncio.create_task(_pump(*pair)))

        server = await asyncio.start_server(accept, "127.0.0.1", 0, limit=BUFFER_BYTES)
        self._port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._end.wait()
        server.close()
        for task in (*carriers, *pumps):
            task.cancel()
        await asyncio.gather(*carriers, *pumps, return_exceptions=True)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, queue: "asyncio.Queue[Any]") -> None:
    try:
        while data := await reader.read(CHUNK_BYTES):
            await queue.put((writer, data))
    except OSError:
        pass
    writer.close()


async def _carry(queue: "asyncio.Queue[tuple[asyncio.StreamWriter, bytes]]") -> None:
    while True:
        writer, data = await queue.get()
        await asyncio.sleep(len(data) / BYTES_PER_S)
        if not writer.is_closing():
            writer.write(data)


def obeying(fleet: Fleet, broker: Broker, release: Release, keys: Keys, work: Path) -> list[Row]:
    """How soon a node behind the thin link ends a fetch that is cancelled, and one that another release replaces."""
    with ThinLink(broker) as link:
        _, agent = agent_children(link.address, "bench", work / "thin-node", keys)
        with running(agent):
            other = _another(release, keys)
            fleet.offer(other)
            cancels = [_order_while_fetching(fleet, release, lambda: fleet.order(None)) for _ in range(ROUNDS)]
            supersedes = [_order_while_fetching(fleet, release, lambda: fleet.order(other)) for _ in range(ROUNDS)]
    what = "on a link of 1 Mbit/s that is full of frames"
    return [
        row(f"{how} {what}", "s", Samples(tuple(times)), at_most(OBEY_LIMIT_S))
        for how, times in (("cancelled", cancels), ("superseded", supersedes))
    ]


def _order_while_fetching(fleet: Fleet, release: Release, order: Callable[[], float]) -> float:
    """Seconds from the order to the end of the fetch in the node's journal."""
    fleet.order(release)
    fleet.wait_for(State.FETCHING, release=release)
    time.sleep(FETCHING_FOR_S)
    ordered_s = order()
    return fleet.wait_for(State.CANCELLED, release=release)[State.CANCELLED] - ordered_s


def _another(release: Release, keys: Keys) -> Release:
    """The same artifact under the next sequence number."""
    payload = base64.b64decode(json.loads(release.envelope)["payload"])
    document = parse_document(ReleaseDocument, payload).model_copy(update={"sequence": 2})
    envelope = keys.release.sign(Role.RELEASE, encode_document(document))
    return Release(digest_of(envelope), envelope, release.artifact, release.document, release.manifest, release.pack)
