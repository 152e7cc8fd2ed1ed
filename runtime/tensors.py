"""Tensors of the Open Inference Protocol v2: a request's JSON with numbers in it, or with binary data behind it.

Names and meanings: KServe's open-inference-protocol, inference_rest.md, and Triton's extension for binary tensor data.
Invariant: nothing is allocated by a shape that the request only claims; every size is held against the bytes that came.
"""

import math
import re
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from runtime.bodies import StrictBody, parse_body
from wire.errors import Code, InferenceError

HEADER_LENGTH = "Inference-Header-Content-Length"
"""HTTP header: bytes of JSON before the binary data."""

_LENGTH = re.compile(r"[0-9]{1,9}")
_WIDTHS: dict[str, np.dtype[np.signedinteger[Any]]] = {"INT32": np.dtype("<i4"), "INT64": np.dtype("<i8")}

Numbers = tuple[int, ...]
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
    """One entry of `inputs`. `data` is flat or nested, row by row."""

    name: Annotated[str, Field(min_length=1, max_length=128)]
    shape: Annotated[tuple[Dimension, ...], Field(min_length=1, max_length=8)]
    datatype: Literal["INT32", "INT64"]
    parameters: TensorParameters = TensorParameters()
    data: Numbers | tuple[Numbers, ...] | None = None


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


def read_tensors(body: bytes, header_length: str | None) -> tuple[InferRequest, dict[str, NDArray[np.int64]]]:
    """The request and its inputs by name. Raises InferenceError(bad_request)."""
    length = len(body)
    if header_length is not None:
        length = int(header_length) if _LENGTH.fullmatch(header_length) else 0
    if not 0 < length <= len(body):
        raise _wrong(f"{HEADER_LENGTH} is {header_length}, the body has {len(body)} bytes")
    request = parse_body(InferRequest, body[:length])
    binary, tensors = memoryview(body)[length:], {}
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


def _from_json(tensor: InputTensor) -> NDArray[np.int64]:
    if tensor.data is None:
        raise _wrong(f"inputs: {tensor.name!r} has no data")
    rows = [row if isinstance(row, tuple) else (row,) for row in tensor.data]
    numbers = [number for row in rows for number in row]
    if len(numbers) != math.prod(tensor.shape):
        raise _wrong(f"inputs: {tensor.name!r} has {len(numbers)} numbers, not as many as its shape says")
    limits = np.iinfo(_WIDTHS[tensor.datatype])
    if not limits.min <= min(numbers) <= max(numbers) <= limits.max:
        raise _wrong(f"inputs: {tensor.name!r} has a number that is no {tensor.datatype}")
    return np.asarray(numbers, np.int64).reshape(tensor.shape)


def _from_binary(tensor: InputTensor, data: memoryview) -> NDArray[np.int64]:
    width = _WIDTHS[tensor.datatype]
    wanted = math.prod(tensor.shape) * width.itemsize
    if tensor.data is not None or not tensor.parameters.binary_data_size == len(data) == wanted:
        raise _wrong(f"inputs: {tensor.name!r} has {len(data)} bytes of binary data, its shape means {wanted}")
    return np.frombuffer(data, width).astype(np.int64).reshape(tensor.shape)


def _wrong(message: str) -> InferenceError:
    return InferenceError(Code.BAD_REQUEST, message[:500], 400)
