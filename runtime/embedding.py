"""Texts to embeddings on the event loop's side, and `POST /v1/embeddings`.

Invariants: a request holds its version from before its texts are tokenised until it has ended, whatever way it ends;
texts that nobody waits for any more are dropped from the batcher.
"""

import asyncio
import base64
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from runtime.answer import INLINE_CHARACTERS
from runtime.batcher import Encoding
from runtime.bodies import EmbeddingRequest, parse_body
from runtime.http import encode_json, read_body, watch_client
from runtime.loaded import LoadedEncoder
from runtime.model import Float
from runtime.registry import Registry
from wire.errors import Code, InferenceError

JSON = "application/json"
ROWS_BETWEEN_PAUSES = 16
"""Rows written as JSON before the event loop may do something else: one takes a fifth of a millisecond."""


async def embeddings(request: Request) -> Response:
    """POST /v1/embeddings."""
    body = parse_body(EmbeddingRequest, await read_body(request))
    async with encoder_of(request, body.model) as version:
        if body.dimensions not in (None, version.config.dimensions):
            raise InferenceError(
                Code.BAD_REQUEST, f"dimensions: this model gives {version.config.dimensions}; leave the field out", 400
            )
        texts = await _tokens(version, body.input)
        rows = await encode(request, version, texts)
    count = sum(map(len, texts))
    rest = {
        "model": version.entry.model, "system_fingerprint": version.fingerprint,
        "usage": {"prompt_tokens": count, "total_tokens": count},
    }  # fmt: skip

    def write(index: int, row: Float) -> bytes:
        return encode_json({"object": "embedding", "index": index, "embedding": _written(row, body)})

    listed = await join_rows(rows, write)
    return Response(b'{"object":"list","data":[' + listed + b"]," + encode_json(rest)[1:], media_type=JSON)


@asynccontextmanager
async def encoder_of(request: Request, model: str) -> AsyncIterator[LoadedEncoder]:
    """The encoder that takes new requests for `model`, held. Raises InferenceError (400, 404, 503)."""
    registry: Registry = request.app.state.registry
    version = registry.acquire(model, LoadedEncoder)
    try:
        yield version
    finally:
        registry.release(version)


async def encode(request: Request, version: LoadedEncoder, texts: Sequence[Sequence[int]]) -> Float:
    """Embeddings of `texts`, float32 [len(texts), dimensions].

    Raises InferenceError as Batcher.submit does, when the model failed (500) or the time of a request is over (504);
    ClientDisconnect when nobody waits any more.
    """
    timeout_s: float = request.app.state.settings.request_timeout_s
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[InferenceError | ClientDisconnect | None] = loop.create_future()

    def end(error: InferenceError | ClientDisconnect | None) -> None:
        if not ended.done():
            ended.set_result(error)

    encoding = Encoding(texts, end)
    version.engine.submit(encoding)
    try:
        async with watch_client(request.receive, lambda: end(ClientDisconnect())), asyncio.timeout(timeout_s):
            error = await ended
    except TimeoutError as error:
        version.engine.stats.failed()
        raise InferenceError(
            Code.DEADLINE_PASSED, f"no embeddings within {timeout_s:g} s; send fewer texts", 504
        ) from error
    finally:
        version.engine.cancel(encoding)
    if error is not None:
        raise error
    return encoding.embeddings


async def join_rows(rows: Float, write: Callable[[int, Float], bytes]) -> bytes:
    """What `write` makes of each row, with commas between, and time for others now and then."""
    pieces = []
    for index, row in enumerate(rows):
        pieces.append(write(index, row))
        if index % ROWS_BETWEEN_PAUSES == ROWS_BETWEEN_PAUSES - 1:
            await asyncio.sleep(0)
    return b",".join(pieces)


async def _tokens(version: LoadedEncoder, given: Any) -> list[list[int]]:
    """Tokens of every input of an EmbeddingRequest."""
    inputs = [given] if isinstance(given, str) or isinstance(given[0], int) else list(given)
    if not isinstance(inputs[0], str):
        return [list(tokens) for tokens in inputs]
    if sum(map(len, inputs)) <= INLINE_CHARACTERS:
        return version.text.encode_all(inputs)
    return await asyncio.to_thread(version.text.encode_all, inputs)


def _written(row: Float, body: EmbeddingRequest) -> Any:
    if body.encoding_format == "base64":
        return base64.b64encode(row.astype(np.dtype("<f4")).tobytes()).decode()
    return row.tolist()
