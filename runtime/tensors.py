"""Tensors of the Open Inference Protocol v2: a request's JSON with numbers in it, or with binary data behind it.

Names and meanings: KServe's open-inference-protocol, inference_rest.md, and Triton's extension for binary tensor data.
Invariant: nothing is allocated by a shape that the request only claims; every size is held against the bytes that came.
"""

import math
import re
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from runtime.bodies import StrictBody, parse_body
from runtime.made import DTYPES, Array
from wire.errors import Code, InferenceError
from wire.manifest import Datatype

HEADER_LENGTH = "Inference-Header-Content-Length"
"""HTTP header: bytes of JSON before the binary data."""

REQUEST_LIMIT_BYTES = 16 << 20
"""Of a whole request; an image of 3 x 1024 x 1024 float32 has 12 MiB."""

_LENGTH = re.compile(r"[0-9]{1,9}")
_KINDS: dict[str, tuple[type, ...]] = {"b": (bool,), "i": (int,), "u": (int,), "f": (int, float)}
"""By numpy's kind of a type, what stands in JSON for it."""

Dimension = Annotated[int, Field(ge=1, le=1 << 24)]


class TensorParameters(StrictBody):
    """`parameters` of an input."""

    binary_data_size: Annotated[int, Field(ge=0)] | None = None


class OutputParameters(StrictBody):
    """`parameters` of an output that is asked for."""

    binary_data: bool | None = None


class RequestParameters(StrictBody):
    """`parameters` of a request."""

    binary_data_output: bool = False


class InputTensor(StrictBody):
    """One entry of `inputs`. `data` is flat or nested as the shape is, row by row."""

    name: Annotated[str, Field(min_length=1, max_length=128)]
    shape: Annotated[tuple[Dimension, ...], Field(max_length=8)]
    datatype: Annotated[Datatype, Field(strict=False)]
    parameters: TensorParameters = TensorParameters()
    data: list[Any] | None = None


class WantedOutput(StrictBody):
    """One entry of `outputs`."""

    name: Annotated[str, Field(min_length=1, max_length=128)]
    parameters: OutputParameters = OutputParameters()


class InferRequest(StrictBody):
    """The JSON of an infer request."""

    id: Annotated[str, Field(max_length=256)] | None = None
    parameters: RequestParameters = RequestParameters()
    inputs: Annotated[tuple[InputTensor, ...], Field(min_length=1, max_length=16)]
    outputs: Annotated[tuple[WantedOutput, ...], Field(max_length=16)] = ()


def read_tensors(body: bytes, header_length: str | None) -> tuple[InferRequest, dict[str, Array]]:
    """The request and its inputs by name, in their own types. Raises InferenceError(bad_request)."""
    length = len(body)
    if header_length is not None:
        length = int(header_length) if _LENGTH.fullmatch(header_length) else 0
    if not 0 < length <= len(body):
        raise _wrong(f"{HEADER_LENGTH} is {header_length}, the body has {len(body)} bytes")
    request = parse_body(InferRequest, body[:length])
    binary, tensors = memoryview(body)[length:], dict[str, Array]()
    for tensor in request.inputs:
        if tensor.name in tensors:
            raise _wrong(f"inputs: {tensor.name!r} is there twice")
        size = tensor.parameters.binary_data_size
        if size is None:
            tensors[tensor.name] = _from_json(tensor)
        else:
            tensors[tensor.name] = _from_binary(tensor, binary[:size])
            binary = binary[size:]
    if len(binary):
        raise _wrong(f"{len(binary)} bytes of binary data belong to no input")
    return request, tensors


def _from_json(tensor: InputTensor) -> Array:
    if tensor.data is None:
        raise _wrong(f"inputs: {tensor.name!r} has no data")
    numbers, dtype = _flat(tensor), DTYPES[tensor.datatype]
    if len(numbers) != math.prod(tensor.shape):
        raise _wrong(f"inputs: {tensor.name!r} has {len(numbers)} numbers, not as many as its shape says")
    if not all(type(number) in _KINDS[dtype.kind] for number in numbers):
        raise _wrong(f"inputs: the data of {tensor.name!r} is not all {tensor.datatype}")
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        if not limits.min <= min(numbers) <= max(numbers) <= limits.max:
            raise _wrong(f"inputs: {tensor.name!r} has a number that is no {tensor.datatype}")
    try:
        with np.errstate(over="ignore"):  # what is too large for a float type is infinite in it
            return np.asarray(numbers, dtype).reshape(tensor.shape)
    except OverflowError as error:
        raise _wrong(f"inputs: {tensor.name!r} has a number that is no {tensor.datatype}") from error


def _flat(tensor: InputTensor) -> list[Any]:
    """The numbers, row by row."""
    level, depth = tensor.data or [], 1
    while level and isinstance(level[0], list):
        if depth >= len(tensor.shape) or not all(isinstance(row, list) for row in level):
            raise _wrong(f"inputs: the data of {tensor.name!r} is not nested as its shape says")
        level, depth = [number for row in level for number in row], depth + 1
    return level


def _from_binary(tensor: InputTensor, data: memoryview) -> Array:
    dtype = DTYPES[tensor.datatype]
    wanted = math.prod(tensor.shape) * dtype.itemsize
    if tensor.data is not None or not tensor.parameters.binary_data_size == len(data) == wanted:
        raise _wrong(f"inputs: {tensor.name!r} has {len(data)} bytes of binary data, its shape means {wanted}")
    return np.frombuffer(data, dtype).reshape(tensor.shape)


def _wrong(message: str) -> InferenceError:
    return InferenceError(Code.BAD_REQUEST, message[:500], 400)
