"""The admin socket: Triton's model repository extension (index, load, unload), probe and statistics.

Only the agent's user can open the socket (mode 0600); bodies are bounded all the same.
"""

import asyncio
import os
import time

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from runtime.api import answer_error, read_body
from runtime.probe import run_probe
from runtime.registry import Registry
from runtime.settings import RuntimeSettings
from wire.documents import encode_document, parse_document
from wire.errors import AmperageError, ArtifactError, DeployError, InferenceError
from wire.serving import ProbeRequest, RuntimeStats

BODY_LIMIT_BYTES = 64 * 1024


def admin_app(registry: Registry, settings: RuntimeSettings) -> Starlette:
    """The application behind the admin socket."""
    api = _Admin(registry, settings)
    stem = "/v2/repository/models/{model}"
    return Starlette(
        routes=[
            Route("/v2/health/live", api.live),
            Route("/v2/repository/index", api.index, methods=["POST"]),
            Route(f"{stem}/load", api.load, methods=["POST"]),
            Route(f"{stem}/unload", api.unload, methods=["POST"]),
            Route(f"{stem}/probe", api.probe, methods=["POST"]),
            Route("/v2/models/stats", api.stats),
        ],
        exception_handlers={
            InferenceError: answer_error, DeployError: _answer_refusal, ArtifactError: _answer_refusal,
        },
    )  # fmt: skip


async def _answer_refusal(_request: Request, error: Exception) -> Response:
    """Triton's error body with our stable code; 409 because the request was understood and the state forbids it."""
    assert isinstance(error, AmperageError)  # noqa: S101  starlette routes by this very type
    return JSONResponse({"error": error.message, "code": str(error.code)}, 409)


class _Admin:
    def __init__(self, registry: Registry, settings: RuntimeSettings) -> None:
        self._registry = registry
        self._settings = settings
        self._started_s = time.time()

    async def live(self, _request: Request) -> Response:
        return JSONResponse({"live": True})

    async def index(self, request: Request) -> Response:
        await read_body(request, BODY_LIMIT_BYTES, self._settings.body_timeout_s)
        rows = [
            {"name": served.order.model, "version": served.order.version, "state": "READY", "reason": "",
             "decoded": served.order.decoded}
            for served in self._registry.served()
        ]  # fmt: skip
        faults = self._registry.faults().items()
        rows += [{"name": name, "version": "", "state": "UNAVAILABLE", "reason": why} for name, why in faults]
        return JSONResponse(rows)

    async def load(self, request: Request) -> Response:
        await read_body(request, BODY_LIMIT_BYTES, self._settings.body_timeout_s)
        order = await asyncio.to_thread(self._registry.load, request.path_params["model"])
        return JSONResponse({"decoded": order.decoded, "version": order.version})

    async def unload(self, request: Request) -> Response:
        await read_body(request, BODY_LIMIT_BYTES, self._settings.body_timeout_s)
        await asyncio.to_thread(self._registry.unload, request.path_params["model"])
        return JSONResponse({})

    async def probe(self, request: Request) -> Response:
        body = await read_body(request, BODY_LIMIT_BYTES, self._settings.body_timeout_s)
        order = parse_document(ProbeRequest, body)
        report = await asyncio.to_thread(run_probe, self._settings, order)
        return Response(encode_document(report), media_type="application/json")

    async def stats(self, _request: Request) -> Response:
        rows = tuple(served.snapshot() for served in self._registry.served())
        stats = RuntimeStats(pid=os.getpid(), started_s=self._started_s, models=rows)
        return Response(encode_document(stats), media_type="application/json")
