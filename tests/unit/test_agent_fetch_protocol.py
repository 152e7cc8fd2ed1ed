"""The fetch protocol as a pure object: what is believed, asked and journalled when."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from agent_simulators import NODE, Made, Publisher

from wire.bitmap import Bitmap
from wire.fetch import JOURNAL_EVERY_BYTES, Fetch, Judgement, credit_for
from wire.manifest import FRAME_BYTES
from wire.messages import WANT_RENEW_S, FrameMessage


@pytest.fixture(scope="module")
def made() -> Made:
    return Publisher().make("1.0", weights_bytes=10 * FRAME_BYTES)


def new_fetch(made: Made, verified: Bitmap | None = None, rate: int = 0) -> Fetch:
    return Fetch(NODE, made.artifact, made.manifest, verified or Bitmap(made.manifest.frame_count), credit_for(rate))


def take(fetch: Fetch, made: Made, frame: int, seq: int, now_s: float = 0.0, epoch: int = 7) -> Judgement:
    judgement = fetch.judge(FrameMessage(epoch, seq, frame, made.frame(frame)))
    if judgement is Judgement.NEW:
        fetch.wrote(frame, now_s)
        if fetch.needs_index:
            fetch.open_index(made.pack[: made.manifest.index_size_bytes])
    return judgement


def test_data_frame_before_the_index_is_neither_believed_nor_refused(made):
    fetch = new_fetch(made)
    assert take(fetch, made, 5, 1) is Judgement.EARLY
    assert (fetch.frames_verified, fetch.refused) == (0, 0)
    assert fetch.want(0.0).seen_seq == 0


def test_frame_with_a_wrong_byte_length_or_number_is_refused(made):
    fetch = new_fetch(made)
    take(fetch, made, 0, 1)
    data = made.frame(3)
    for frame, bad in ((3, b"\0" + data[1:]), (3, data[:-1]), (4000, data)):
        assert fetch.judge(FrameMessage(7, 99, frame, bad)) is Judgement.REFUSED
    assert fetch.refused == 3
    assert fetch.want(0.0).seen_seq == 1


def test_frame_that_is_there_already_moves_seen_but_is_not_written_again(made):
    fetch = new_fetch(made)
    take(fetch, made, 0, 1)
    assert take(fetch, made, 0, 2) is Judgement.DUPLICATE
    assert (fetch.frames_verified, fetch.duplicates) == (1, 1)
    assert fetch.want(0.0).seen_seq == 2


def test_want_names_only_the_index_until_it_is_known(made):
    fetch = new_fetch(made)
    assert list(fetch.want(0.0).missing_frames()) == [0]
    take(fetch, made, 0, 1)
    assert list(fetch.want(0.0).missing_frames()) == list(range(1, made.manifest.frame_count))


def test_want_is_renewed_when_its_credit_is_half_used_or_its_time_is_up(made):
    fetch = new_fetch(made)
    take(fetch, made, 0, 1)
    first = fetch.want(0.0)
    assert fetch.want(WANT_RENEW_S / 2) is None
    for i in range(first.credit // 2 - 1):
        take(fetch, made, 1 + i, 2 + i)
    assert fetch.want(0.1) is None
    take(fetch, made, first.credit // 2, first.credit // 2 + 1)
    renewed = fetch.want(0.2)
    assert (renewed.seen_epoch, renewed.seen_seq) == (7, first.credit // 2 + 1)
    assert fetch.want(0.3) is None
    assert fetch.want(0.2 + WANT_RENEW_S) is not None


def test_want_on_a_new_link_is_published_at_once(made):
    fetch = new_fetch(made)
    fetch.want(0.0)
    assert fetch.want(0.1) is None
    take(fetch, made, 0, 4)
    fetch.begin_session()
    want = fetch.want(0.1)
    assert (want.seen_epoch, want.seen_seq) == (0, 0)


def test_depot_of_a_later_epoch_is_followed_once_the_one_before_fell_silent(made):
    fetch = new_fetch(made)
    fetch.want(0.0)
    take(fetch, made, 0, 500, epoch=7)
    assert fetch.want(0.1).seen_by(8) == (7, 500)
    assert take(fetch, made, 1, 3, epoch=8) is Judgement.NEW
    silent = fetch.want(0.1 + WANT_RENEW_S)
    assert silent.silent, "what another depot sent is no news of this one"
    assert (silent.seen_by(7), silent.seen_by(8)) == ((7, 500), (0, 0))
    take(fetch, made, 2, 4, epoch=8)
    want = fetch.want(0.2 + WANT_RENEW_S)
    assert (want.seen_epoch, want.seen_seq, want.silent) == (8, 4, False)


def test_depot_of_the_lowest_epoch_is_followed_at_once(made):
    fetch = new_fetch(made)
    take(fetch, made, 0, 500, epoch=7)
    fetch.want(0.0)
    take(fetch, made, 1, 3, epoch=6)
    want = fetch.want(0.0)
    assert (want.seen_epoch, want.seen_seq) == (6, 3), "and it is told at once"
    take(fetch, made, 2, 501, epoch=7)
    assert fetch.want(WANT_RENEW_S).seen_seq == 3


def test_late_frame_does_not_move_seen_back(made):
    fetch = new_fetch(made)
    take(fetch, made, 0, 9)
    take(fetch, made, 1, 4)
    assert fetch.want(0.0).seen_seq == 9


def test_resumed_fetch_wants_exactly_what_the_journal_lacks(made):
    verified = Bitmap.full(made.manifest.frame_count)
    verified.clear(4)
    verified.clear(7)
    fetch = new_fetch(made, verified)
    assert fetch.needs_index
    fetch.open_index(made.pack[: made.manifest.index_size_bytes])
    assert list(fetch.want(0.0).missing_frames()) == [4, 7]
    take(fetch, made, 4, 1)
    take(fetch, made, 7, 2)
    assert fetch.is_complete
    assert len(fetch.farewell().missing_frames()) == 0


def test_journal_is_due_after_its_bytes_its_second_or_the_last_frame(made):
    fetch = new_fetch(made)
    assert not fetch.due(100.0)
    take(fetch, made, 0, 1, now_s=10.0)
    take(fetch, made, 1, 2, now_s=10.5)
    assert not fetch.due(10.9)
    assert fetch.due(11.0)
    fetch.journalled()
    assert not fetch.due(99.0)
    for frame in range(2, made.manifest.frame_count):
        take(fetch, made, frame, frame + 1, now_s=99.0)
    assert fetch.due(99.0)
    big = new_fetch(made)
    big._unjournalled_bytes = JOURNAL_EVERY_BYTES
    assert big.due(0.0)


def test_credit_under_a_cap_is_what_a_few_seconds_can_take():
    assert credit_for(200_000).value == 6
    assert credit_for(1).value == 2
    assert credit_for(0).value == 16
    assert credit_for(10**9).most == 128


def test_credit_doubles_while_frames_come_and_halves_after_loss_and_silence():
    credit = credit_for(0)
    for expected in (32, 64, 128, 128):
        credit.adapt(arrived=64, lost=0, elapsed_s=0.1)
        assert credit.value == expected
    credit.adapt(arrived=64, lost=4, elapsed_s=0.1)
    assert credit.value == 128, "a sixteenth may be lost by being late"
    credit.adapt(arrived=64, lost=5, elapsed_s=0.1)
    assert credit.value == 64
    credit.adapt(arrived=0, lost=0, elapsed_s=WANT_RENEW_S)
    assert credit.value == 32
    for _ in range(5):
        credit.adapt(arrived=0, lost=0, elapsed_s=WANT_RENEW_S)
    assert credit.value == 16, "loss alone does not stop a fetch"


def test_credit_of_a_slow_link_falls_to_what_it_takes_in_a_few_seconds_and_rises_again_with_it():
    credit = credit_for(0)
    for expected in (8, 4, 4):
        credit.adapt(arrived=5, lost=0, elapsed_s=5.0)
        assert credit.value == expected
    credit.adapt(arrived=1, lost=0, elapsed_s=5.0)
    credit.adapt(arrived=1, lost=0, elapsed_s=5.0)
    assert credit.value == 2
    for expected in (4, 8, 16):
        credit.adapt(arrived=2, lost=0, elapsed_s=0.1)
        assert credit.value == expected


def test_credit_is_a_small_share_of_a_small_pack(made):
    credit = credit_for(0)
    Fetch(NODE, made.artifact, made.manifest, Bitmap(made.manifest.frame_count), credit)
    assert credit.most == 16


def test_loss_is_what_the_depot_sent_and_did_not_come(made):
    fetch = new_fetch(made)
    take(fetch, made, 0, 1)
    fetch.want(0.0)
    for frame in range(1, 9):
        take(fetch, made, frame, 10 * frame)
    lossy = fetch.want(0.1)
    assert lossy.credit == 16
    fetch._credit.value = fetch._credit.most = 64
    take(fetch, made, 9, 90)
    assert fetch.want(0.1 + WANT_RENEW_S).credit == 32
