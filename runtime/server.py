"""One uvicorn server on two Unix sockets, told apart by the address that the connection came in on.

Sockets come from systemd (FileDescriptorName `public` and `admin`) or are bound here, with their mode set before
anybody can connect. A stale socket file is removed only when it is a socket.
"""

import asyncio
import contextlib
import os
import socket
import stat
import threading
from pathlib import Path
from typing import Any

import structlog
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from host.notify import listen_fds, notify_ready, notify_stopping
from runtime.admin import admin_app
from runtime.api import public_app
from runtime.registry import Registry
from runtime.settings import RuntimeSettings
from wire.errors import ConfigError

log = structlog.get_logger()

PUBLIC_MODE = 0o660
ADMIN_MODE = 0o600
BACKLOG = 256
KEEP_ALIVE_S = 75
SHUTDOWN_S = 30


def serve(settings: RuntimeSettings) -> int:
    """Serve until SIGTERM; returns the exit status."""
    sockets = open_sockets(settings)
    registry = Registry(settings)
    loader = threading.Thread(target=registry.load_all, name="loader", daemon=True)
    apps: dict[Any, ASGIApp] = {
        sockets[0].getsockname(): public_app(registry, settings),
        sockets[1].getsockname(): admin_app(registry, settings),
    }
    config = uvicorn.Config(
        _Switch(apps), log_config=None, access_log=False, lifespan="off", timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=SHUTDOWN_S, server_header=False, ws="none", http="h11", loop="asyncio",
    )  # fmt: skip
    server = uvicorn.Server(config)
    loader.start()
    try:
        asyncio.run(_run(server, sockets))
    finally:
        notify_stopping()
        registry.close()
        for opened in sockets:
            opened.close()
    return 0


def open_sockets(settings: RuntimeSettings) -> list[socket.socket]:
    """[public, admin], inherited or bound. Raises ConfigError when a path cannot be bound."""
    inherited = listen_fds()
    if {"public", "admin"} <= inherited.keys():
        return [inherited["public"], inherited["admin"]]
    return [bind_socket(settings.public_socket, PUBLIC_MODE), bind_socket(settings.admin_socket, ADMIN_MODE)]


def bind_socket(path: Path, mode: int) -> socket.socket:
    """A listening Unix socket with exactly `mode`."""
    try:
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISSOCK(path.lstat().st_mode):
                raise ConfigError(f"{path} exists and is no socket; move it away or choose another path")
            path.unlink()
        bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        before = os.umask(0o777 & ~mode)  # the mode must hold from the first moment, not after a chmod
        try:
            bound.bind(str(path))
        finally:
            os.umask(before)
        bound.listen(BACKLOG)
    except OSError as error:
        raise ConfigError(f"cannot bind {path}: {error}; a Unix socket's path may have 107 bytes") from error
    return bound


async def _run(server: uvicorn.Server, sockets: list[socket.socket]) -> None:
    serving = asyncio.create_task(server.serve(sockets=sockets))
    while not server.started and not serving.done():
        await asyncio.sleep(0.01)
    notify_ready()
    log.info("sockets_open", public=sockets[0].getsockname(), admin=sockets[1].getsockname())
    await serving


class _Switch:
    """ASGI: hands a connection to the application of the socket that it arrived on."""

    def __init__(self, apps: dict[Any, ASGIApp]) -> None:
        self._apps = apps

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        address = scope.get("server") or (None, None)
        await self._apps[address[0]](scope, receive, send)
