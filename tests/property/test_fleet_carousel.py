"""What the carousel publishes next and for whom, want by want; whole histories are in test_fleet_simulation.py."""

from fleet.carousel import (
    BUDGET_PASSES,
    BUDGET_SPARE_FRAMES,
    GATHER_MOST_S,
    GATHER_S,
    PATIENCE_FIRST_S,
    Carousel,
)
from wire.bitmap import Bitmap
from wire.messages import WANT_RENEW_S, WANT_VOID_S


def test_frames_in_flight_that_are_lost_at_the_tail_come_again_after_one_silent_renewal() -> None:
    carousel = Carousel(5, 1, epoch=7)
    missing = Bitmap.full(5)
    missing.clear(0)
    carousel.on_want("n", missing, (0, 0), 16, 0.0)
    sent = [carousel.next_frame(GATHER_S + i / 100) for i in range(5)]
    assert [found[0] for found in sent if found] == [1, 2, 3, 4]
    assert sent[4] is None
    carousel.on_want("n", missing, (0, 0), 16, PATIENCE_FIRST_S / 2)
    assert carousel.next_frame(PATIENCE_FIRST_S / 2) is None, "not silent for long enough"
    carousel.on_want("n", missing, (0, 0), 16, WANT_RENEW_S)
    assert carousel.next_frame(WANT_RENEW_S) == (1, 5)


def test_slow_reader_whose_frames_were_late_not_lost_is_given_more_patience() -> None:
    carousel = Carousel(3, 1, epoch=7)
    missing = Bitmap.full(3)
    carousel.on_want("n", missing, (0, 0), 1, 0.0)
    assert carousel.next_frame(0.0) == (0, 1)
    carousel.on_want("n", missing, (0, 0), 1, 5.0)
    assert carousel.next_frame(5.0) == (0, 2), "given up as lost"
    missing.clear(0)
    carousel.on_want("n", missing, (7, 1), 1, 6.0)
    assert carousel.next_frame(6.1) is None, "the first copy came after all, the second is on its way"
    carousel.on_want("n", missing, (7, 2), 1, 6.2)
    assert carousel.next_frame(6.2) == (1, 3)
    carousel.on_want("n", missing, (7, 2), 1, 11.3)
    assert carousel.next_frame(11.3) is None, "five silent seconds are not enough any more"
    carousel.on_want("n", missing, (7, 2), 1, 16.4)
    assert carousel.next_frame(16.4) == (2, 4), "ten are; the pass goes on where it was"


def test_frame_that_a_gap_in_seen_shows_lost_is_repeated_and_no_other() -> None:
    carousel = Carousel(6, 1, epoch=7)
    missing = Bitmap.full(6)
    missing.clear(0)
    carousel.on_want("n", missing, (0, 0), 16, 0.0)
    while carousel.next_frame(1.0):
        pass
    only_three = Bitmap(6)
    for frame in (3, 5):
        only_three.set(frame)
    carousel.on_want("n", only_three, (7, 4), 16, 1.1)  # seq 3 carried frame 3; frame 5 is still on its way
    assert carousel.next_frame(1.1) == (3, 6)
    assert carousel.next_frame(1.2) is None


def test_depot_stays_within_the_credit_of_the_reader_it_serves() -> None:
    carousel = Carousel(100, 1, epoch=7)
    missing = Bitmap.full(100)
    missing.clear(0)
    carousel.on_want("fast", missing, (0, 0), 8, 0.0)
    carousel.on_want("slow", missing, (0, 0), 4, 0.0)
    sent = 0
    while carousel.next_frame(1.0):
        sent += 1
    assert sent == 8
    for frame in range(1, 9):
        missing.clear(frame)
    carousel.on_want("fast", missing, (7, 6), 8, 1.1)
    while carousel.next_frame(1.2):
        sent += 1
    assert sent == 14, "six more: two are still on their way"


def test_node_that_goes_offline_or_silent_is_sent_nothing_more() -> None:
    for silence in (True, False):
        carousel = Carousel(10, 1, epoch=7)
        carousel.on_want("n", Bitmap.full(10), (0, 0), 4, 0.0)
        assert carousel.next_frame(0.0)
        if silence:
            assert carousel.next_frame(WANT_VOID_S + 0.1) is None
        else:
            carousel.drop("n")
            assert carousel.next_frame(0.2) is None
        assert carousel.readers == 0


def test_reader_that_begins_a_new_session_gets_what_was_on_its_way_at_once() -> None:
    carousel = Carousel(6, 1, epoch=7)
    missing = Bitmap.full(6)
    missing.clear(0)
    carousel.on_want("n", missing, (0, 0), 16, 0.0)
    while carousel.next_frame(1.0):
        pass
    missing.clear(1)
    carousel.on_want("n", missing, (7, 1), 16, 1.1)
    assert carousel.next_frame(1.1) is None, "all is on its way"
    carousel.on_want("n", missing, (0, 0), 16, 1.2)
    sent = [carousel.next_frame(1.3) for _ in range(4)]
    assert sorted(found[0] for found in sent if found) == [2, 3, 4, 5]


def test_pass_waits_while_readers_keep_coming_but_not_for_ever() -> None:
    carousel = Carousel(6, 1, epoch=7)
    missing = Bitmap.full(6)
    missing.clear(0)
    now_s = 0.0
    while now_s < GATHER_MOST_S:
        carousel.on_want(f"n{now_s}", missing, (0, 0), 16, now_s)
        assert carousel.next_frame(now_s) is None
        now_s += 0.8 * GATHER_S
    assert carousel.next_frame(GATHER_MOST_S) == (1, 1)


def test_pass_waits_for_those_who_just_came_for_the_index() -> None:
    carousel = Carousel(6, 1, epoch=7)
    index, data = Bitmap(6), Bitmap.full(6)
    index.set(0)
    data.clear(0)
    carousel.company = 2
    carousel.on_want("first", data, (0, 0), 16, 0.0)
    carousel.on_want("second", index, (0, 0), 16, 0.8 * GATHER_S)
    assert carousel.next_frame(0.8 * GATHER_S) == (0, 1)
    assert carousel.next_frame(1.7 * GATHER_S) is None
    carousel.on_want("second", data, (7, 1), 16, 1.7 * GATHER_S)
    assert carousel.next_frame(1.7 * GATHER_S) == (1, 2), "both are here"


def test_index_is_repeated_once_for_all_who_came_since_it_was_sent() -> None:
    carousel = Carousel(6, 1, epoch=7)
    index = Bitmap(6)
    index.set(0)
    carousel.on_want("first", index, (0, 0), 16, 0.0)
    assert carousel.next_frame(0.0) == (0, 1)
    for number in range(3):
        carousel.on_want(f"later-{number}", index, (0, 0), 16, 0.01 * number)
        assert carousel.next_frame(0.01 * number) is None
    assert carousel.next_frame(GATHER_S) == (0, 2)
    assert carousel.next_frame(3 * GATHER_S) is None


def test_node_that_another_depot_serves_is_left_to_it_until_it_hears_nothing() -> None:
    carousel = Carousel(6, 1, epoch=7)
    carousel.on_want("n", Bitmap.full(6), (8, 5), 16, 0.0)
    assert carousel.readers == 0
    carousel.on_want("n", Bitmap.full(6), (0, 0), 16, 0.0)
    assert carousel.next_frame(0.0) == (0, 1)
    carousel.on_want("n", Bitmap.full(6), (8, 6), 16, 0.1)
    assert carousel.readers == 0


def test_pass_begins_at_once_when_every_node_that_is_online_is_here() -> None:
    carousel = Carousel(6, 1, epoch=7)
    missing = Bitmap.full(6)
    missing.clear(0)
    carousel.company = 2
    carousel.on_want("a", missing, (0, 0), 16, 0.0)
    assert carousel.next_frame(0.01) is None, "one of two may still come"
    carousel.on_want("b", missing, (0, 0), 16, 0.02)
    assert carousel.next_frame(0.02) == (1, 1)


def test_reader_that_has_seen_the_future_gains_nothing() -> None:
    carousel = Carousel(50, 1, epoch=7)
    carousel.on_want("n", Bitmap.full(50), (0, 0), 4, 0.0)
    for moment in range(1, 4):
        while carousel.next_frame(float(moment)):
            pass
        carousel.on_want("n", Bitmap.full(50), (7, 1 << 62), 4, float(moment))
    assert carousel.seq == 12, "four frames of credit for each of three wants"


def test_greedy_node_that_never_has_enough_is_cut_off_and_others_are_served() -> None:
    carousel = Carousel(20, 1, epoch=7)
    sent, now_s = 0, 0.0
    for _ in range(1000):
        now_s += 0.2
        carousel.on_want("greedy", Bitmap.full(20), (7, 1 << 62), 4096, now_s)
        while carousel.next_frame(now_s):
            sent += 1
    assert sent == BUDGET_PASSES * 20 + BUDGET_SPARE_FRAMES
    assert carousel.over_budget > 0
    carousel.on_want("honest", Bitmap.full(20), (0, 0), 4096, now_s)
    frames = []
    while found := carousel.next_frame(now_s + 1):
        frames.append(found[0])
    assert sorted(frames) == list(range(20))


def test_index_goes_before_the_pass_of_others() -> None:
    carousel = Carousel(50, 2, epoch=7)
    data = Bitmap.full(50)
    data.clear(0)
    data.clear(1)
    carousel.on_want("a", data, (0, 0), 64, 0.0)
    for _ in range(10):
        assert carousel.next_frame(1.0)
    index = Bitmap(50)
    index.set(0)
    index.set(1)
    carousel.on_want("b", index, (0, 0), 64, 1.0)
    assert [carousel.next_frame(1.0), carousel.next_frame(1.0)] == [(0, 11), (1, 12)]
    assert carousel.next_frame(1.0) == (12, 13), "the pass goes on where it was"
