"""REST on a Unix socket: what the operator's command and a dashboard talk to."""

from typing import Annotated, Any

from pydantic import Field
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from fleet.controller import Controller
from fleet.database import Database
from fleet.library import Library
from fleet.rollout import Rollout
from wire.digest import Digest
from wire.documents import DOCUMENT_LIMIT_BYTES, Command, parse_document
from wire.errors import AmperageError, ArtifactError, Code, ConfigError
from wire.manifest import Name

LIST_LIMIT = 100_000


class RolloutOrder(Command):
    """Body of `POST /api/rollouts`; `nodes` "all" means every node that is known now."""

    release: Digest
    nodes: tuple[Name, ...] | Annotated[str, Field(pattern="^all$")]
    max_failures: Annotated[int, Field(ge=0)] = 0
    deadline_s: Annotated[float | None, Field(gt=0)] = None


def fleet_app(controller: Controller, database: Database, library: Library) -> Starlette:
    """The application."""
    api = _Api(controller, database, library)
    return Starlette(
        routes=[
            Route("/api/health", api.health),
            Route("/api/documents/{digest}", api.put_document, methods=["PUT"]),
            Route("/api/packs/{digest}", api.put_pack, methods=["PUT"]),
            Route("/api/releases", api.releases),
            Route("/api/releases", api.add_release, methods=["POST"]),
            Route("/api/nodes", api.nodes),
            Route("/api/nodes/{node}", api.node),
            Route("/api/events", api.events),
            Route("/api/telemetry", api.telemetry),
            Route("/api/rollouts", api.rollouts),
            Route("/api/rollouts", api.start_rollout, methods=["POST"]),
            Route("/api/rollouts/{id:int}", api.rollout),
            Route("/api/rollouts/{id:int}/abort", api.abort, methods=["POST"]),
        ],
        exception_handlers={ConfigError: _answer_error, ArtifactError: _answer_error},
    )


async def _answer_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, AmperageError)  # noqa: S101  starlette routes by this very type
    status = 404 if isinstance(error, ConfigError) else 422
    return JSONResponse({"error": error.message, "code": str(error.code)}, status)


class _Api:
    def __init__(self, controller: Controller, database: Database, library: Library) -> None:
        self._controller = controller
        self._database = database
        self._library = library

    async def health(self, _request: Request) -> Response:
        return JSONResponse({"status": "ok", "reports_refused": self._controller.refused})

    async def put_document(self, request: Request) -> Response:
        digest = _digest(request)
        body = await _bounded_body(request)
        await run_in_threadpool(self._library.put_document, digest, body)
        return JSONResponse({"document": digest})

    async def put_pack(self, request: Request) -> Response:
        digest = _digest(request)
        await self._library.put_pack(digest, request.stream())
        return JSONResponse({"pack": digest})

    async def add_release(self, request: Request) -> Response:
        body = await _bounded_body(request)
        digest, release = await run_in_threadpool(self._controller.add_release, body)
        return JSONResponse({"release": digest, "model": release.model, "version": release.version})

    async def releases(self, _request: Request) -> Response:
        return JSONResponse(await run_in_threadpool(self._database.releases))

    async def nodes(self, _request: Request) -> Response:
        return JSONResponse(await run_in_threadpool(self._database.nodes))

    async def node(self, request: Request) -> Response:
        name = request.path_params["node"]
        rows = await run_in_threadpool(self._database.nodes)
        found = next((row for row in rows if row["node"] == name), None)
        if found is None:
            raise ConfigError(f"no node {name} was ever seen; is its agent running and pointed at this broker?")
        return JSONResponse(found)

    async def events(self, request: Request) -> Response:
        return await self._reports(request, "event")

    async def telemetry(self, request: Request) -> Response:
        return await self._reports(request, "telemetry")

    async def rollouts(self, _request: Request) -> Response:
        rows = await run_in_threadpool(self._database.rollouts)
        return JSONResponse([_rollout(identity, body) for identity, body in rows])

    async def rollout(self, request: Request) -> Response:
        return JSONResponse(await self._one_rollout(request.path_params["id"]))

    async def start_rollout(self, request: Request) -> Response:
        order = parse_document(RolloutOrder, await _bounded_body(request))
        known = [row["node"] for row in await run_in_threadpool(self._database.nodes)]
        nodes = known if isinstance(order.nodes, str) else list(dict.fromkeys(order.nodes))
        if not nodes:
            raise ConfigError("no node is known yet; start an agent or name nodes")
        identity = await run_in_threadpool(
            self._controller.start_rollout, order.release, nodes, order.max_failures, order.deadline_s
        )
        return JSONResponse(await self._one_rollout(identity))

    async def abort(self, request: Request) -> Response:
        identity = request.path_params["id"]
        await run_in_threadpool(self._controller.abort, identity, "aborted by the operator")
        return JSONResponse(await self._one_rollout(identity))

    async def _one_rollout(self, identity: int) -> dict[str, Any]:
        rows = dict(await run_in_threadpool(self._database.rollouts))
        if identity not in rows:
            raise ConfigError(f"there is no rollout {identity}; list them with `amperage fleet rollouts`")
        return _rollout(identity, rows[identity])

    async def _reports(self, request: Request, kind: str) -> Response:
        query = request.query_params
        try:
            limit, after_s = int(query.get("limit", "100")), float(query.get("after", "0"))
        except ValueError as error:
            raise ConfigError("limit and after are numbers") from error
        limit = max(1, min(limit, LIST_LIMIT))
        rows = await run_in_threadpool(self._database.reports, kind, query.get("node"), after_s, limit)
        return JSONResponse(rows)


def _rollout(identity: int, body: str) -> dict[str, Any]:
    return {"id": identity, **Rollout.model_validate_json(body).model_dump(mode="json")}


def _digest(request: Request) -> str:
    digest = str(request.path_params["digest"])
    if len(digest) != 64 or set(digest) - set("0123456789abcdef"):
        raise ArtifactError(Code.BAD_DOCUMENT, "the address must end in a SHA-256 in 64 hexadecimal digits")
    return digest


async def _bounded_body(request: Request) -> bytes:
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > 2 * DOCUMENT_LIMIT_BYTES:
            raise ArtifactError(Code.BAD_DOCUMENT, f"the body is over {2 * DOCUMENT_LIMIT_BYTES} bytes; send less")
        parts.append(part)
    return b"".join(parts)
