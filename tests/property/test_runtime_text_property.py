"""Whatever the text, the cuts and the bytes: pieces join, stop strings cut alike, hostile graphs are refused."""

import sys
from functools import cache
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1]))

from runtime_fixtures import base_version

from runtime.external import external_locations
from runtime.sampling import Sampler, Sampling
from runtime.text import Detokeniser, StopStrings, Text
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
    detokeniser = Detokeniser(text().decode)
    tokens = text().encode(phrase, special=False)
    pieces = [detokeniser.feed(token) for token in tokens]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) + detokeniser.finish() == text().decode(tokens)


@settings(deadline=None)
@given(st.lists(st.integers(0, 4095), max_size=40))
def test_pieces_of_any_tokens_join_to_their_text_where_it_is_text(tokens: list[int]) -> None:
    whole = text().decode(tokens)
    detokeniser = Detokeniser(text().decode)
    joined = "".join([detokeniser.feed(token) for token in tokens]) + detokeniser.finish()
    if "\ufffd" not in whole:
        assert joined == whole


def first_stop(phrase: str, stops: tuple[str, ...]) -> str:
    """The definition: read character by character, cut when a stop string is complete, the longest of them first."""
    for end in range(1, len(phrase) + 1):
        complete = [stop for stop in stops if phrase[:end].endswith(stop)]
        if complete:
            return phrase[: end - max(map(len, complete))]
    return phrase


@settings(deadline=None)
@given(
    st.lists(st.text(alphabet="abc", max_size=4), max_size=12),
    st.lists(st.text(alphabet="abc", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_stop_strings_cut_at_the_same_place_however_the_text_comes(pieces: list[str], stops: list[str]) -> None:
    machine = StopStrings(tuple(stops))
    given_out = "".join([machine.feed(piece) for piece in pieces]) + machine.finish()
    phrase = "".join(pieces)
    assert given_out == first_stop(phrase, tuple(stops))
    assert machine.stopped == any(stop in phrase for stop in stops)


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


@settings(deadline=None)
@given(
    st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=600),
    st.floats(0.05, 2.0),
    st.floats(0.01, 1.0),
    st.integers(0, 50),
)
def test_drawn_token_is_in_the_nucleus(row: list[float], temperature: float, top_p: float, top_k: int) -> None:
    logits = np.asarray(row, np.float32)
    token = Sampler(Sampling(temperature, top_p, top_k, seed=1)).draw(logits)
    weights = np.exp((logits - logits.max()).astype(np.float64) / temperature)
    better = np.sort(weights[weights > weights[token]])[::-1]
    if top_k:
        assert better.size < top_k
    kept = np.sort(weights)[::-1][: top_k or None]
    assert better.sum() <= top_p * kept.sum() * (1 + 1e-9)
