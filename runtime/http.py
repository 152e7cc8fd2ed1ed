"""What both sockets share of HTTP: bounded bodies, errors in the form that each protocol expects, disconnects.

Paths below /v2 follow the Open Inference Protocol (`{"error": text}`, here with `code`), all others OpenAI's
(`{"error": {"message", "type", "code"}}`).
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import structlog
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive

from wire.errors import AmperageError, Code, InferenceError, Retry

BODY_LIMIT_BYTES = 4 << 20
BODY_TIMEOUT_S = 30.0

_log = structlog.get_logger(__name__)


async def read_body(request: Request, limit_bytes: int = BODY_LIMIT_BYTES) -> bytes:
    """The whole body; raises InferenceError: 413 when it is longer than `limit_bytes`, 408 when it does not come."""
    pieces: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for piece in request.stream():
                size += len(piece)
                if size > limit_bytes:
                    raise InferenceError(Code.BAD_REQUEST, f"body is over {limit_bytes} bytes; send less", 413)
                pieces.append(piece)
    except TimeoutError as error:
        raise InferenceError(
            Code.BAD_REQUEST, f"body did not come within {BODY_TIMEOUT_S:g} s; send it again", 408
        ) from error
    return b"".join(pieces)


@asynccontextmanager
async def watch_client(receive: Receive, gone: Callable[[], object]) -> AsyncIterator[None]:
    """Call `gone` when the client disconnects while the block runs; the body must have been read."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        gone()

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()
        with suppress(asyncio.CancelledError):
            await watcher


def json_response(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A JSON answer."""
    return Response(encode_json(content), status, headers, "application/json")


def encode_json(content: Any) -> bytes:
    """Compact UTF-8 JSON."""
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()


def error_content(error: AmperageError, path: str) -> dict[str, Any]:
    """The error body that a client of `path` expects."""
    if path.startswith("/v2"):
        return {"error": error.message, "code": error.code.value}
    kind = "invalid_request_error" if 400 <= status_of(error) < 500 else "server_error"
    return {"error": {"message": error.message, "type": kind, "param": None, "code": error.code.value}}


def error_response(error: AmperageError, path: str) -> Response:
    """The whole answer to a request that failed."""
    retry_after_s = error.retry_after_s if isinstance(error, InferenceError) else None
    headers = {"Retry-After": str(max(1, round(retry_after_s)))} if retry_after_s is not None else None
    return json_response(error_content(error, path), status_of(error), headers)


def status_of(error: AmperageError) -> int:
    """HTTP status of an error; what is no InferenceError is a version that cannot be loaded."""
    if isinstance(error, InferenceError):
        return error.http_status
    return 503 if error.retry is Retry.LATER else 422


async def on_amperage_error(request: Request, error: Exception) -> Response:
    """Exception handler for the tree of wire/errors.py."""
    assert isinstance(error, AmperageError)  # noqa: S101  registered for this type
    return error_response(error, request.url.path)


async def on_http_exception(request: Request, error: Exception) -> Response:
    """Exception handler for what starlette refuses by itself: unknown paths and methods."""
    assert isinstance(error, HTTPException)  # noqa: S101  registered for this type
    fault = InferenceError(Code.BAD_REQUEST, f"{request.method} {request.url.path}: {error.detail}", error.status_code)
    return error_response(fault, request.url.path)


async def on_disconnect(_request: Request, _error: Exception) -> Response:
    """Exception handler for a client that left while sending; nobody reads the answer."""
    return Response(status_code=499)


async def on_defect(request: Request, error: Exception) -> Response:
    """Last resort: a defect fails one request; starlette raises it again, so that the log has the traceback."""
    _log.error("request failed by a defect", path=request.url.path, error=repr(error))
    fault = InferenceError(Code.INTERNAL, "the server failed on this request; its log has the reason", 500)
    return error_response(fault, request.url.path)


EXCEPTION_HANDLERS: dict[Any, Any] = {
    AmperageError: on_amperage_error,
    HTTPException: on_http_exception,
    ClientDisconnect: on_disconnect,
    Exception: on_defect,
}
