"""Bitmaps, wants, frame messages and topics."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from wire.bitmap import Bitmap
from wire.errors import ArtifactError, Code
from wire.manifest import FRAME_BYTES
from wire.messages import FRAME_MESSAGE_LIMIT_BYTES, FrameMessage, Want
from wire.topics import Topics

MQTT_PACKET_LIMIT_BYTES = 128 * 1024
"""AWS IoT's, the smallest of the brokers that a fleet may use."""


def make_want(missing: str, frames: int) -> Want:
    return Want(node="n1", artifact="a" * 64, frames=frames, missing=missing, credit=1)


class BitmapBesideSet(RuleBasedStateMachine):
    """Any sequence of operations leaves a bitmap that agrees with a set of numbers."""

    @initialize(length=st.integers(1, 70))
    def start(self, length: int) -> None:
        self.bitmap, self.numbers = Bitmap(length), set[int]()

    @rule(number=st.integers(0, 69))
    def set(self, number: int) -> None:
        if number < self.bitmap.length:
            self.bitmap.set(number)
            self.numbers.add(number)

    @rule(number=st.integers(0, 69))
    def clear(self, number: int) -> None:
        if number < self.bitmap.length:
            self.bitmap.clear(number)
            self.numbers.discard(number)

    @rule()
    def turn_over(self) -> None:
        self.bitmap = self.bitmap.complement()
        self.numbers = set(range(self.bitmap.length)) - self.numbers

    @rule()
    def go_through_bytes(self) -> None:
        self.bitmap = Bitmap(self.bitmap.length, self.bitmap.pack())

    @invariant()
    def agree(self) -> None:
        if not hasattr(self, "bitmap"):
            return
        assert list(self.bitmap) == sorted(self.numbers)
        assert len(self.bitmap) == len(self.numbers)
        assert [i for i in range(-2, 80) if i in self.bitmap] == sorted(self.numbers)


TestBitmap = BitmapBesideSet.TestCase
TestBitmap.settings = settings(deadline=None, max_examples=60, stateful_step_count=30)


def test_first_bit_is_the_least_significant_of_the_first_byte() -> None:
    bitmap = Bitmap(10)
    bitmap.set(0)
    bitmap.set(9)
    assert bitmap.pack() == b"\x01\x02"


@pytest.mark.parametrize(("length", "data"), [(8, b""), (8, b"\0\0"), (9, b"\0"), (9, b"\0\x02"), (1, b"\x02")])
def test_bytes_that_do_not_fit_the_length_are_refused(length: int, data: bytes) -> None:
    with pytest.raises(ArtifactError) as refused:
        Bitmap(length, data)
    assert refused.value.code is Code.BAD_DOCUMENT


@pytest.mark.parametrize("number", [-1, 8])
def test_bit_outside_the_bitmap_cannot_be_set_or_cleared(number: int) -> None:
    for change in (Bitmap(8).set, Bitmap(8).clear):
        with pytest.raises(IndexError):
            change(number)


def test_full_bitmap_has_every_bit_and_none_beyond() -> None:
    assert Bitmap.full(11).pack() == b"\xff\x07"
    assert Bitmap.full(11) == Bitmap(11).complement()
    assert Bitmap(8) != Bitmap(7)


@settings(deadline=None)
@given(numbers=st.sets(st.integers(0, 499)))
def test_want_carries_a_bitmap_through_its_field(numbers: set[int]) -> None:
    missing = Bitmap(500)
    for number in numbers:
        missing.set(number)
    assert make_want(Want.encode_missing(missing), 500).missing_frames() == missing


@pytest.mark.parametrize("missing", ["!", "AAAA", "AA", "//8="])
def test_want_whose_bitmap_does_not_fit_is_refused(missing: str) -> None:
    with pytest.raises(ArtifactError) as refused:
        make_want(missing, 9).missing_frames()
    assert refused.value.code is Code.BAD_DOCUMENT


@settings(deadline=None)
@given(
    epoch=st.integers(1, 2**32 - 1), seq=st.integers(0, 2**64 - 1), frame=st.integers(0, 2**32 - 1),
    data=st.binary(min_size=1, max_size=2000),
)  # fmt: skip
def test_frame_message_survives_the_way_through_bytes(epoch: int, seq: int, frame: int, data: bytes) -> None:
    message = FrameMessage(epoch, seq, frame, data)
    assert FrameMessage.parse(message.encode()) == message


@settings(deadline=None)
@given(payload=st.binary(max_size=64) | st.binary(max_size=64).map(lambda rest: b"AF\1\0" + rest))
def test_arbitrary_payload_is_refused_or_a_whole_frame_message(payload: bytes) -> None:
    try:
        again: bytes | Code = FrameMessage.parse(payload).encode()
    except ArtifactError as error:
        again = error.code
    assert again in (payload, Code.BAD_DOCUMENT)


@pytest.mark.parametrize(
    "payload",
    [
        FrameMessage(1, 1, 0, b"").encode(),
        FrameMessage(1, 1, 0, b"x" * (FRAME_BYTES + 1)).encode(),
        FrameMessage(0, 1, 0, b"x").encode(),
        b"AX" + FrameMessage(1, 1, 0, b"x").encode()[2:],
        b"AF\2" + FrameMessage(1, 1, 0, b"x").encode()[3:],
        b"AF\1\1" + FrameMessage(1, 1, 0, b"x").encode()[4:],
    ],
    ids=["empty", "too long", "epoch 0", "magic", "schema", "reserved"],
)
def test_frame_message_of_another_form_is_refused(payload: bytes) -> None:
    with pytest.raises(ArtifactError) as refused:
        FrameMessage.parse(payload)
    assert refused.value.code is Code.BAD_DOCUMENT


def test_whole_packet_of_the_largest_frame_stays_below_the_smallest_brokers_limit() -> None:
    topic = Topics("a/root/of/three/levels").frames("a" * 64)
    assert FRAME_MESSAGE_LIMIT_BYTES + len(topic) + 16 < MQTT_PACKET_LIMIT_BYTES


def test_topic_of_a_node_leads_back_to_node_and_kind() -> None:
    topics = Topics("site/a")
    for kind in ("status", "desired", "reported", "event", "telemetry", "ack", "want"):
        topic = getattr(topics, kind)("n1")
        assert topics.node_of(topic) == ("n1", kind)
        assert topics.every_node(kind) == topic.replace("/n1/", "/+/")


@pytest.mark.parametrize(
    "topic", ["site/a/doc/x", "site/b/node/n1/want", "site/a/node//want", "site/a/node/n1/", "site/a/node/n1/a/b"]
)
def test_other_topic_leads_to_no_node(topic: str) -> None:
    assert Topics("site/a").node_of(topic) is None
