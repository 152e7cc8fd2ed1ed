"""The runtime as the agent sees it: a port, and its client over the admin socket.

Invariants: every answer is read up to a bound and parsed strictly, every failure is an error of wire/errors.py: not
reachable is TransferError(runtime_unreachable), to be tried again; an answer that says no is DeployError.
"""

import http.client
import json
from pathlib import Path
from typing import Protocol, TypeVar

from pydantic import BaseModel

from host.unix_http import UnixConnection
from wire.documents import encode_document, parse_document
from wire.errors import AmperageError, ArtifactError, Code, DeployError, TransferError
from wire.serving import ProbeReport, ProbeRequest, RuntimeStats

ANSWER_LIMIT_BYTES = 1 << 20
QUICK_TIMEOUT_S = 5.0
LOAD_TIMEOUT_S = 240.0
PROBE_MARGIN_S = 15.0
"""What the runtime may need beyond the probe's own time-out to end the child and answer."""

Answer = TypeVar("Answer", bound=BaseModel)


class Runtime(Protocol):
    """What the engine asks of the runtime; every call blocks and runs on a work thread."""

    def probe(self, model: str, request: ProbeRequest) -> ProbeReport:
        """Judge a candidate in a child of the runtime."""
        ...

    def load(self, model: str) -> None:
        """Make the runtime serve what serving.json names; returns once new requests go to it."""
        ...

    def unload(self, model: str) -> None:
        """Make the runtime forget a model that serving.json no longer names."""
        ...

    def stats(self) -> RuntimeStats:
        """Counters since the load."""
        ...


class RuntimeClient:
    """The runtime behind its admin socket."""

    def __init__(self, admin_socket: Path) -> None:
        self._socket = admin_socket

    def probe(self, model: str, request: ProbeRequest) -> ProbeReport:
        """See Runtime.probe."""
        path = f"/v2/repository/models/{model}/probe"
        data = self._call("POST", path, encode_document(request), request.timeout_s + PROBE_MARGIN_S)
        return _parse(ProbeReport, data)

    def load(self, model: str) -> None:
        """See Runtime.load."""
        self._call("POST", f"/v2/repository/models/{model}/load", b"{}", LOAD_TIMEOUT_S)

    def unload(self, model: str) -> None:
        """See Runtime.unload."""
        self._call("POST", f"/v2/repository/models/{model}/unload", b"{}", LOAD_TIMEOUT_S)

    def stats(self) -> RuntimeStats:
        """See Runtime.stats."""
        return _parse(RuntimeStats, self._call("GET", "/v2/models/stats", None, QUICK_TIMEOUT_S))

    def _call(self, method: str, path: str, body: bytes | None, timeout_s: float) -> bytes:
        connection = UnixConnection(self._socket, timeout_s)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"} if body else {})
            response = connection.getresponse()
            data = response.read(ANSWER_LIMIT_BYTES + 1)
        except (OSError, http.client.HTTPException) as error:
            raise TransferError(
                Code.RUNTIME_UNREACHABLE,
                f"runtime at {self._socket}: {error or type(error).__name__}; is amperage-runtime running?",
            ) from error
        finally:
            connection.close()
        if len(data) > ANSWER_LIMIT_BYTES:
            raise DeployError(Code.INTERNAL, f"runtime's answer to {path} is over {ANSWER_LIMIT_BYTES} bytes")
        if response.status != http.HTTPStatus.OK:
            raise _refusal(response.status, path, data)
        return data


def _parse(model: type[Answer], data: bytes) -> Answer:
    try:
        return parse_document(model, data, limit_bytes=ANSWER_LIMIT_BYTES)
    except ArtifactError as error:
        raise DeployError(Code.INTERNAL, f"runtime answered something else than {model.__name__}: {error}") from error


def _refusal(status: int, path: str, data: bytes) -> AmperageError:
    """503 means not now (starting, or busy with another probe); everything else is a verdict."""
    try:
        body = json.loads(data)
        message, code = str(body["error"]), Code(body["code"])
    except (ValueError, KeyError, TypeError):
        message, code = f"HTTP status {status} for {path}", Code.LOAD_FAILED
    busy = status == http.HTTPStatus.SERVICE_UNAVAILABLE
    return TransferError(code, message[:1000]) if busy else DeployError(code, message[:1000])
