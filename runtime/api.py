"""The public socket: OpenAI's API, health, metrics, Open Inference Protocol v2.

A request keeps the version that it began on until it ends, and `system_fingerprint` names it. Streams are server-sent
events: the role comes first, `finish_reason` last, then the usage when it was asked for, then [DONE].
"""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from runtime.answer import Answer, Wanted
from runtime.bodies import ChatRequest, CompletionRequest, parse_body
from runtime.embedding import embeddings
from runtime.http import EXCEPTION_HANDLERS, encode_json, error_content, json_response, read_body, watch_client
from runtime.infer import infer, tensors_of
from runtime.loaded import Loaded, LoadedText
from runtime.logprobs import chat_logprobs, completion_logprobs
from runtime.metrics import render_metrics
from runtime.registry import Registry
from runtime.settings import RuntimeSettings
from runtime.transcript import Placed
from wire.errors import InferenceError
from wire.manifest import GraphConfig, GraphTensor

UNREAD_GRACE_S = 2.0
"""Beyond the time of a request, for a client that is slow to read its end."""
STARTED_S = int(time.time())
_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]


@dataclass(frozen=True, slots=True)
class Form:
    """How one of the two completion APIs writes its answers."""

    kind: str
    chunk_kind: str
    prefix: str
    chat: bool

    def choice(
        self, text: str, reason: str | None, logprobs: dict[str, Any] | None, *, chunk: bool, first: bool = False
    ) -> dict[str, Any]:
        """The one entry of `choices`; in a chunk `text` is a piece."""
        if not self.chat:
            body: dict[str, Any] = {"text": text}
        elif chunk:
            role = {"role": "assistant"} if first else {}
            body = {"delta": role | ({"content": text} if text or first else {})}
        else:
            body = {"message": {"role": "assistant", "content": text, "refusal": None}}
        return {"index": 0, **body, "logprobs": logprobs, "finish_reason": reason}

    def logprobs(self, answer: Answer, scores: Sequence[Placed]) -> dict[str, Any] | None:
        """`logprobs` of the choice, None when they were not asked for."""
        if answer.wanted.top_logprobs is None:
            return None
        return (chat_logprobs if self.chat else completion_logprobs)(answer.version.text.vocabulary, scores)


CHAT = Form("chat.completion", "chat.completion.chunk", "chatcmpl", chat=True)
TEXT = Form("text_completion", "text_completion", "cmpl", chat=False)


def make_api(registry: Registry, settings: RuntimeSettings) -> Starlette:
    """The application behind the public socket."""
    app = Starlette(
        routes=[
            Route("/v1/chat/completions", chat_completions, methods=["POST"]),
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/v1/embeddings", embeddings, methods=["POST"]),
            Route("/v1/models", models),
            Route("/v1/models/{model}", one_model),
            Route("/health", health),
            Route("/metrics", metrics),
            Route("/v2", server_metadata),
            Route("/v2/health/live", live),
            Route("/v2/health/ready", ready),
            Route("/v2/models/{model}", model_metadata),
            Route("/v2/models/{model}/ready", model_ready),
            Route("/v2/models/{model}/infer", infer, methods=["POST"]),
        ],
        exception_handlers=EXCEPTION_HANDLERS,
    )
    app.state.registry, app.state.settings = registry, settings
    return app


async def chat_completions(request: Request) -> Response:
    """POST /v1/chat/completions."""
    body = parse_body(ChatRequest, await read_body(request))
    return await _complete(request, CHAT, body, _wanted(body, [message.plain() for message in body.messages]))


async def completions(request: Request) -> Response:
    """POST /v1/completions."""
    body = parse_body(CompletionRequest, await read_body(request))
    prompt = body.prompt[0] if isinstance(body.prompt, tuple) and isinstance(body.prompt[0], str) else body.prompt
    return await _complete(request, TEXT, body, _wanted(body, prompt))


def _wanted(body: ChatRequest | CompletionRequest, prompt: Any) -> Wanted:
    return Wanted(
        body.model, prompt, body.sampling(), body.stops(), streamed=bool(body.stream), max_tokens=body.wanted_tokens(),
        default_tokens=body.default_tokens, ignore_eos=body.ignore_eos, deterministic=body.deterministic,
        top_logprobs=body.wanted_logprobs(),
    )  # fmt: skip


async def _complete(request: Request, form: Form, body: ChatRequest | CompletionRequest, wanted: Wanted) -> Response:
    settings: RuntimeSettings = request.app.state.settings
    answer = Answer(request.app.state.registry, wanted, settings.request_timeout_s)
    if body.stream:
        usage = body.stream_options is not None and body.stream_options.include_usage
        return EventStream(answer, form, include_usage=usage, limit_s=settings.request_timeout_s + UNREAD_GRACE_S)
    async with answer, watch_client(request.receive, answer.abandon):
        pieces = [piece async for piece in answer.pieces()]
    logprobs = form.logprobs(answer, [placed for piece in pieces for placed in piece.scores])
    choice = form.choice("".join(piece.text for piece in pieces), answer.finish_reason, logprobs, chunk=False)
    return json_response(_identity(form.kind, form.prefix, answer.version) | {"choices": [choice]} | _usage(answer))


class EventStream(Response):
    """A streamed answer. Its status is sent with the first piece, so that a request refused or failed before it has
    an honest status; a failure after it is an `error` event."""

    def __init__(self, answer: Answer, form: Form, *, include_usage: bool, limit_s: float) -> None:
        self.status_code, self.background = 200, None
        self._answer, self._form, self._include_usage, self._limit_s = answer, form, include_usage, limit_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events; raises InferenceError when nothing was sent yet.

        A client that stays but does not read would hold its version for ever: it is left when the time is over.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(self._limit_s):
                await self._send(scope, receive, send)

    async def _send(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False
        async with self._answer, watch_client(receive, self._answer.abandon), aclosing(self._events()) as events:
            try:
                async for event in events:
                    if not started:
                        started = True
                        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
                    await send({"type": "http.response.body", "body": event, "more_body": True})
            except InferenceError as error:
                if not started:
                    raise
                failed = b"data: " + encode_json(error_content(error, scope["path"])) + b"\n\n"
                await send({"type": "http.response.body", "body": failed, "more_body": True})
        if started:
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _events(self) -> AsyncGenerator[bytes, None]:
        form, answer = self._form, self._answer
        shared: dict[str, Any] = _identity(form.chunk_kind, form.prefix, answer.version)
        if self._include_usage:
            shared["usage"] = None
        first = True
        async with aclosing(answer.pieces()) as pieces:
            async for piece in pieces:
                logprobs = form.logprobs(answer, piece.scores)
                yield _event(shared | {"choices": [form.choice(piece.text, None, logprobs, chunk=True, first=first)]})
                first = False
        if answer.finish_reason == "cancelled":
            return
        yield _event(shared | {"choices": [form.choice("", answer.finish_reason, None, chunk=True, first=first)]})
        if self._include_usage:
            yield _event(shared | {"choices": []} | _usage(answer))
        yield b"data: [DONE]\n\n"


async def models(request: Request) -> Response:
    """GET /v1/models."""
    registry: Registry = request.app.state.registry
    rows = [_model_row(place.current) for place in registry.places().values() if place.current is not None]
    return json_response({"object": "list", "data": rows})


async def one_model(request: Request) -> Response:
    """GET /v1/models/{model}."""
    return json_response(_model_row(_serving(request)))


async def health(request: Request) -> Response:
    """GET /health: what serves, what does not and why; 503 unless everything serves."""
    registry: Registry = request.app.state.registry
    rows = [
        {
            "model": name, "version": place.current.entry.version if place.current else None,
            "loading": place.loading, "error": str(place.error) if place.error else None,
        }
        for name, place in registry.places().items()
    ]  # fmt: skip
    status = "ok" if registry.ready() else "degraded" if registry.started else "loading"
    content = {"status": status, "models": rows, "error": str(registry.fault) if registry.fault else None}
    return json_response(content, 200 if registry.ready() else 503)


async def metrics(request: Request) -> Response:
    """GET /metrics, Prometheus text format 0.0.4."""
    text = render_metrics(request.app.state.registry)
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


async def live(_request: Request) -> Response:
    """GET /v2/health/live."""
    return json_response({"live": True})


async def ready(request: Request) -> Response:
    """GET /v2/health/ready."""
    is_ready = request.app.state.registry.ready()
    return json_response({"ready": is_ready}, 200 if is_ready else 503)


async def server_metadata(_request: Request) -> Response:
    """GET /v2."""
    extensions = ["model_repository", "statistics", "binary_tensor_data"]
    return json_response({"name": "amperage", "version": "2", "extensions": extensions})


async def model_metadata(request: Request) -> Response:
    """GET /v2/models/{model}."""
    version = _serving(request)
    entry, config = version.entry, version.document.config
    bounds: dict[str, Any] = {"max_tokens": version.capacity} if isinstance(version, LoadedText) else {}
    if isinstance(config, GraphConfig):
        bounds = {"largest": {tensor.name: _largest(config, tensor) for tensor in config.inputs}}
    return json_response(
        {"name": entry.model, "versions": [entry.version], "platform": f"onnxruntime_{config.kind}",
         **tensors_of(config), "parameters": {"decoded": entry.decoded, **bounds}}
    )  # fmt: skip


def _largest(config: GraphConfig, tensor: GraphTensor) -> list[int]:
    return [config.largest[size] if isinstance(size, str) else size for size in tensor.shape]


async def model_ready(request: Request) -> Response:
    """GET /v2/models/{model}/ready."""
    entry = _serving(request).entry
    return json_response({"name": entry.model, "ready": True})


def _serving(request: Request) -> Loaded:
    """The version that takes requests for the model of the path; raises InferenceError as a request for it would."""
    registry: Registry = request.app.state.registry
    version = registry.acquire(request.path_params["model"], Loaded)
    registry.release(version)
    return version


def _model_row(version: Loaded) -> dict[str, Any]:
    entry = version.entry
    return {
        "id": entry.model, "object": "model", "created": STARTED_S, "owned_by": "amperage",
        "kind": version.document.config.kind, "version": entry.version,
        "decoded": entry.decoded, "context_tokens": version.capacity if isinstance(version, LoadedText) else None,
    }  # fmt: skip


def _identity(kind: str, prefix: str, version: Loaded) -> dict[str, Any]:
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()),
        "model": version.entry.model, "system_fingerprint": version.fingerprint,
    }  # fmt: skip


def _usage(answer: Answer) -> dict[str, Any]:
    prompt, completion = answer.prompt_tokens, answer.completion_tokens
    return {
        "usage": {
            "prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": answer.cached_tokens},
        }
    }  # fmt: skip


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + encode_json(content) + b"\n\n"
