"""Which texts share a batch, and whose turn it is: the queue of an encoder without its thread."""

from collections.abc import Sequence

import pytest

from runtime.buckets import PADDING_PAIRS, Buckets, Waiting, bucket_of


def queue(limit: int = 256, **requests: Sequence[int]) -> Buckets[str]:
    """A queue with requests by name, in this order, of texts with these lengths."""
    buckets: Buckets[str] = Buckets(limit)
    for name, lengths in requests.items():
        add(buckets, name, lengths)
    return buckets


def add(buckets: Buckets[str], name: str, lengths: Sequence[int]) -> None:
    buckets.add(Waiting([7] * length, name, row) for row, length in enumerate(lengths))


def batch_of(buckets: Buckets[str]) -> list[tuple[str, int]]:
    """Request and length of each text of the next batch."""
    return [(text.owner, len(text.tokens)) for text in buckets.next()]


def drain(buckets: Buckets[str]) -> list[list[tuple[str, int]]]:
    batches = []
    while buckets:
        batches.append(batch_of(buckets))
    assert buckets.tokens == 0
    return batches


@pytest.mark.parametrize(
    ("length", "bucket"), [(1, 0), (64, 0), (65, 1), (90, 1), (91, 2), (128, 3), (129, 4), (256, 15), (512, 63)]
)
def test_buckets_are_as_wide_as_padding_may_cost(length: int, bucket: int) -> None:
    assert bucket_of(length) == bucket


def test_short_texts_of_any_length_share_a_batch() -> None:
    assert drain(queue(a=[3], b=[64], c=[17])) == [[("a", 3), ("b", 64), ("c", 17)]]


def test_long_text_is_not_padded_to_by_short_ones() -> None:
    assert drain(queue(a=[200], b=[10], c=[195], d=[12])) == [
        [("a", 200)], [("b", 10), ("d", 12)], [("c", 195)],
    ]  # fmt: skip
    assert drain(queue(512, a=[200], b=[10], c=[195], d=[12])) == [
        [("a", 200), ("c", 195)], [("b", 10), ("d", 12)],
    ]  # fmt: skip


def test_texts_on_both_sides_of_a_border_share_a_batch_when_padding_allows_it() -> None:
    assert bucket_of(64) != bucket_of(65)
    assert drain(queue(a=[64], b=[65])) == [[("a", 64), ("b", 65)]]
    assert drain(queue(a=[65], b=[64])) == [[("a", 65), ("b", 64)]]
    assert PADDING_PAIRS < 90**2 - 20**2
    assert drain(queue(a=[20], b=[90])) == [[("a", 20)], [("b", 90)]]


def test_batch_holds_no_more_tokens_than_its_bound_but_a_longer_text_runs_alone() -> None:
    assert drain(queue(100, a=[40], b=[50], c=[30])) == [[("a", 40), ("b", 50)], [("c", 30)]]
    assert drain(queue(100, a=[150], b=[30])) == [[("a", 150)], [("b", 30)]]


def test_first_of_a_batch_is_whose_turn_it_is() -> None:
    batches = drain(queue(a=[100], b=[10], c=[101], d=[11], e=[300]))
    assert [batch[0][0] for batch in batches] == ["a", "b", "e"]


def test_request_of_one_text_does_not_wait_for_the_thousand_of_another() -> None:
    buckets = queue(64, bulk=[32] * 1000)
    batch_of(buckets)
    add(buckets, "single", [32])
    assert ("single", 32) in batch_of(buckets)


def test_two_large_requests_share_the_work_evenly() -> None:
    buckets = queue(64, first=[16] * 200, second=[16] * 200)
    early = [name for _ in range(20) for name, _ in batch_of(buckets)]
    assert abs(early.count("first") - early.count("second")) <= 4


def test_long_text_has_its_turn_although_short_ones_never_cease() -> None:
    buckets = queue(64, bulk=[10, 300])
    for number in range(200):
        add(buckets, f"short {number}", [10])
        add(buckets, f"other {number}", [10])
        if any(length == 300 for _, length in batch_of(buckets)):
            return
    pytest.fail("the long text starved")


def test_last_text_of_a_large_request_has_its_turn_although_new_requests_never_cease() -> None:
    """Each round brings as much as it serves, so that the queue never becomes shorter."""
    buckets = queue(64, bulk=[64] * 5)
    left = 5
    for number in range(500):
        add(buckets, f"new {number}", [64])
        left -= sum(name == "bulk" for name, _ in batch_of(buckets))
        if not left:
            return
    pytest.fail("the large request starved")


def test_removed_request_is_forgotten_and_others_stay() -> None:
    buckets = queue(a=[10, 100, 200], b=[10, 100])
    buckets.remove("a")
    buckets.remove("nobody")
    assert buckets.tokens == 110
    assert drain(buckets) == [[("b", 10)], [("b", 100)]]
    assert not buckets
