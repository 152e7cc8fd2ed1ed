"""`amperage fleet serve`: wires broker, depot, controller and API, and serves until SIGTERM.

Invariant: the process ends when one of its parts dies, with exit status 1, so that whoever supervises it starts it
anew; on SIGTERM and SIGINT every part is stopped in reverse order and the status is 0.
"""

import contextlib
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import structlog
import uvicorn
from starlette.applications import Starlette

from fleet.api import fleet_app
from fleet.broker import PrivateBroker
from fleet.controller import Controller, Policy
from fleet.database import Database
from fleet.depot import Depot
from fleet.library import Library
from fleet.releases import Stores
from fleet.settings import FleetSettings
from host.files import make_directory, read_bounded
from host.keys import Signer, load_signer
from host.link import Broker
from host.notify import listen_fds, notify_ready, notify_stopping
from host.sockets import PUBLIC_MODE, open_listener
from wire.documents import DOCUMENT_LIMIT_BYTES, parse_document
from wire.errors import AmperageError, ArtifactError, Code, ConfigError
from wire.signing import Role, TrustPolicy, open_envelope
from wire.topics import Topics

log = structlog.get_logger()

GRACE_S = 5
"""Seconds that open requests get at the end."""


def serve(settings: FleetSettings) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises ConfigError when keys, trust, broker or socket cannot be used, AmperageError when a part died.
    """
    policy = _policy(settings)
    died = threading.Event()
    with contextlib.ExitStack() as stack:
        make_directory(settings.directory)
        broker = settings.broker or stack.enter_context(private_broker(settings.directory, settings.private_port))
        stores = Stores(Database(settings.directory / "fleet.sqlite"), Library(settings.directory))
        stack.callback(stores.database.close)
        server = _Server(died)
        depot = Depot(broker, Topics(settings.root), stores.library, server.end)
        controller = Controller(broker, Topics(settings.root), stores, policy, server.end)
        listener = stack.enter_context(_listening(settings.api_socket))
        for part in (depot, controller):
            part.start()
            stack.callback(part.stop)
        server.run(fleet_app(controller, depot, stores.database, stores.library, broker), listener)
        notify_stopping()
    if died.is_set():
        raise AmperageError(Code.INTERNAL, "a part of the control plane died; its log says why")


class _Server:
    """uvicorn on one inherited socket; `end` may be called from any thread."""

    def __init__(self, died: threading.Event) -> None:
        self._died = died
        self._server: uvicorn.Server | None = None

    def end(self) -> None:
        """A part died."""
        self._died.set()
        if self._server is not None:
            self._server.should_exit = True

    def run(self, app: Starlette, listener: socket.socket) -> None:
        """Serve until a signal or `end`."""
        config = uvicorn.Config(
            app, log_config=None, access_log=False, lifespan="off", ws="none", server_header=False,
            timeout_graceful_shutdown=GRACE_S,
        )  # fmt: skip
        self._server = server = uvicorn.Server(config)

        def ask_to_end(_signal: int, _frame: object) -> None:
            server.should_exit = True

        # uvicorn puts its own handlers in place and, at its end, raises the signal again with these
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, ask_to_end)
        if self._died.is_set():
            return
        notify_ready()
        server.run(sockets=[listener])


@contextlib.contextmanager
def _listening(path: Path) -> Iterator[socket.socket]:
    """The API's socket, for owner and group; its file is removed at the end. Raises ConfigError."""
    make_directory(path.parent)
    listener = open_listener(path, PUBLIC_MODE, listen_fds().values())
    try:
        yield listener.socket
    finally:
        listener.socket.close()
        listener.remove()


@contextlib.contextmanager
def private_broker(directory: Path, port: int) -> Iterator[Broker]:
    """A Mosquitto of our own below `directory`, for trying out. Raises ConfigError."""
    with PrivateBroker(directory / "broker", port) as private:
        log.info("private_broker_started", host=private.host, port=private.port)
        yield Broker(host=private.host, port=private.port)


def _policy(settings: FleetSettings) -> Policy:
    """Keys and trust, tried on each other: nodes would refuse every order of a key that the policy does not name."""
    signer, trust = load_signer(settings.desired_key), _read_trust(settings.trust)
    _check_signer(signer, trust, settings)
    return Policy(signer, trust, settings.rollout_deadline_s, settings.keep_reports_s)


def _check_signer(signer: Signer, trust: TrustPolicy, settings: FleetSettings) -> None:
    try:
        open_envelope(signer.sign(Role.DESIRED, b"{}"), Role.DESIRED, trust)
    except ArtifactError as error:
        raise ConfigError(
            f"{settings.trust} does not trust {settings.desired_key} with desired states ({error.code}); "
            "use files of one `amperage keys init`"
        ) from error


def _read_trust(path: Path) -> TrustPolicy:
    try:
        return parse_document(TrustPolicy, read_bounded(path, DOCUMENT_LIMIT_BYTES))
    except (OSError, AmperageError) as error:
        raise ConfigError(f"trust policy {path} cannot be read ({error}); make it with `amperage keys init`") from error
