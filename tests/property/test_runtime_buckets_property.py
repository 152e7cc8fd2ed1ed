"""Any history of an encoder's queue: every text leaves once, batches keep their bounds, and nobody starves."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.buckets import PADDING_PAIRS, Buckets, Waiting

OPEN_LIMIT = 6
LONGEST = 512

Request = list[int]
requests = st.lists(st.integers(1, LONGEST), min_size=1, max_size=12)
history = st.lists(st.one_of(requests, st.just("serve"), st.integers(0, 20)), max_size=60)
"""A request arrives, a batch is served, or a request leaves."""


@given(history, st.sampled_from([1, 64, 256, 2048]))
def test_every_text_leaves_once_and_batches_keep_their_bounds(events: list[Request | str | int], limit: int) -> None:
    buckets: Buckets[int] = Buckets(limit)
    waiting: Counter[tuple[int, int]] = Counter()
    lengths: dict[tuple[int, int], int] = {}

    def serve() -> None:
        batch = buckets.next()
        sizes = [len(text.tokens) for text in batch]
        assert len(batch) == 1 or sum(sizes) <= limit
        assert max(sizes) ** 2 - min(sizes) ** 2 <= PADDING_PAIRS
        for text in batch:
            assert waiting.pop((text.owner, text.row)) == 1
        assert buckets.tokens == sum(lengths[key] for key in waiting)

    for owner, event in enumerate(events):
        if isinstance(event, list):
            buckets.add(Waiting([0] * length, owner, row) for row, length in enumerate(event))
            waiting.update((owner, row) for row in range(len(event)))
            lengths |= {(owner, row): length for row, length in enumerate(event)}
        elif isinstance(event, int):
            buckets.remove(event)
            waiting = Counter({key: 1 for key in waiting if key[0] != event})
        elif buckets:
            serve()
        assert bool(buckets) == bool(waiting)
    while buckets:
        serve()
    assert not waiting


@settings(deadline=None)
@given(st.lists(requests, min_size=1, max_size=OPEN_LIMIT), st.integers(0, OPEN_LIMIT - 1), requests)
def test_no_text_waits_longer_than_its_share_of_the_work(
    others: list[Request], chosen: int, newcomers: Request
) -> None:
    """However many requests come later: a text is run when each of the open ones, OPEN_LIMIT at most, can have had as
    many tokens as stand before it in its own, and two texts more."""
    limit = 256
    buckets: Buckets[int] = Buckets(limit)
    for owner, lengths in enumerate(others):
        buckets.add(Waiting([0] * length, owner, row) for row, length in enumerate(lengths))
    owner = chosen % len(others)
    pending = {number: len(lengths) for number, lengths in enumerate(others)}
    number = served = 0
    while owner in pending:
        while len(pending) < OPEN_LIMIT:
            number += 1
            buckets.add([Waiting([0] * newcomers[number % len(newcomers)], number + OPEN_LIMIT, 0)])
            pending[number + OPEN_LIMIT] = 1
        assert served <= OPEN_LIMIT * (sum(others[owner]) + 2 * LONGEST), "starved"
        batch = buckets.next()
        for text in batch:
            pending[text.owner] -= 1
            if not pending[text.owner]:
                del pending[text.owner]
            if text.owner == owner:
                assert served <= OPEN_LIMIT * (sum(others[owner][: text.row]) + 2 * LONGEST)
        served += sum(len(text.tokens) for text in batch)
