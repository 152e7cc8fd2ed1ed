"""The public socket: OpenAI's routes, health, and Prometheus metrics.

A request is bound to the version that it was submitted to and ends on it, whatever is swapped meanwhile.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import structlog
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from runtime.engine import Finished, FinishReason, Generation
from runtime.metrics import render_metrics
from runtime.registry import Registry, Served
from runtime.schemas import AnswerShape, ChatBody, CompletionBody, GenerationBody, parse_body, usage_of
from runtime.settings import RuntimeSettings
from runtime.text import TextStream
from wire.errors import Code, InferenceError

log = structlog.get_logger()

_END = b"data: [DONE]\n\n"
SUBMIT_ATTEMPTS = 8
"""A version may leave between `get` and `submit`; then the next one is asked."""


def public_app(registry: Registry, settings: RuntimeSettings) -> Starlette:
    """The application behind the public socket."""
    api = _Api(registry, settings)
    return Starlette(
        routes=[
            Route("/v1/chat/completions", api.chat, methods=["POST"]),
            Route("/v1/completions", api.complete, methods=["POST"]),
            Route("/v1/models", api.models),
            Route("/v1/models/{model}", api.one_model),
            Route("/health", api.health),
            Route("/v2", api.server_metadata),
            Route("/v2/health/live", api.live),
            Route("/v2/health/ready", api.health),
            Route("/v2/models/{model}", api.model_metadata),
            Route("/v2/models/{model}/ready", api.model_ready),
            Route("/metrics", api.metrics),
        ],
        exception_handlers={InferenceError: answer_error},
    )


async def answer_error(_request: Request, error: Exception) -> Response:
    """An OpenAI-shaped error with our stable code."""
    assert isinstance(error, InferenceError)  # noqa: S101  starlette routes by this very type
    headers = {} if error.retry_after_s is None else {"Retry-After": f"{error.retry_after_s:.0f}"}
    kind = "invalid_request_error" if error.http_status < 500 else "server_error"
    body = {"error": {"message": error.message, "type": kind, "param": None, "code": str(error.code)}}
    return JSONResponse(body, error.http_status, headers)


async def read_body(request: Request, limit_bytes: int, timeout_s: float) -> bytes:
    """The body, bounded in size and time. Raises InferenceError(bad_request) with 413 or 408."""
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(timeout_s):
            async for part in request.stream():
                size += len(part)
                if size > limit_bytes:
                    raise InferenceError(Code.BAD_REQUEST, f"the body is over {limit_bytes} bytes; send less", 413)
                parts.append(part)
    except TimeoutError as error:
        raise InferenceError(Code.BAD_REQUEST, f"the body did not arrive within {timeout_s:g} s", 408) from error
    except ClientDisconnect as error:
        raise InferenceError(Code.BAD_REQUEST, "the client left while sending", 400) from error
    return b"".join(parts)


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages with role and text, for the chat template."""

    messages: tuple[dict[str, Any], ...]


Prompt = str | list[int] | Conversation
"""A text, token ids, or the messages of a conversation."""


@dataclass(slots=True)
class _Running:
    """A submitted request with the queue that its tokens arrive in."""

    served: Served
    generation: Generation
    tokens: "asyncio.Queue[int | Finished]"
    stream: TextStream

    async def pieces(self) -> AsyncIterator[str | FinishReason]:
        """Pieces of text, then the reason of the end. Cancels the generation when the consumer leaves early."""
        try:
            while True:
                item = await self.tokens.get()
                if isinstance(item, Finished):
                    if item.reason is FinishReason.FAILED:
                        raise InferenceError(Code.INTERNAL, f"the model failed: {item.detail}", 500)
                    if rest := self.stream.finish():
                        yield rest
                    yield item.reason
                    return
                if text := self.stream.push(item):
                    yield text
                if self.stream.stopped:
                    yield FinishReason.STOP
                    return
        finally:
            self.generation.cancelled = True

    def usage(self) -> dict[str, Any]:
        """Tokens so far."""
        return usage_of(len(self.generation.prompt), self.generation.produced)


class _Api:
    def __init__(self, registry: Registry, settings: RuntimeSettings) -> None:
        self._registry = registry
        self._settings = settings

    async def chat(self, request: Request) -> Response:
        body = parse_body(ChatBody, await self._read(request))
        assert isinstance(body, ChatBody)  # noqa: S101  parse_body returns the kind it is given
        messages = tuple({"role": message.role, "content": message.text()} for message in body.messages)
        return await self._answer(request, body, Conversation(messages))

    async def complete(self, request: Request) -> Response:
        body = parse_body(CompletionBody, await self._read(request))
        assert isinstance(body, CompletionBody)  # noqa: S101  parse_body returns the kind it is given
        return await self._answer(request, body, body.prompt)

    async def models(self, _request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [_model_row(served) for served in self._registry.served()]})

    async def one_model(self, request: Request) -> Response:
        return JSONResponse(_model_row(self._registry.get(request.path_params["model"])))

    async def live(self, _request: Request) -> Response:
        return JSONResponse({"live": True})

    async def health(self, _request: Request) -> Response:
        """200 when everything that serving.json names serves."""
        faults = self._registry.faults()
        ready = bool(self._registry.served()) and not faults
        return JSONResponse({"ready": ready, "status": "ok" if ready else "not ready", "faults": faults},
                            200 if ready else 503)  # fmt: skip

    async def server_metadata(self, _request: Request) -> Response:
        return JSONResponse({"name": "amperage", "version": "2", "extensions": ["model_repository", "statistics"]})

    async def model_metadata(self, request: Request) -> Response:
        served = self._registry.get(request.path_params["model"])
        order = served.order
        return JSONResponse({"name": order.model, "versions": [order.version], "platform": "onnxruntime_onnx",
                             "inputs": [], "outputs": []})  # fmt: skip

    async def model_ready(self, request: Request) -> Response:
        self._registry.get(request.path_params["model"])
        return JSONResponse({"ready": True})

    async def metrics(self, _request: Request) -> Response:
        text = render_metrics([served.snapshot() for served in self._registry.served()])
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _read(self, request: Request) -> bytes:
        return await read_body(request, self._settings.request_limit_bytes, self._settings.body_timeout_s)

    async def _answer(self, request: Request, body: GenerationBody, prompt: Prompt) -> Response:
        running = self._submit(body, prompt)
        shape = AnswerShape(chat=isinstance(body, ChatBody), model=body.model, fingerprint=running.served.fingerprint)
        if body.stream:
            events = _events(running, shape, usage=body.include_usage())
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        return await self._whole(request, running, shape)

    def _submit(self, body: GenerationBody, prompt: Prompt) -> _Running:
        """Hand the request to the version that serves now; it may leave at any moment, then the next is asked."""
        loop = asyncio.get_running_loop()
        for attempt in range(SUBMIT_ATTEMPTS):
            served = self._registry.get(body.model)
            tokens: asyncio.Queue[int | Finished] = asyncio.Queue()

            def sink(item: int | Finished, queue: "asyncio.Queue[int | Finished]" = tokens) -> None:
                if not loop.is_closed():
                    loop.call_soon_threadsafe(queue.put_nowait, item)

            ids = _prompt_ids(served, prompt)
            parameters = body.sampling(served.decoder.vocab_size)
            generation = Generation(ids, body.token_limit(), parameters, sink)
            try:
                served.engine.submit(generation)
            except InferenceError as error:
                if error.code is not Code.NOT_READY or attempt == SUBMIT_ATTEMPTS - 1:
                    raise
                continue
            return _Running(served, generation, tokens, TextStream(served.text, body.stops()))
        raise InferenceError(Code.NOT_READY, "the model is being replaced; ask again", 503, 1.0)

    async def _whole(self, request: Request, running: _Running, shape: AnswerShape) -> Response:
        texts: list[str] = []
        reason = FinishReason.STOP
        watcher = asyncio.create_task(_cancel_when_gone(request, running.generation))
        try:
            async for piece in running.pieces():
                if isinstance(piece, FinishReason):
                    reason = piece
                else:
                    texts.append(piece)
        finally:
            watcher.cancel()
        return JSONResponse(shape.whole("".join(texts), reason, running.usage()))


async def _cancel_when_gone(request: Request, generation: Generation) -> None:
    """A client that hangs up frees its slot at the next step."""
    while (await request.receive())["type"] != "http.disconnect":
        continue
    generation.cancelled = True


async def _events(running: _Running, shape: AnswerShape, *, usage: bool) -> AsyncIterator[bytes]:
    """Server-sent events of one answer: role first, finish_reason last, usage when asked for, [DONE]."""
    if shape.chat:
        yield _event(shape.chunk(None, first=True))
    try:
        async for piece in running.pieces():
            if isinstance(piece, FinishReason):
                yield _event(shape.chunk(None, reason=piece))
            else:
                yield _event(shape.chunk(piece))
    except InferenceError as error:
        yield _event({"error": {"message": error.message, "type": "server_error", "code": str(error.code)}})
        return
    if usage:
        yield _event(shape.usage_chunk(running.usage()))
    yield _END


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def _prompt_ids(served: Served, prompt: Prompt) -> list[int]:
    """Token ids of a text, a conversation, or ids as given (checked against the vocabulary)."""
    if isinstance(prompt, str):
        return served.text.encode(prompt)
    if isinstance(prompt, Conversation):
        return served.text.encode(served.text.chat_prompt(list(prompt.messages)))
    if any(not 0 <= token < served.decoder.vocab_size for token in prompt):
        raise InferenceError(Code.BAD_REQUEST, "the prompt holds a token id outside the vocabulary", 400)
    return prompt


def _model_row(served: Served) -> dict[str, Any]:
    return {
        "id": served.order.model, "object": "model", "created": int(served.loaded_s), "owned_by": "amperage",
        "version": served.order.version, "system_fingerprint": served.fingerprint,
        "context_tokens": served.context_tokens,
    }  # fmt: skip
