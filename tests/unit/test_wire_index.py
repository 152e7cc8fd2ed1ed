"""The binary index: round trip, and every inconsistency refused before anything is allocated from it."""

import hashlib
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wire.errors import ArtifactError, Code
from wire.index import Index, Section, SectionCodec, encode_index, index_size, parse_index
from wire.manifest import FRAME_BYTES, SECTION_LIMIT_BYTES

SECTIONS = st.builds(
    Section,
    stream=st.integers(0, 2**32 - 1),
    plane=st.integers(0, 255),
    codec=st.sampled_from(SectionCodec),
    raw_size=st.integers(1, SECTION_LIMIT_BYTES),
    coded_size=st.integers(1, SECTION_LIMIT_BYTES),
    crc32=st.integers(0, 2**32 - 1),
)


def make_index(*coded_sizes: int) -> tuple[bytes, int]:
    """(encoded index, bytes of data) of sections with these sizes."""
    size = sum(coded_sizes)
    hashes = tuple(hashlib.sha256(bytes([i])).digest() for i in range(-(-size // FRAME_BYTES)))
    sections = tuple(Section(0, 0, SectionCodec.RAW, coded, coded, 7) for coded in coded_sizes)
    return encode_index(Index(hashes, sections)), size


def outcome_of(data: bytes, size: int) -> Index | Code:
    try:
        return parse_index(data, size)
    except ArtifactError as error:
        return error.code


def refusal_of(data: bytes, size: int) -> ArtifactError:
    with pytest.raises(ArtifactError) as refused:
        parse_index(data, size)
    return refused.value


@settings(deadline=None)
@given(sections=st.lists(SECTIONS, max_size=12))
def test_parsed_index_is_what_was_encoded(sections: list[Section]) -> None:
    size = sum(section.coded_size for section in sections)
    hashes = tuple(hashlib.sha256(bytes([i])).digest() for i in range(-(-size // FRAME_BYTES)))
    index = Index(hashes, tuple(sections))
    data = encode_index(index)
    assert len(data) == index_size(len(hashes), len(sections))
    assert parse_index(data, size) == index


@settings(deadline=None)
@given(data=st.binary(max_size=200), size=st.integers(0, 1 << 40))
def test_arbitrary_bytes_are_refused_or_parsed_never_anything_else(data: bytes, size: int) -> None:
    outcome = outcome_of(data, size)
    assert outcome is Code.BAD_INDEX or (isinstance(outcome, Index) and encode_index(outcome) == data)


@settings(deadline=None)
@given(position=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_flipped_bit_never_yields_the_same_index(position: int, bit: int) -> None:
    data, size = make_index(SECTION_LIMIT_BYTES, 5000, 70_000)
    spoiled = bytearray(data)
    spoiled[position % len(data)] ^= 1 << bit
    outcome = outcome_of(bytes(spoiled), size)
    assert outcome is Code.BAD_INDEX or (isinstance(outcome, Index) and outcome != parse_index(data, size))


def test_header_that_claims_a_huge_index_is_refused_by_its_length() -> None:
    claim = struct.pack("<4sHHII", b"AMPI", 1, 0, 2**32 - 1, 2**32 - 1)
    assert "length does not match" in refusal_of(claim, 1).message


@pytest.mark.parametrize(
    ("field", "offset", "value"), [("magic", 0, b"X"), ("version", 4, b"\2"), ("reserved", 6, b"\1")]
)
def test_header_of_another_form_is_refused(field: str, offset: int, value: bytes) -> None:
    data, size = make_index(1000)
    assert "magic or version" in refusal_of(data[:offset] + value + data[offset + 1 :], size).message, field


def test_frames_that_do_not_cover_the_pack_are_refused() -> None:
    data, size = make_index(1000)
    assert "frame count" in refusal_of(data, size + FRAME_BYTES).message


def test_sections_that_do_not_fill_the_pack_are_refused() -> None:
    data, size = make_index(1000, 1000)
    assert "do not fill" in refusal_of(data, size - 1).message


@pytest.mark.parametrize("size", [0, SECTION_LIMIT_BYTES + 1])
def test_section_of_no_or_too_many_bytes_is_refused(size: int) -> None:
    hashes = (b"\0" * 32,) * -(-size // FRAME_BYTES)
    empty = encode_index(Index(hashes, (Section(0, 0, SectionCodec.RAW, 10, size, 0),)))
    assert "out of range" in refusal_of(empty, size).message
    data = encode_index(Index((b"\0" * 32,), (Section(0, 0, SectionCodec.RAW, size, 10, 0),)))
    assert "out of range" in refusal_of(data, 10).message


def test_unknown_codec_is_refused_with_the_advice_to_upgrade() -> None:
    data, size = make_index(1000)
    codec_at = len(data) - 20 + 5
    assert "upgrade this node" in refusal_of(data[:codec_at] + b"\x09" + data[codec_at + 1 :], size).message
