"""A TCP proxy that makes bad weather between a client and a real broker: asyncio in a thread of its own.

Toxics are those of Toxiproxy (latency, jitter, bandwidth, slicer, time-out, reset) and two kinds of silence that a
radio link has: a hold, in which nothing passes and nothing is lost, and a half-open link, whose far end is gone without
a word. They can change at any time; a `Weather` holds for both directions of every link.
"""

import asyncio
import contextlib
import random
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

CHUNK_BYTES = 16 * 1024
QUEUE_CHUNKS = 64
SOCKET_BUFFER_BYTES = 64 * 1024
"""Small, so that a slow link is slow for the sender too and does not end in the kernel's memory."""
POLL_S = 0.005
RESET = struct.pack("ii", 1, 0)
"""SO_LINGER of no time: close sends RST."""


@dataclass(frozen=True)
class Weather:
    """What happens to bytes on their way; the default is a fine day."""

    latency_s: float = 0.0
    jitter_s: float = 0.0
    """Added to the latency, uniformly from 0 to this; the order of bytes is kept, as TCP does."""
    bandwidth_bytes_per_s: float = 0.0
    """0 is no limit."""
    slice_bytes: int = 0
    """Largest write; 0 passes on what was read."""
    reset_after_bytes: int = 0
    """Every link is reset after about as many bytes from the broker; 0 is never."""


class _Link:
    """One client and the broker, both ways."""

    def __init__(self, proxy: "Toxics") -> None:
        self.proxy = proxy
        self.writers: list[asyncio.StreamWriter] = []
        self.dead = False
        """Half-open: what the client says goes nowhere, and nobody answers."""
        self.from_broker = 0

    async def run(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.append(writer)
        if self.proxy.black_hole:
            self.dead = True
            await self._swallow(reader)
            return
        try:
            far_reader, far_writer = await asyncio.open_connection(*self.proxy.target, limit=SOCKET_BUFFER_BYTES)
        except OSError:
            self.reset()
            return
        self.writers.append(far_writer)
        for end in self.writers:
            _shrink(end)
        pumps = [
            asyncio.create_task(self._pump(reader, far_writer, upward=True)),
            asyncio.create_task(self._pump(far_reader, writer, upward=False)),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            while self.dead:  # the client has to find out by itself
                await asyncio.wait(pumps, timeout=0.05)
                if pumps[0].done():
                    break
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            self.close()

    def reset(self) -> None:
        for writer in self.writers:
            with contextlib.suppress(OSError):
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        self.close()

    def half_open(self) -> None:
        self.dead = True
        for writer in self.writers[1:]:
            writer.transport.abort()

    def close(self) -> None:
        for writer in self.writers:
            writer.transport.abort()

    async def _swallow(self, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(OSError):
            while await reader.read(CHUNK_BYTES):
                continue
        self.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, upward: bool) -> None:
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(QUEUE_CHUNKS)
        giving = asyncio.create_task(self._give(queue, writer, upward=upward))
        due_s = 0.0
        try:
            with contextlib.suppress(OSError):
                while data := await reader.read(CHUNK_BYTES):
                    if self.dead:
                        continue
                    weather = self.proxy.weather
                    now_s = time.monotonic()
                    due_s = max(due_s, now_s + weather.latency_s + self.proxy.draw.uniform(0, weather.jitter_s))
                    while queue.full() and not giving.done():
                        await asyncio.sleep(POLL_S)
                    if giving.done():
                        return
                    queue.put_nowait((due_s, data))
            while not queue.empty() and not giving.done():
                await asyncio.sleep(POLL_S)
        finally:
            giving.cancel()
            await asyncio.gather(giving, return_exceptions=True)

    async def _give(
        self, queue: "asyncio.Queue[tuple[float, bytes]]", writer: asyncio.StreamWriter, *, upward: bool
    ) -> None:
        with contextlib.suppress(OSError):
            while True:
                due_s, data = await queue.get()
                await asyncio.sleep(max(0.0, due_s - time.monotonic()))
                await self.proxy.passing.wait()
                step = self.proxy.weather.slice_bytes or len(data)
                for start in range(0, len(data), step):
                    await self._write(writer, data[start : start + step], upward=upward)

    async def _write(self, writer: asyncio.StreamWriter, part: bytes, *, upward: bool) -> None:
        weather = self.proxy.weather
        if self.dead:
            return
        writer.write(part)
        await writer.drain()
        self.proxy.count(len(part), upward=upward)
        if not upward:
            self.from_broker += len(part)
            if 0 < weather.reset_after_bytes <= self.from_broker:
                self.reset()
        if weather.bandwidth_bytes_per_s:
            await asyncio.sleep(len(part) / weather.bandwidth_bytes_per_s)


class Toxics:
    """The proxy: clients connect to `port` on the loopback address; a context manager."""

    def __init__(self, host: str, port: int, seed: int = 1) -> None:
        self.target = (host, port)
        self.host = "127.0.0.1"
        self.port = 0
        self.weather = Weather()
        self.black_hole = False
        """New links are accepted, and never answered."""
        self.draw = random.Random(seed)
        self.bytes_up = self.bytes_down = 0
        self.packets_up = self.packets_down = 0
        """Writes, of which the kernel makes a packet each when they are small and apart."""
        self.links_made = 0
        self._links: set[_Link] = set()
        self._loop = asyncio.new_event_loop()
        self.passing = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="toxics", daemon=True)
        self._ready = threading.Event()

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join()

    def hold(self) -> None:
        """Nothing passes from now on, and nothing is lost."""
        self._do(self.passing.clear)

    def release(self) -> None:
        """The end of a hold or of a black hole; links that the hole swallowed stay dead."""
        self.black_hole = False
        self._do(self.passing.set)

    def swallow(self) -> None:
        """A black hole: every link is dead without a word, new ones too, until `release`."""
        self.black_hole = True
        self.half_open()

    def half_open(self) -> None:
        """The far ends of all links are gone, the clients are not told; new links are good."""
        self._do(lambda: [link.half_open() for link in self._links])

    def reset(self) -> None:
        """RST to both ends of all links."""
        self._do(lambda: [link.reset() for link in list(self._links)])

    def count(self, size: int, *, upward: bool) -> None:
        """For the links: bytes that passed."""
        if upward:
            self.bytes_up += size
            self.packets_up += 1
        else:
            self.bytes_down += size
            self.packets_down += 1

    def _do(self, act: Callable[[], object]) -> None:
        done = threading.Event()
        self._loop.call_soon_threadsafe(lambda: (act(), done.set()))
        assert done.wait(10)

    def _run(self) -> None:
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self) -> None:
        self._end = asyncio.Event()
        self.passing.set()
        self._tasks: set[asyncio.Task[None]] = set()
        server = await asyncio.start_server(self._accept, self.host, 0, limit=SOCKET_BUFFER_BYTES)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._end.wait()
        server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self._tasks.add(task)
        link = _Link(self)
        self._links.add(link)
        self.links_made += 1
        try:
            await link.run(reader, writer)
        except asyncio.CancelledError:
            link.close()
        finally:
            self._links.discard(link)
            self._tasks.discard(task)


def _shrink(writer: asyncio.StreamWriter) -> None:
    end = writer.get_extra_info("socket")
    for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
        end.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER_BYTES)
    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    writer.transport.set_write_buffer_limits(high=SOCKET_BUFFER_BYTES)
