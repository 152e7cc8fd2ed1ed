"""Any order, loss, repetition, damage and replay of frame messages leads to the same pack, or to nothing."""

import sys
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent.parent / "unit"))

from agent_simulators import NODE, Publisher

from wire.bitmap import Bitmap
from wire.fetch import Fetch, Judgement, credit_for
from wire.messages import FrameMessage

MADE = Publisher().make("1.0", weights_bytes=700_000)
FRAMES = MADE.manifest.frame_count

messages = st.lists(
    st.tuples(
        st.integers(0, FRAMES + 1),
        st.integers(1, 50),
        st.sampled_from([7, 8]),
        st.sampled_from(["right", "bit", "cut"]),
    ),
    max_size=40,
)


@settings(max_examples=60, deadline=None)
@given(messages)
def test_whatever_arrives_only_right_frames_count_and_the_want_heals(history):
    fetch = Fetch(NODE, MADE.artifact, MADE.manifest, Bitmap(FRAMES), credit_for(0))
    staging = bytearray(MADE.manifest.pack_size_bytes)
    right: set[int] = set()

    def deliver(frame: int, seq: int, epoch: int, data: bytes) -> None:
        judgement = fetch.judge(FrameMessage(epoch, seq, frame, data))
        if judgement is Judgement.NEW:
            assert frame not in right
            at = fetch.offset(frame)
            staging[at : at + len(data)] = data
            fetch.wrote(frame, 0.0)
            right.add(frame)
            if fetch.needs_index:
                fetch.open_index(bytes(staging[: MADE.manifest.index_size_bytes]))

    for frame, seq, epoch, how in history:
        data = MADE.frame(min(frame, FRAMES - 1))
        if how == "bit":
            data = bytes([data[0] ^ 4]) + data[1:]
        elif how == "cut":
            data = data[:-1]
        deliver(frame, seq, epoch, data)
        assert set(fetch.verified) == right
    for _ in range(2):  # the index, then the rest
        fetch.begin_session()
        for frame in list(fetch.want(0.0).missing_frames()):
            assert frame not in right
            deliver(frame, 1, 9, MADE.frame(frame))
    assert fetch.is_complete
    assert bytes(staging) == MADE.pack
