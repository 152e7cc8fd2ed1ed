"""The serving process: one uvicorn server on two sockets, the registry behind it, systemd around it.

The admin application answers on the admin socket and nowhere else; uvicorn names the listening socket in
`scope["server"]`. The process is ready once both sockets listen: models load after that, because a model that does not
load must not keep the others, or the admin socket, from answering.
"""

import asyncio
import gc
import os
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable

import structlog
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from host.notify import listen_fds, notify_ready, notify_stopping, notify_watchdog, watchdog_interval_s
from host.sockets import ADMIN_MODE, BACKLOG, PUBLIC_MODE, Listener, open_listener
from runtime.admin import make_admin
from runtime.api import make_api
from runtime.cores import core_groups, own_cores
from runtime.cpu import allowed_threads, detect_cpu
from runtime.memory import tighten_heap
from runtime.registry import Registry
from runtime.session import ONNXRUNTIME
from runtime.settings import RuntimeSettings

SWITCH_INTERVAL_S = 0.0005
"""How long a thread may keep the interpreter while another waits: an engine's step is short, the default is 5 ms."""
KEEP_ALIVE_S = 60

_log = structlog.get_logger(__name__)


class SocketSwitch:
    """Sends a request to the application of the socket that it came in by."""

    def __init__(self, public: ASGIApp, admin: ASGIApp, admin_path: str) -> None:
        self._public, self._admin, self._admin_path = public, admin, admin_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        server = scope.get("server")
        is_admin = server is not None and server[0] == self._admin_path
        await (self._admin if is_admin else self._public)(scope, receive, send)


class _Server(uvicorn.Server):
    """uvicorn, telling when it listens and when it begins to end."""

    def __init__(self, config: uvicorn.Config, on_start: Callable[[], Awaitable[None]]) -> None:
        super().__init__(config)
        self._on_start = on_start

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        await self._on_start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        notify_stopping()
        await super().shutdown(sockets)


def serve(settings: RuntimeSettings) -> None:
    """Serve until SIGTERM or SIGINT; open answers may end within `shutdown_grace_s`. Raises ConfigError."""
    core_groups(settings.core_groups, own_cores())  # what is wrong with them must show before anybody connects
    inherited = list(listen_fds().values())
    public = open_listener(settings.public_socket, PUBLIC_MODE, inherited)
    try:
        admin = open_listener(settings.admin_socket, ADMIN_MODE, inherited)
        try:
            tighten_heap()
            sys.setswitchinterval(SWITCH_INTERVAL_S)
            asyncio.run(_serve(settings, public, admin))
        finally:
            admin.remove()
    finally:
        public.remove()


async def _serve(settings: RuntimeSettings, public: Listener, admin: Listener) -> None:
    registry = Registry(settings)
    app = SocketSwitch(
        make_api(registry, settings), make_admin(registry, settings, os.getpid(), time.time()), str(admin.path)
    )
    config = uvicorn.Config(
        app, http="h11", ws="none", lifespan="off", log_config=None, access_log=False, server_header=False,
        date_header=False, backlog=BACKLOG, timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=max(1, round(settings.shutdown_grace_s)),
    )  # fmt: skip
    tasks: list[asyncio.Task[None]] = []

    async def started() -> None:
        cpu, threads = detect_cpu(), allowed_threads(settings.threads)
        _log.info("listening", public=str(public.path), cpu=str(cpu), threads=threads, onnxruntime=ONNXRUNTIME)
        notify_ready("serving")
        gc.freeze()  # what is alive now lives for ever: later collections are short pauses
        tasks.append(asyncio.create_task(registry.start()))
        interval_s = watchdog_interval_s()
        if interval_s is not None:
            tasks.append(asyncio.create_task(_feed_watchdog(interval_s)))

    server = _Server(config, started)
    _end_quietly(server)
    try:
        await server.serve([public.socket, admin.socket])
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await registry.close()
        _log.info("ended")


async def _feed_watchdog(interval_s: float) -> None:
    while True:
        notify_watchdog()
        await asyncio.sleep(interval_s)


def _end_quietly(server: uvicorn.Server) -> None:
    """uvicorn raises a caught signal once more when it is done; for us that end is a success, status 0."""

    def ask(_signal: int, _frame: object) -> None:
        server.should_exit = True

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, ask)
