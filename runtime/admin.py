"""The admin socket: Triton's repository extension (index, load, unload), the probe, and the counters.

Only the agent may open it (mode 0600). Invariant: an answer other than 200 to a load means that what served before
still serves; a probe answers 200 whatever its verdict.
"""

import asyncio

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from runtime.api import live
from runtime.http import EXCEPTION_HANDLERS, json_response, read_body, watch_client
from runtime.probe import run_probe
from runtime.registry import Place, Registry
from runtime.settings import RuntimeSettings
from wire.documents import encode_document, parse_document
from wire.errors import ArtifactError, Code, InferenceError
from wire.serving import ProbeReport, ProbeRequest, RuntimeStats

ADMIN_BODY_LIMIT_BYTES = 64 * 1024


def make_admin(registry: Registry, settings: RuntimeSettings, pid: int, started_s: float) -> Starlette:
    """The application behind the admin socket; `started_s` is seconds since 1970."""
    app = Starlette(
        routes=[
            Route("/v2/health/live", live),
            Route("/v2/models/stats", stats),
            Route("/v2/repository/index", index, methods=["POST"]),
            Route("/v2/repository/models/{model}/load", load, methods=["POST"]),
            Route("/v2/repository/models/{model}/unload", unload, methods=["POST"]),
            Route("/v2/repository/models/{model}/probe", probe, methods=["POST"]),
        ],
        exception_handlers=EXCEPTION_HANDLERS,
    )
    app.state.registry, app.state.settings = registry, settings
    app.state.pid, app.state.started_s = pid, started_s
    app.state.one_probe = asyncio.Lock()
    return app


async def index(request: Request) -> Response:
    """POST /v2/repository/index: a row per model that was tried."""
    registry: Registry = request.app.state.registry
    rows = [_index_row(name, place) for name, place in sorted(registry.places().items())]
    return json_response(rows)


async def load(request: Request) -> Response:
    """POST /v2/repository/models/{model}/load."""
    await read_body(request, ADMIN_BODY_LIMIT_BYTES)
    version = await request.app.state.registry.load(request.path_params["model"])
    return json_response({"decoded": version.entry.decoded, "version": version.entry.version})


async def unload(request: Request) -> Response:
    """POST /v2/repository/models/{model}/unload."""
    await read_body(request, ADMIN_BODY_LIMIT_BYTES)
    await request.app.state.registry.unload(request.path_params["model"])
    return json_response({})


async def probe(request: Request) -> Response:
    """POST /v2/repository/models/{model}/probe; one at a time, ended when its client leaves."""
    try:
        order = parse_document(ProbeRequest, await read_body(request, ADMIN_BODY_LIMIT_BYTES))
    except ArtifactError as error:
        raise InferenceError(Code.BAD_REQUEST, error.message, 400) from error
    settings: RuntimeSettings = request.app.state.settings

    async def alone() -> ProbeReport:
        async with request.app.state.one_probe:
            try:
                return await run_probe(settings.store / "versions", order, settings)
            finally:
                await request.app.state.registry.sweep()

    task = asyncio.create_task(alone())
    async with watch_client(request.receive, task.cancel):
        try:
            report = await task
        except asyncio.CancelledError:
            return Response(status_code=499)
    return Response(encode_document(report), media_type="application/json")


async def stats(request: Request) -> Response:
    """GET /v2/models/stats."""
    state = request.app.state
    content = RuntimeStats(pid=state.pid, started_s=state.started_s, models=state.registry.stats())
    return Response(encode_document(content), media_type="application/json")


def _index_row(name: str, place: Place) -> dict[str, object]:
    version = place.current
    state = "READY" if version else "LOADING" if place.loading else "UNAVAILABLE"
    return {
        "name": name, "version": version.entry.version if version else "", "state": state,
        "reason": str(place.error) if place.error else "", "decoded": version.entry.decoded if version else "",
        "draining": len(place.draining), "packed": version is not None and version.packed,
        "stale": version.stale if version else "",
    }  # fmt: skip
