"""Whatever the text, the cuts and the bytes: pieces join, hostile graphs are refused."""

import sys
from functools import cache
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

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


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_walked_or_refused(data: bytes) -> None:
    try:
        external_locations(data)
    except ArtifactError:
        return


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_damaged_graph_is_walked_or_refused(data: st.DataObject) -> None:
    damaged = bytearray(graph())
    for _ in range(data.draw(st.integers(1, 6))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        external_locations(bytes(damaged[: data.draw(st.integers(0, len(damaged)))]))
    except ArtifactError:
        return
