"""Protobuf's wire format, as far as an ONNX graph needs it, without a protobuf library (protobuf.dev, Encoding).

A message is a row of fields, each a number and a value: bytes (texts and messages, too), a varint, or a fixed number.
Invariant: bytes that are not such a row raise ArtifactError.
"""

import struct
from collections.abc import Iterator

from wire.errors import ArtifactError, Code

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def fields(data: memoryview) -> Iterator[tuple[int, memoryview | int, memoryview]]:
    """Number, value and whole field of each field of one message: the value of a varint is a number, else bytes."""
    at = 0
    while at < len(data):
        start = at
        key, at = _varint(data, at)
        number, form = key >> 3, key & 7
        if form == _VARINT:
            value, at = _varint(data, at)
            yield number, value, data[start:at]
            continue
        if form == _BYTES:
            size, at = _varint(data, at)
        elif form in (_FIXED64, _FIXED32):
            size = 8 if form == _FIXED64 else 4
        else:
            raise _not_protobuf()
        if at + size > len(data):
            raise _not_protobuf()
        at += size
        yield number, data[at - size : at], data[start:at]


def parts(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Number and value of those fields that are bytes."""
    for number, value, _ in fields(data):
        if not isinstance(value, int):
            yield number, value


def text(data: memoryview, number: int) -> str:
    """The first text of that number, empty where there is none."""
    return next((bytes(value).decode(errors="replace") for at, value in parts(data) if at == number), "")


def encoded(number: int, value: bytes | str | float) -> bytes:
    """The bytes of one field; a float takes four of them."""
    if isinstance(value, int):
        return _number(number << 3 | _VARINT) + _number(value)
    if isinstance(value, float):
        return _number(number << 3 | _FIXED32) + struct.pack("<f", value)
    data = value.encode() if isinstance(value, str) else value
    return _number(number << 3 | _BYTES) + _number(len(data)) + data


def _number(value: int) -> bytes:
    """A varint; a negative number is a two's complement of 64 bits."""
    value &= (1 << 64) - 1
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(data) and shift < 70:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise _not_protobuf()


def _not_protobuf() -> ArtifactError:
    return ArtifactError(Code.CORRUPT, "graph is not an ONNX model; fetch the version again, or build it again")
