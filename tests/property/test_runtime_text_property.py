"""Whatever the text, the cuts and the bytes: pieces join, hostile graphs are refused."""

import sys
from functools import cache
from pathlib import Path

from google.protobuf.message import DecodeError, Message
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto

sys.path.insert(0, str(Path(__file__).parents[1]))

from runtime_fixtures import base_version

from runtime.external import external_locations
from runtime.text import Detokeniser, Text
from wire.errors import ArtifactError


@cache
def text() -> Text:
    return Text(base_version().directory, base_version().document.config)


@cache
def graph() -> bytes:
    return (base_version().directory / "model.onnx").read_bytes()


@settings(deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd")))
def test_pieces_of_any_text_are_whole_and_join_to_it(phrase: str) -> None:
    detokeniser = Detokeniser(text().vocabulary)
    tokens = text().encode(phrase, special=False)
    pieces = [detokeniser.feed(token) for token in tokens]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) + detokeniser.finish() == text().tokenizer.decode(tokens)


@settings(deadline=None)
@given(st.lists(st.integers(0, 4095), max_size=40))
def test_pieces_of_any_tokens_join_to_their_text(tokens: list[int]) -> None:
    detokeniser = Detokeniser(text().vocabulary)
    joined = "".join([detokeniser.feed(token) for token in tokens]) + detokeniser.finish()
    assert joined == text().tokenizer.decode(tokens)


def told(data: bytes) -> set[str] | None:
    """What the walker says of the bytes of a graph; None when it refuses them."""
    try:
        return external_locations(data)
    except ArtifactError:
        return None


def read_by_onnx(data: bytes) -> set[str]:
    """Every location of external data that onnx's own parser sees, nothing when it refuses the bytes."""
    model = ModelProto()
    try:
        model.ParseFromString(data)
    except DecodeError:
        return set()
    found: set[str] = set()
    pending: list[Message] = [model]
    while pending:
        message = pending.pop()
        if isinstance(message, TensorProto):
            found |= {entry.value for entry in message.external_data if entry.key == "location"}
        for descriptor, value in message.ListFields():
            if descriptor.message_type is not None:
                pending += [value] if isinstance(value, Message) else value
    return found


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_refused_or_hide_no_file_from_us(data: bytes) -> None:
    found = told(data)
    assert found is None or found >= read_by_onnx(data)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damaged_graph_is_refused_or_hides_no_file_from_us(data: st.DataObject) -> None:
    damaged = bytearray(graph())
    for _ in range(data.draw(st.integers(1, 6))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(damaged[: data.draw(st.integers(0, len(damaged)) | st.just(len(damaged)))])
    found = told(cut)
    assert found is None or found >= read_by_onnx(cut)
    assert told(graph()) == read_by_onnx(graph()) == {"weights.bin"}
