"""`amperage fleet serve`: wires broker, depot, controller and API, and serves until SIGTERM."""

import contextlib
import os
import socket
import stat
from pathlib import Path

import structlog
import uvicorn

from fleet.api import fleet_app
from fleet.broker import PrivateBroker
from fleet.controller import Controller
from fleet.database import Database
from fleet.depot import Depot
from fleet.library import Library
from fleet.settings import FleetSettings
from host.files import make_directory, read_bounded
from host.keys import load_signer
from host.link import Broker
from host.notify import notify_ready, notify_stopping
from wire.documents import DOCUMENT_LIMIT_BYTES, parse_document
from wire.errors import ConfigError
from wire.signing import TrustPolicy
from wire.topics import Topics

log = structlog.get_logger()

SOCKET_MODE = 0o660


def serve(settings: FleetSettings) -> None:
    """Serve until SIGTERM or SIGINT. Raises ConfigError when keys, trust or socket cannot be used."""
    make_directory(settings.directory)
    with contextlib.ExitStack() as stack:
        broker = settings.broker
        if broker is None:
            private = stack.enter_context(PrivateBroker(settings.directory / "broker"))
            broker = Broker(host=private.host, port=private.port)
            log.info("private_broker_started", host=private.host, port=private.port)
        topics = Topics(settings.root)
        library = Library(settings.directory)
        database = Database(settings.directory / "fleet.sqlite")
        stack.callback(database.close)
        depot = Depot(broker, topics, library)
        controller = Controller(
            broker, topics, database, library, load_signer(settings.desired_key), _read_trust(settings.trust),
            settings.rollout_deadline_s,
        )  # fmt: skip
        listener = bind_socket(settings.api_socket)
        stack.callback(listener.close)
        for part in (depot, controller):
            part.start()
            stack.callback(part.stop)
        stack.callback(notify_stopping)
        app = fleet_app(controller, database, library)
        config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", ws="none", server_header=False)
        notify_ready()
        uvicorn.Server(config).run(sockets=[listener])


def bind_socket(path: Path) -> socket.socket:
    """A listening Unix socket for the group; a stale one is removed. Raises ConfigError."""
    try:
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISSOCK(path.lstat().st_mode):
                raise ConfigError(f"{path} exists and is no socket; move it away or choose another path")
            path.unlink()
        bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        before = os.umask(0o777 & ~SOCKET_MODE)
        try:
            bound.bind(str(path))
        finally:
            os.umask(before)
        bound.listen(64)
    except OSError as error:
        raise ConfigError(f"cannot bind {path}: {error}; a Unix socket's path may have 107 bytes") from error
    return bound


def _read_trust(path: Path) -> TrustPolicy:
    try:
        return parse_document(TrustPolicy, read_bounded(path, DOCUMENT_LIMIT_BYTES))
    except OSError as error:
        raise ConfigError(f"trust policy {path} cannot be read ({error}); make it with `amperage keys init`") from error
