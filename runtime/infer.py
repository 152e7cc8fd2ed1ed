"""`POST /v2/models/{model}/infer`: tensors in, tensors out, in JSON or as binary data.

A graph takes and gives what its config says. An encoder takes tokens and gives embeddings; the rows of a request are
texts like any others to the batcher: what is padding to the client is not computed.
"""

import asyncio
from functools import partial
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from runtime.bodies import INPUTS_LIMIT
from runtime.embedding import JSON, encode, join_rows
from runtime.ending import until_ended
from runtime.http import encode_json, read_body
from runtime.loaded import LoadedEncoder, LoadedGraph, LoadedTensors
from runtime.made import DTYPES, Array
from runtime.registry import Registry
from runtime.runner import Job
from runtime.tensors import HEADER_LENGTH, REQUEST_LIMIT_BYTES, InferRequest, read_tensors
from wire.errors import Code, InferenceError
from wire.manifest import EncoderConfig, GraphConfig, GraphTensor, ModelConfig

IDS, MASK, OUTPUT = "input_ids", "attention_mask", "embeddings"
INLINE_BYTES = 16_384
PIECE_NUMBERS = 512
"""Of an output, written as JSON at once."""
DATATYPES = {dtype.str: datatype for datatype, dtype in DTYPES.items()}


async def infer(request: Request) -> Response:
    """POST /v2/models/{model}/infer."""
    body = await read_body(request, REQUEST_LIMIT_BYTES)
    registry: Registry = request.app.state.registry
    with registry.holding(request.path_params["model"], LoadedTensors) as version:
        wanted, tensors = await _read(body, request.headers.get(HEADER_LENGTH))
        config = version.document.config
        binary = _chosen(wanted, [OUTPUT] if isinstance(config, EncoderConfig) else _names(config))
        if isinstance(version, LoadedEncoder):
            found: dict[str, Array] = {OUTPUT: await encode(request, version, _texts(tensors))}
        else:
            assert isinstance(version, LoadedGraph)  # noqa: S101  there are two kinds that take tensors
            found = await _run(request, version, tensors)
    head: dict[str, Any] = {"model_name": version.entry.model, "model_version": version.entry.version}
    if wanted.id is not None:
        head["id"] = wanted.id
    return await _answer(head, {name: found[name] for name in binary}, binary)


def tensors_of(config: ModelConfig) -> dict[str, list[dict[str, Any]]]:
    """`inputs` and `outputs` of the model's metadata. -1 is a size that may differ: any number of texts, of tokens up
    to `max_tokens`, or up to `largest` of a graph. Decoders take text over the OpenAI API, so that they list none."""
    if isinstance(config, GraphConfig):
        return {kind: [_described(tensor) for tensor in tensors]
                for kind, tensors in (("inputs", config.inputs), ("outputs", config.outputs))}  # fmt: skip
    if isinstance(config, EncoderConfig):
        inputs = [{"name": name, "datatype": "INT64", "shape": [-1, -1]} for name in (IDS, MASK)]
        return {"inputs": inputs, "outputs": [{"name": OUTPUT, "datatype": "FP32", "shape": [-1, config.dimensions]}]}
    return {"inputs": [], "outputs": []}


def _described(tensor: GraphTensor) -> dict[str, Any]:
    shape = [size if isinstance(size, int) else -1 for size in tensor.shape]
    return {"name": tensor.name, "datatype": tensor.datatype, "shape": shape}


def _names(config: ModelConfig) -> list[str]:
    return [tensor.name for tensor in config.outputs] if isinstance(config, GraphConfig) else []


async def _run(request: Request, version: LoadedGraph, feeds: dict[str, Array]) -> dict[str, Array]:
    """Outputs of a graph. Raises InferenceError as Runner.submit and until_ended do."""
    async with until_ended(request, version.engine.stats, "send less") as ending:
        job = Job(feeds, ending.end)
        version.engine.submit(job)
        ending.cancel = partial(version.engine.cancel, job)
    return job.outputs


async def _read(body: bytes, header_length: str | None) -> tuple[InferRequest, dict[str, Array]]:
    """As read_tensors, on another thread when it takes long, so that it does not hold up everybody's tokens."""
    if len(body) <= INLINE_BYTES:
        return read_tensors(body, header_length)
    return await asyncio.to_thread(read_tensors, body, header_length)


def _chosen(wanted: InferRequest, names: list[str]) -> dict[str, bool]:
    """The outputs that are asked for, all by default, and whether each goes behind the JSON."""
    asked = {output.name: output.parameters.binary_data for output in wanted.outputs} or dict.fromkeys(names)
    if asked.keys() - set(names) or len(asked) < len(wanted.outputs):
        raise InferenceError(Code.BAD_REQUEST, f"outputs: this model has {', '.join(names)}; name each once", 400)
    default = wanted.parameters.binary_data_output
    return {name: default if chosen is None else chosen for name, chosen in asked.items()}


def _texts(tensors: dict[str, Array]) -> list[list[int]]:
    """The tokens of each row that its mask keeps."""
    if wrong := sorted(name for name, values in tensors.items() if values.dtype.str not in ("<i4", "<i8")):
        raise InferenceError(Code.BAD_REQUEST, f"inputs: {wrong[0]!r} is INT64 or INT32", 400)
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


async def _answer(head: dict[str, Any], found: dict[str, Array], binary: dict[str, bool]) -> Response:
    """Outputs in JSON, one after the other with time for others between, and behind it those that are binary."""
    outputs, blobs = [], []
    for name, values in found.items():
        told: dict[str, Any] = {"name": name, "shape": list(values.shape), "datatype": DATATYPES[values.dtype.str]}
        if binary[name]:
            blobs.append(values.tobytes())
            outputs.append(encode_json(told | {"parameters": {"binary_data_size": len(blobs[-1])}}))
            continue
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise InferenceError(
                Code.INTERNAL, f"output {name!r} holds numbers that JSON has not; ask for it as binary data", 500
            )
        flat = values.reshape(-1)
        pieces = [flat[start : start + PIECE_NUMBERS] for start in range(0, flat.size, PIECE_NUMBERS)]
        data = await join_rows(pieces, lambda _index, piece: encode_json(piece.tolist())[1:-1])
        outputs.append(encode_json(told)[:-1] + b',"data":[' + data + b"]}")
    text = encode_json(head)[:-1] + b',"outputs":[' + b",".join(outputs) + b"]}"
    if not blobs:
        return Response(text, media_type=JSON)
    headers = {HEADER_LENGTH: str(len(text))}
    return Response(text + b"".join(blobs), headers=headers, media_type="application/octet-stream")
