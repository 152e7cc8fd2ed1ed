"""Planes, differences and sections: everything comes back, and all damage ends in ArtifactError or other bytes."""

import contextlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from codec.ans import decode_ans_into, encode_ans
from codec.difference import add, subtract, symbol_bits
from codec.entropy import LOG2_BITS, byte_histogram, entropy_bytes, log2_fixed, nibble_histogram
from codec.huffman import decode_huffman_into, encode_huffman
from codec.planes import ITEM_BYTES, join_planes, split_planes
from codec.rice import decode_rice_into, encode_rice
from codec.sections import check_section, decode_section_into, encode_section
from wire.errors import ArtifactError, Code
from wire.index import SectionCodec
from wire.manifest import Dtype, Layout

PLANES = st.binary(min_size=1, max_size=3000)
SPARSE = st.lists(st.sampled_from([0] * 60 + [1, 15, 16, 1, 15, 16, 240, 255, 7]), min_size=1, max_size=3000).map(bytes)


def array(data: bytes) -> NDArray[np.uint8]:
    return np.frombuffer(data, np.uint8)


def filled(size: int) -> NDArray[np.uint8]:
    """A target that holds other bytes before: whatever a decoder does not write shows."""
    return np.full(size, 0xA5, np.uint8)


@given(st.one_of(PLANES, SPARSE), st.sampled_from([4, 8]))
def test_rice_round_trip_returns_the_plane(data: bytes, bits: int) -> None:
    coded = encode_rice(array(data), bits)
    symbols = [b for byte in data for b in (byte & 15, byte >> 4)] if bits == 4 else list(data)
    assert (coded is None) == (sum(s != 0 for s in symbols) * 4 > len(symbols))
    if coded is not None:
        out = filled(len(data))
        decode_rice_into(coded, out)
        assert out.tobytes() == data


@given(st.integers(0, 2**32 - 1), st.sampled_from([1e-4, 1e-3, 1e-2, 0.1]), st.sampled_from([4, 8]))
@settings(max_examples=20)
def test_rice_stays_near_the_entropy_of_a_random_difference(seed: int, density: float, bits: int) -> None:
    random = np.random.default_rng(seed)
    count = 1 << 19
    symbols = np.where(random.random(count) < density, random.choice([1, (1 << bits) - 1], count), 0).astype(np.uint8)
    plane = symbols if bits == 8 else symbols[0::2] | symbols[1::2] << 4
    histogram = byte_histogram(plane) if bits == 8 else nibble_histogram(plane)
    coded = encode_rice(plane, bits)
    assert coded is not None
    assert len(coded) <= entropy_bytes(histogram) * 1.035 + 20
    out = filled(plane.size)
    decode_rice_into(coded, out)
    assert np.array_equal(out, plane)


@given(st.one_of(PLANES, SPARSE, st.integers(2, 3000).map(lambda n: b"\7" * n)).filter(lambda data: len(data) > 1))
def test_ans_round_trip_returns_the_plane(data: bytes) -> None:
    out = filled(len(data))
    decode_ans_into(encode_ans(array(data)), out)
    assert out.tobytes() == data


@pytest.mark.parametrize("size", [2, 3, 2047, 2048, 2049, 4097, 300_001, 1 << 20])
@pytest.mark.parametrize("density", [0.02, 0.3, 1.0])
def test_ans_stays_near_the_entropy_at_any_size(size: int, density: float) -> None:
    random = np.random.default_rng(size)
    plane = (random.integers(1, 16, size) * (random.random(size) < density)).astype(np.uint8)
    coded = encode_ans(plane)
    lanes = 1 << coded[0]
    assert len(coded) <= entropy_bytes(byte_histogram(plane)) * 1.03 + 4 * lanes + 80
    assert size <= 2048 * lanes
    out = filled(size)
    decode_ans_into(coded, out)
    assert np.array_equal(out, plane)


@given(st.lists(st.integers(1, 1 << 31), min_size=1, max_size=50))
def test_integer_logarithm_is_the_logarithm(values: list[int]) -> None:
    found = log2_fixed(np.array(values)) / (1 << LOG2_BITS)
    assert np.allclose(found, np.log2(values), rtol=0, atol=2**-18)


def test_plane_of_cheap_symbols_takes_ans() -> None:
    random = np.random.default_rng(5)
    plane = (random.integers(1, 4, 1 << 20) * (random.random(1 << 20) < 0.1)).astype(np.uint8)
    section = encode_section(plane)
    assert section.codec is SectionCodec.ANS
    out = filled(plane.size)
    decode_section_into(section.row(0, 0), section.coded, out)
    assert np.array_equal(out, plane)


@given(SPARSE.filter(lambda data: len(data) > 1), st.data())
@settings(max_examples=300)
def test_damaged_ans_section_ends_in_artifact_error_or_other_bytes(data: bytes, draw: st.DataObject) -> None:
    coded = bytearray(encode_ans(array(data)))
    for _ in range(draw.draw(st.integers(1, 3))):
        coded[draw.draw(st.integers(0, len(coded) - 1))] ^= draw.draw(st.integers(1, 255))
    cut = draw.draw(st.integers(0, len(coded)))
    for spoiled in (bytes(coded), bytes(coded[:cut])):
        with contextlib.suppress(ArtifactError):
            decode_ans_into(spoiled, filled(len(data)))


def test_ans_section_of_another_length_is_refused() -> None:
    coded = encode_ans(array(bytes(range(200)) * 40))
    for spoiled in (coded + bytes(2), coded + bytes(1), *(coded[:size] for size in range(len(coded)))):
        with pytest.raises(ArtifactError):
            decode_ans_into(spoiled, filled(8000))


def test_rice_section_cut_anywhere_is_refused() -> None:
    coded = encode_rice(array((bytes(20) + b"\1" + bytes(9) + b"\xf7") * 40), 4)
    assert coded is not None
    for spoiled in (coded + b"\1", coded + bytes(1), *(coded[:size] for size in range(len(coded)))):
        with pytest.raises(ArtifactError):
            decode_rice_into(spoiled, filled(31 * 40))


@given(st.one_of(PLANES, SPARSE), st.sampled_from([None, 4, 8]))
def test_section_round_trip_returns_the_plane_and_never_expands(data: bytes, bits: int | None) -> None:
    section = encode_section(array(data), sparse_symbol_bits=bits)
    assert len(section.coded) <= len(data)
    out = filled(len(data))
    decode_section_into(section.row(0, 0), section.coded, out)
    assert out.tobytes() == data


@given(SPARSE, st.sampled_from([4, 8]), st.data())
@settings(max_examples=300)
def test_damaged_rice_section_ends_in_artifact_error_or_other_bytes(
    data: bytes, bits: int, draw: st.DataObject
) -> None:
    whole = encode_rice(array(data), bits)
    if whole is None:
        return
    coded = bytearray(whole)
    for _ in range(draw.draw(st.integers(1, 4))):
        coded[draw.draw(st.integers(0, len(coded) - 1))] ^= draw.draw(st.integers(1, 255))
    cut = draw.draw(st.integers(0, len(coded)))
    for spoiled in (bytes(coded), bytes(coded[:cut])):
        with contextlib.suppress(ArtifactError):  # the CRC of the section catches what is still well formed
            decode_rice_into(spoiled, filled(len(data)))


@given(st.binary(max_size=400), st.integers(1, 3000))
@settings(max_examples=300)
def test_random_bytes_as_a_rice_section_end_in_artifact_error_or_a_plane(coded: bytes, size: int) -> None:
    with contextlib.suppress(ArtifactError):
        decode_rice_into(coded, filled(size))


@given(SPARSE, st.data())
def test_damaged_zstd_section_ends_in_artifact_error_or_other_bytes(data: bytes, draw: st.DataObject) -> None:
    coded = bytearray(encode_huffman(data))
    coded[draw.draw(st.integers(0, len(coded) - 1))] ^= draw.draw(st.integers(1, 255))
    cut = draw.draw(st.integers(0, len(coded)))
    for spoiled in (bytes(coded), bytes(coded[:cut])):
        with contextlib.suppress(ArtifactError):
            decode_huffman_into(spoiled, filled(len(data)))


@pytest.mark.parametrize(
    "frame",
    [
        bytes.fromhex("28b52ffde06c06060663636363"),  # claims 7 exabytes in 13 bytes
        encode_huffman(bytes(1 << 20)),  # a megabyte of zeros in a few bytes, where 100 are signed
        encode_huffman(bytes(100)) + b"\0",
        encode_huffman(bytes(100)) + encode_huffman(bytes(100)),
        encode_huffman(bytes(100))[:-1],
        bytes.fromhex("502a4d1804000000") + bytes(4),  # a skippable frame
        b"",
    ],
)
def test_zstd_frame_that_is_not_exactly_what_was_signed_is_refused(frame: bytes) -> None:
    with pytest.raises(ArtifactError) as refused:
        decode_huffman_into(frame, filled(100))
    assert refused.value.code is Code.BAD_SECTION


def test_section_like_the_base_takes_the_dictionary() -> None:
    random = np.random.default_rng(4)
    base = random.integers(32, 127, 5000).astype(np.uint8)
    new = np.concatenate([base[:2000], array(b"something else"), base[1990:]])
    section = encode_section(new, dictionary=base.tobytes())
    assert section.codec is SectionCodec.DICTIONARY
    assert len(section.coded) < 100
    out = filled(new.size)
    decode_section_into(section.row(0, 0), section.coded, out, base.tobytes())
    assert np.array_equal(out, new)
    with contextlib.suppress(ArtifactError):
        decode_section_into(section.row(0, 0), section.coded, out, bytes(5000))
    with pytest.raises(ArtifactError, match="a section of notes"):
        check_section(section.row(0, 0), out, "notes")
    for other in (None, b"short", bytes(2 << 20)):
        with pytest.raises(ArtifactError) as refused:
            decode_section_into(section.row(0, 0), section.coded, filled(new.size), other)
        assert refused.value.code is Code.BAD_SECTION


@given(PLANES, st.binary(max_size=3000))
def test_section_round_trip_with_a_dictionary_returns_the_plane(data: bytes, dictionary: bytes) -> None:
    section = encode_section(array(data), dictionary=dictionary)
    out = filled(len(data))
    decode_section_into(section.row(0, 0), section.coded, out, dictionary)
    assert out.tobytes() == data


@given(st.sampled_from(list(Layout)), st.binary(min_size=8, max_size=400))
def test_split_and_join_return_the_bytes(layout: Layout, data: bytes) -> None:
    stored = array(data[: len(data) // 8 * 8]).copy()
    if layout is Layout.F32_BF16_GRID:
        stored.reshape(-1, 4)[:, :2] = 0
    planes = split_planes(layout, stored)
    assert {plane.size for plane in planes} == {stored.size // ITEM_BYTES[layout]}
    out = filled(stored.size)
    join_planes(layout, planes, out)
    assert out.tobytes() == stored.tobytes()


def test_planes_hold_the_fields_of_a_float() -> None:
    value = np.array([-1.5], np.float32)  # sign 1, exponent 127, mantissa 1.1 in binary
    exponent, sign, middle, low = (int(plane[0]) for plane in split_planes(Layout.F32, value.view(np.uint8)))
    assert (exponent, sign, middle, low) == (127, 0x80 | 0x40, 0, 0)
    grid = split_planes(Layout.F32_BF16_GRID, value.view(np.uint8))
    brain = split_planes(Layout.BF16, value.view(np.uint8)[2:])
    assert [int(plane[0]) for plane in grid] == [int(plane[0]) for plane in brain] == [127, 0xC0]


def test_value_off_the_bf16_grid_is_refused() -> None:
    stored = np.array([1.0, 1.0000001], np.float32).view(np.uint8)
    with pytest.raises(ArtifactError, match="off the bfloat16 grid"):
        split_planes(Layout.F32_BF16_GRID, stored)


@pytest.mark.parametrize("layout", [Layout.F16, Layout.BF16, Layout.F32, Layout.F32_BF16_GRID])
def test_stream_that_cuts_an_item_is_refused(layout: Layout) -> None:
    with pytest.raises(ArtifactError, match="no whole items"):
        split_planes(layout, np.zeros(7, np.uint8))


@given(
    st.binary(min_size=1, max_size=200), st.binary(min_size=200, max_size=200), st.sampled_from([Dtype.U4, Dtype.I8])
)
def test_base_plus_difference_is_the_new_plane(new: bytes, base: bytes, dtype: Dtype) -> None:
    a, b = array(new), array(base)[: len(new)]
    assert add(dtype, b, subtract(dtype, a, b)).tobytes() == new


@given(st.binary(min_size=1, max_size=50), st.binary(min_size=50, max_size=50))
def test_nibble_difference_is_modulo_16_in_each_nibble(new: bytes, base: bytes) -> None:
    difference = subtract(Dtype.U4, array(new), array(base)[: len(new)])
    wanted = [((a & 15) - (b & 15)) % 16 | ((a >> 4) - (b >> 4)) % 16 << 4 for a, b in zip(new, base, strict=False)]
    assert difference.tolist() == wanted
    assert symbol_bits(Dtype.U4) == 4
