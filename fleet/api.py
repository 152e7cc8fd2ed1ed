"""REST on a Unix socket: what the operator's command and a dashboard talk to.

Invariant: a body is bounded before it is parsed and a pack is never held in memory; disk and database are touched in
worker threads only, so the loop that serves everybody never waits. Errors are `{"error": sentence, "code": code}`.
"""

from typing import Annotated, Any

from pydantic import Field
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from fleet.controller import Controller
from fleet.database import Database
from fleet.depot import Depot
from fleet.library import Library, PackUpload
from fleet.rollout import Rollout
from host.link import Broker
from wire.digest import Digest
from wire.documents import DOCUMENT_LIMIT_BYTES, Command, parse_document
from wire.errors import AmperageError, ArtifactError, Code, ConfigError, DeployError, StoreError, TransferError
from wire.manifest import Name

LIST_LIMIT = 5000
"""Reports per answer: at about 2 KB each well below what a client takes (host/unix_http.py)."""
ORDER_LIMIT_BYTES = 8 * 1024 * 1024
UPLOAD_PART_BYTES = 1024 * 1024


class RolloutOrder(Command):
    """Body of `POST /api/rollouts`; `nodes` "all" means every node that is known now."""

    release: Digest
    nodes: Annotated[tuple[Name, ...], Field(min_length=1, max_length=100_000)] | Annotated[str, Field(pattern="^all$")]
    max_failures: Annotated[int, Field(ge=0)] = 0
    deadline_s: Annotated[float | None, Field(gt=0, le=30 * 86_400)] = None


def fleet_app(controller: Controller, depot: Depot, database: Database, library: Library, broker: Broker) -> Starlette:
    """The application."""
    state, releases = _State(controller, depot, database, broker), _Releases(controller, database, library)
    rollouts = _Rollouts(controller, database)
    handlers = dict.fromkeys((ConfigError, ArtifactError, DeployError, StoreError, TransferError), _answer_error)
    return Starlette(
        routes=[
            Route("/api/health", state.health),
            Route("/api/nodes", state.nodes),
            Route("/api/nodes/{node}", state.node),
            Route("/api/events", state.events),
            Route("/api/telemetry", state.telemetry),
            Route("/api/documents/{digest}", releases.put_manifest, methods=["PUT"]),
            Route("/api/packs/{digest}", releases.put_pack, methods=["PUT"]),
            Route("/api/releases", releases.everything),
            Route("/api/releases", releases.add, methods=["POST"]),
            Route("/api/rollouts", rollouts.everything),
            Route("/api/rollouts", rollouts.start, methods=["POST"]),
            Route("/api/rollouts/{id:int}", rollouts.one),
            Route("/api/rollouts/{id:int}/abort", rollouts.abort, methods=["POST"]),
        ],
        exception_handlers={**handlers, ClientDisconnect: _forget_client},
    )


async def _answer_error(_request: Request, error: Exception) -> Response:
    if not isinstance(error, AmperageError):
        raise error
    return JSONResponse({"error": error.message, "code": str(error.code)}, _status_of(error))


async def _forget_client(_request: Request, _error: Exception) -> Response:
    return Response(status_code=400)  # nobody reads it: the client went away in the middle of its body


def _status_of(error: AmperageError) -> int:
    if error.code is Code.DOCUMENT_MISSING:
        return 404
    if isinstance(error, DeployError):
        return 409
    if isinstance(error, StoreError):
        return 507
    if isinstance(error, TransferError):
        return 503
    return 422 if isinstance(error, ArtifactError) else 400


class _State:
    def __init__(self, controller: Controller, depot: Depot, database: Database, broker: Broker) -> None:
        self._controller = controller
        self._depot = depot
        self._database = database
        self._broker = broker

    async def health(self, _request: Request) -> Response:
        return JSONResponse(
            {
                "status": "ok" if self._controller.is_up() else "no_broker",
                "broker": {"host": self._broker.host, "port": self._broker.port},
                "reports_refused": self._controller.ingest.refusals.count,
                "wants_refused": self._depot.refusals.count,
                "frames_published": self._depot.published,
            }
        )

    async def nodes(self, _request: Request) -> Response:
        return JSONResponse(await run_in_threadpool(self._database.nodes))

    async def node(self, request: Request) -> Response:
        name = request.path_params["node"]
        rows = await run_in_threadpool(self._database.nodes)
        found = next((row for row in rows if row["node"] == name), None)
        if found is None:
            raise ConfigError(
                f"node {name[:64]} was never seen; is its agent running and pointed at this broker?",
                Code.DOCUMENT_MISSING,
            )
        return JSONResponse(found)

    async def events(self, request: Request) -> Response:
        return await self._reports(request, "event")

    async def telemetry(self, request: Request) -> Response:
        return await self._reports(request, "telemetry")

    async def _reports(self, request: Request, kind: str) -> Response:
        query = request.query_params
        after = _number(query["after"]) if "after" in query else None
        limit = max(1, min(_number(query.get("limit", "100")), LIST_LIMIT))
        return JSONResponse(await run_in_threadpool(self._database.reports, kind, query.get("node"), after, limit))


class _Releases:
    def __init__(self, controller: Controller, database: Database, library: Library) -> None:
        self._controller = controller
        self._database = database
        self._library = library

    async def put_manifest(self, request: Request) -> Response:
        digest = _digest(request)
        body = await _bounded_body(request, DOCUMENT_LIMIT_BYTES)
        await run_in_threadpool(self._library.put_manifest, digest, body)
        return JSONResponse({"document": digest})

    async def put_pack(self, request: Request) -> Response:
        digest = _digest(request)
        try:
            await self._store_pack(digest, request)
        except AmperageError:
            async for _ in request.stream():
                pass  # a client that is still sending would only see a broken pipe, not why
            raise
        return JSONResponse({"pack": digest})

    async def _store_pack(self, digest: str, request: Request) -> None:
        upload = await run_in_threadpool(self._library.begin_upload, digest)
        try:
            await _receive(request, upload)
            await run_in_threadpool(upload.commit)
        finally:
            await run_in_threadpool(upload.discard)

    async def add(self, request: Request) -> Response:
        body = await _bounded_body(request, DOCUMENT_LIMIT_BYTES)
        digest, release = await run_in_threadpool(self._controller.add_release, body)
        return JSONResponse({"release": digest, "model": release.model, "version": release.version})

    async def everything(self, _request: Request) -> Response:
        return JSONResponse(await run_in_threadpool(self._database.releases))


class _Rollouts:
    def __init__(self, controller: Controller, database: Database) -> None:
        self._controller = controller
        self._database = database

    async def everything(self, _request: Request) -> Response:
        rows = await run_in_threadpool(self._database.rollouts)
        return JSONResponse([_rollout(identity, body) for identity, body in rows])

    async def one(self, request: Request) -> Response:
        return await self._answer(request.path_params["id"])

    async def start(self, request: Request) -> Response:
        body = await _bounded_body(request, ORDER_LIMIT_BYTES)
        order = parse_document(RolloutOrder, body, limit_bytes=ORDER_LIMIT_BYTES)
        nodes = await self._known() if isinstance(order.nodes, str) else list(dict.fromkeys(order.nodes))
        if not nodes:
            raise ConfigError("no node is known yet; start an agent or name nodes", Code.DOCUMENT_MISSING)
        identity = await run_in_threadpool(
            self._controller.start_rollout, order.release, nodes, order.max_failures, order.deadline_s
        )
        return await self._answer(identity)

    async def abort(self, request: Request) -> Response:
        identity = request.path_params["id"]
        await run_in_threadpool(self._controller.abort, identity, "aborted by the operator")
        return await self._answer(identity)

    async def _known(self) -> list[str]:
        return [row["node"] for row in await run_in_threadpool(self._database.nodes)]

    async def _answer(self, identity: int) -> Response:
        body = await run_in_threadpool(self._database.rollout, identity)
        if body is None:
            raise ConfigError(
                f"there is no rollout {identity}; list them with `amperage fleet rollouts`", Code.DOCUMENT_MISSING
            )
        return JSONResponse(_rollout(identity, body))


def _rollout(identity: int, body: str) -> dict[str, Any]:
    return {"id": identity, **Rollout.model_validate_json(body).model_dump(mode="json")}


def _digest(request: Request) -> str:
    digest = str(request.path_params["digest"])
    if len(digest) != 64 or set(digest) - set("0123456789abcdef"):
        raise ArtifactError(Code.BAD_DOCUMENT, "the address must end in a SHA-256 in 64 lower-case hexadecimal digits")
    return digest


def _number(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 15:
        raise ConfigError("limit and after are whole numbers", Code.BAD_REQUEST)
    return int(text)


async def _receive(request: Request, upload: PackUpload) -> None:
    """Stream the body into `upload`, a mebibyte per hop to a worker thread."""
    part = bytearray()
    async for chunk in request.stream():
        part += chunk
        if len(part) >= UPLOAD_PART_BYTES:
            await run_in_threadpool(upload.feed, bytes(part))
            part.clear()
    await run_in_threadpool(upload.feed, bytes(part))


async def _bounded_body(request: Request, limit_bytes: int) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit_bytes:
            raise ArtifactError(Code.BAD_DOCUMENT, f"the body is over {limit_bytes} bytes; send less")
    return bytes(body)
