"""`POST /v2/models/{model}/infer` of encoders: tensors of tokens in, embeddings out, in JSON or as binary data.

The rows of a request are texts like any others to the batcher: what is padding to the client is not computed.
"""

import asyncio
from typing import Any

import numpy as np
from numpy.typing import NDArray
from starlette.requests import Request
from starlette.responses import Response

from runtime.bodies import INPUTS_LIMIT
from runtime.embedding import JSON, encode, encoder_of, join_rows
from runtime.http import encode_json, read_body
from runtime.model import Float
from runtime.tensors import HEADER_LENGTH, InferRequest, read_tensors
from wire.errors import Code, InferenceError
from wire.manifest import EncoderConfig

IDS, MASK, OUTPUT = "input_ids", "attention_mask", "embeddings"
INLINE_BYTES = 16_384
Int = NDArray[np.int64]


async def infer(request: Request) -> Response:
    """POST /v2/models/{model}/infer."""
    body = await read_body(request)
    async with encoder_of(request, request.path_params["model"]) as version:
        wanted, tensors = await _read(body, request.headers.get(HEADER_LENGTH))
        binary = _is_binary(wanted)
        rows = await encode(request, version, _texts(tensors))
    head: dict[str, Any] = {"model_name": version.entry.model, "model_version": version.entry.version}
    if wanted.id is not None:
        head["id"] = wanted.id
    return await _answer(head, rows, binary=binary)


def tensors_of(config: EncoderConfig) -> dict[str, list[dict[str, Any]]]:
    """`inputs` and `outputs` of the model's metadata; -1 is any number of texts, or of tokens up to `max_tokens`."""
    inputs = [{"name": name, "datatype": "INT64", "shape": [-1, -1]} for name in (IDS, MASK)]
    return {"inputs": inputs, "outputs": [{"name": OUTPUT, "datatype": "FP32", "shape": [-1, config.dimensions]}]}


async def _read(body: bytes, header_length: str | None) -> tuple[InferRequest, dict[str, Int]]:
    """As read_tensors, on another thread when it takes long, so that it does not hold up everybody's tokens."""
    if len(body) <= INLINE_BYTES:
        return read_tensors(body, header_length)
    return await asyncio.to_thread(read_tensors, body, header_length)


def _is_binary(wanted: InferRequest) -> bool:
    """Whether the output goes behind the JSON."""
    if any(output.name != OUTPUT for output in wanted.outputs) or len(wanted.outputs) > 1:
        raise InferenceError(Code.BAD_REQUEST, f"outputs: this model has {OUTPUT!r} alone", 400)
    chosen = wanted.outputs[0].parameters.binary_data if wanted.outputs else None
    return wanted.parameters.binary_data_output if chosen is None else chosen


def _texts(tensors: dict[str, Int]) -> list[list[int]]:
    """The tokens of each row that its mask keeps."""
    if unknown := tensors.keys() - {IDS, MASK}:
        raise InferenceError(Code.BAD_REQUEST, f"inputs: {min(unknown)!r} is none of this model", 400)
    ids = tensors.get(IDS)
    if ids is None or ids.ndim != 2:
        raise InferenceError(Code.BAD_REQUEST, f"inputs: send {IDS!r}, INT64 [texts, tokens]", 400)
    if len(ids) > INPUTS_LIMIT:
        raise InferenceError(Code.BAD_REQUEST, f"inputs: one request may have {INPUTS_LIMIT} texts", 400)
    mask = tensors.get(MASK, np.ones_like(ids))
    lengths = mask.sum(axis=1) if mask.shape == ids.shape else np.zeros(1, np.int64)
    kept = np.arange(ids.shape[1])[None, :] < lengths[:, None]
    if mask.shape != ids.shape or not np.array_equal(mask, kept) or not lengths.all():
        raise InferenceError(
            Code.BAD_REQUEST,
            f"inputs: {MASK!r} has the shape of {IDS!r}, and in each row ones, at least one, and then zeros", 400,
        )  # fmt: skip
    return [row[:length].tolist() for row, length in zip(ids, lengths, strict=True)]


async def _answer(head: dict[str, Any], rows: Float, *, binary: bool) -> Response:
    output: dict[str, Any] = {"name": OUTPUT, "shape": list(rows.shape), "datatype": "FP32"}
    if binary:
        blob = rows.astype(np.dtype("<f4")).tobytes()
        output["parameters"] = {"binary_data_size": len(blob)}
        text = encode_json(head | {"outputs": [output]})
        headers = {HEADER_LENGTH: str(len(text))}
        return Response(text + blob, headers=headers, media_type="application/octet-stream")
    data = await join_rows(rows, lambda _index, row: encode_json(row.tolist())[1:-1])
    begun = encode_json(head | {"outputs": [output]}).removesuffix(b"}]}")
    return Response(begun + b',"data":[' + data + b"]}]}", media_type=JSON)
