"""Whatever the tokens and the stop strings: what is given out is the text before the first, and its tokens."""

import sys
from functools import cache
from pathlib import Path

from hypothesis import assume, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1]))

from runtime_fixtures import base_version

from runtime.sampling import Scored
from runtime.text import StopStrings, Text
from runtime.transcript import Piece, Transcript

SPECIAL = [1, 2]
PHRASES = st.text(alphabet="ab E.\n漢é🙂𝄞", max_size=8) | st.sampled_from(["END", " the end", "🙂🙂", "said", "\n\n"])


@cache
def text() -> Text:
    return Text(base_version().directory, base_version().document.config)


def decoded(tokens: list[int]) -> str:
    """By the library, all at once."""
    return str(text().tokenizer.decode(tokens))


@st.composite
def answers(draw: st.DrawFn) -> list[int]:
    """Tokens of phrases that were tokenised one by one, so that words are cut anywhere, special ones in between."""
    tokens: list[int] = []
    for phrase in draw(st.lists(PHRASES, max_size=8)):
        tokens += text().encode(phrase, special=False)
        tokens += draw(st.sampled_from([[], [], SPECIAL[:1], SPECIAL]))
    return tokens


@st.composite
def stops_of(draw: st.DrawFn, whole: str) -> tuple[str, ...]:
    """Parts of the text, which cross the borders of tokens, and strings that may not occur in it."""
    parts = st.tuples(st.integers(0, len(whole)), st.integers(1, 6)).map(lambda cut: whole[cut[0] : sum(cut)])
    return tuple(stop for stop in draw(st.lists(parts | PHRASES, max_size=3)) if stop)


def run(tokens: list[int], stops: tuple[str, ...], takes: list[bool]) -> tuple[list[Piece], int]:
    """The pieces, and how many tokens were read until the answer was over."""
    transcript, pieces = Transcript(text().vocabulary, stops), []
    for count, token in enumerate(tokens, 1):
        transcript.feed(Scored(token, -1.0, ()))
        if takes[count % len(takes)]:
            pieces.append(transcript.take())
        if transcript.stopped:
            return [*pieces, transcript.take()], count
    transcript.finish()
    return [*pieces, transcript.take()], len(tokens)


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


@settings(deadline=None, max_examples=300)
@given(answers(), st.lists(st.booleans(), min_size=1, max_size=3), st.data())
def test_text_ends_before_the_first_stop_string_and_usage_with_the_token_that_completes_it(
    tokens: list[int], takes: list[bool], data: st.DataObject
) -> None:
    whole = decoded(tokens)
    assume("\ufffd" not in whole)
    stops = data.draw(stops_of(whole))
    pieces, read = run(tokens, stops, takes)
    assert "".join(piece.text for piece in pieces) == first_stop(whole, stops)
    known = [decoded(tokens[:count]) for count in range(1, len(tokens) + 1)]
    complete = [
        count for count, begun in enumerate(known, 1)
        if any(stop in begun.rstrip("\ufffd") for stop in stops)
    ]  # fmt: skip
    assert read == (complete[0] if complete else len(tokens))


@settings(deadline=None, max_examples=300)
@given(answers(), st.lists(st.booleans(), min_size=1, max_size=3), st.data())
def test_tokens_are_given_out_with_their_text_and_none_that_reaches_into_a_stop_string(
    tokens: list[int], takes: list[bool], data: st.DataObject
) -> None:
    whole = decoded(tokens)
    assume("\ufffd" not in whole)
    stops = data.draw(stops_of(whole))
    pieces, _ = run(tokens, stops, takes)
    given_out = "".join(piece.text for piece in pieces)
    placed = [one for piece in pieces for one in piece.scores]
    count = len(placed)
    assert [one.scored.token for one in placed] == tokens[:count]
    joined = b"".join(text().vocabulary.bytes_of(token) or b"" for token in tokens[:count])
    if given_out == whole:
        assert joined == whole.encode()
        assert count == len(tokens) or any(stop in whole for stop in stops)
    else:
        assert given_out.encode().startswith(joined)
        more = next(n for n in range(count + 1, len(tokens) + 1) if not decoded(tokens[:n]).endswith("\ufffd"))
        assert len(decoded(tokens[:more])) > len(given_out)
    for one in placed:
        data_of = text().vocabulary.bytes_of(one.scored.token)
        if data_of and "\\" not in text().vocabulary.written(one.scored.token):
            assert given_out[one.offset :].startswith(data_of.decode())
    for number, piece in enumerate(pieces):
        before = sum(len(earlier.text) for earlier in pieces[: number + 1])
        assert all(one.offset <= before for one in piece.scores)


@settings(deadline=None)
@given(st.lists(st.integers(0, 4095), max_size=40))
def test_bytes_of_any_tokens_are_those_of_their_text(tokens: list[int]) -> None:
    joined = b"".join(text().vocabulary.bytes_of(token) or b"" for token in tokens)
    assert joined.decode(errors="replace") == decoded(tokens)
