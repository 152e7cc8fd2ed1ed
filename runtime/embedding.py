"""Texts to embeddings on the event loop's side, and `POST /v1/embeddings`.

Invariants: a request holds its version from before its texts are tokenised until it has ended, whatever way it ends;
texts that nobody waits for any more are dropped from the batcher.
"""

import asyncio
import base64
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from runtime.answer import INLINE_CHARACTERS
from runtime.batcher import Encoding
from runtime.bodies import EmbeddingRequest, parse_body
from runtime.ending import until_ended
from runtime.http import encode_json, read_body
from runtime.loaded import LoadedEncoder
from runtime.made import Array
from runtime.model import Float
from runtime.registry import Registry
from wire.errors import Code, InferenceError

JSON = "application/json"
ROWS_BETWEEN_PAUSES = 16
"""Rows written as JSON before the event loop may do something else: one takes a fifth of a millisecond."""


async def embeddings(request: Request) -> Response:
    """POST /v1/embeddings."""
    body = parse_body(EmbeddingRequest, await read_body(request))
    registry: Registry = request.app.state.registry
    with registry.holding(body.model, LoadedEncoder) as version:
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


async def encode(request: Request, version: LoadedEncoder, texts: Sequence[Sequence[int]]) -> Float:
    """Embeddings of `texts`, float32 [len(texts), dimensions].

    Raises InferenceError as Batcher.submit does, when the model failed (500) or the time of a request is over (504);
    ClientDisconnect when nobody waits any more.
    """
    async with until_ended(request, version.engine.stats, "send fewer texts") as ending:
        encoding = Encoding(texts, ending.end)
        version.engine.submit(encoding)
        ending.cancel = partial(version.engine.cancel, encoding)
    return encoding.embeddings


async def join_rows(rows: Iterable[Array], write: Callable[[int, Array], bytes]) -> bytes:
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
