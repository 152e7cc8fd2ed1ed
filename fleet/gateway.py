"""`amperage depot`: a depot by itself, with an upstream a gateway, until SIGTERM.

Invariant: the process ends with status 1 when one of its parts dies, so that whoever supervises it starts it anew; on
SIGTERM and SIGINT every part is stopped in reverse order and the status is 0.
"""

import contextlib
import signal
import threading

import structlog

from fleet.depot import Depot
from fleet.library import Library
from fleet.relay import Relay
from fleet.service import private_broker
from fleet.settings import DepotSettings
from fleet.upstream import Upstream
from host.files import lock_directory, make_directory
from host.notify import notify_ready, notify_stopping
from wire.errors import AmperageError, Code
from wire.topics import Topics

log = structlog.get_logger()


def serve_depot(settings: DepotSettings) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises ConfigError when the broker's settings cannot be used, StoreError when another process has the directory,
    AmperageError when a part died.
    """
    end, died = threading.Event(), threading.Event()

    def on_death() -> None:
        died.set()
        end.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _signal, _frame: end.set())
    with contextlib.ExitStack() as stack:
        make_directory(settings.directory)
        lock = lock_directory(settings.directory)
        site = settings.broker or stack.enter_context(private_broker(settings.directory, settings.private_port))
        topics, library = Topics(settings.root), Library(settings.directory)
        parts: list[Upstream | Relay | Depot] = []
        source: Upstream | None = None
        if (upstream := settings.upstream) is not None:
            source = Upstream(upstream, topics, library, on_death)
            parts += [source, Relay(upstream, site, topics, library, on_death)]
        for part in (*parts, Depot(site, topics, library, on_death, source)):
            part.start()
            stack.callback(part.stop)
        log.info("depot_started", upstream=upstream.broker.host if upstream else None, lock=lock)
        notify_ready()
        end.wait()
        notify_stopping()
    if died.is_set():
        raise AmperageError(Code.INTERNAL, "a part of the depot died; its log says why")
