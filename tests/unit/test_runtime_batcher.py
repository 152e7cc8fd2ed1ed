"""The batcher over the real tiny encoder: what shares a batch, what ends how, and what is refused."""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from encoder_fixtures import POISON, HeldEncoder, ask_batcher, encoder_config, encoder_version, random_text, started

from runtime.batcher import Batcher, Encoding, Limits
from runtime.encoder import Encoder
from wire.errors import Code, DeployError, InferenceError
from wire.manifest import EncoderConfig
from wire.serving import ExecutionOptions

LIMITS = Limits(text_tokens=150, batch_tokens=256, queue_requests=3, queue_tokens=2000)
TOLERANCE = 1e-6
"""Of numbers of at most 1, in float32: sums in the order of another batch's kernels."""


@pytest.fixture
def encoder() -> HeldEncoder:
    return HeldEncoder()


@pytest.fixture
def batcher(encoder: HeldEncoder) -> Iterator[Batcher]:
    batcher = started(LIMITS, encoder)
    yield batcher
    encoder.free()
    batcher.close()


def hold(batcher: Batcher, encoder: HeldEncoder) -> None:
    """Keep the batcher's thread before a batch of one text."""
    encoder.held = True
    ask_batcher(batcher, [random_text(2)])
    assert encoder.running.wait(20)


def test_what_comes_while_a_batch_runs_is_the_next_batch(batcher: Batcher, encoder: HeldEncoder) -> None:
    hold(batcher, encoder)
    asked = [ask_batcher(batcher, [random_text(5), random_text(100)]), ask_batcher(batcher, [random_text(40)])]
    encoder.free()
    for one in asked:
        one.wait()
    assert encoder.batches == [[2], [5, 40], [100]]
    for one in asked:
        for text, row in zip(one.encoding.texts, one.encoding.embeddings, strict=True):
            assert np.abs(row - encoder.encode([text])[0]).max() < TOLERANCE


def test_alone_text_runs_at_once(batcher: Batcher, encoder: HeldEncoder) -> None:
    ask_batcher(batcher, [random_text(9)]).wait()
    assert encoder.batches == [[9]]
    figures = batcher.stats.snapshot()
    assert (figures.requests, figures.prompt_tokens, figures.completion_tokens, figures.failures) == (1, 9, 0, 0)
    assert figures.tokens_per_s is not None
    assert figures.latency_p50_s is not None
    assert figures.first_token_p50_s is None


def test_free_session_waits_for_more_only_as_long_as_the_setting_allows(encoder: HeldEncoder) -> None:
    batcher = started(Limits(150, 20, 3, 2000, wait_s=30.0), encoder)
    try:
        first, second = ask_batcher(batcher, [random_text(5)]), ask_batcher(batcher, [random_text(15)])
        second.wait()
        first.wait()
        assert encoder.batches == [[5, 15]], "it began as soon as the batch was full"
    finally:
        batcher.close()
    patient = started(Limits(150, 20, 3, 2000, wait_s=0.01), HeldEncoder())
    ask_batcher(patient, [random_text(5)]).wait()
    patient.close()


def test_cancelled_request_is_not_run_and_leaves_at_once(batcher: Batcher, encoder: HeldEncoder) -> None:
    hold(batcher, encoder)
    gone, stays = ask_batcher(batcher, [random_text(7)] * 3), ask_batcher(batcher, [random_text(8)])
    batcher.cancel(gone.encoding)
    assert batcher.open == 2
    encoder.free()
    stays.wait()
    assert encoder.batches == [[2], [8]]
    assert not gone.ended.is_set()
    batcher.cancel(gone.encoding)


def test_request_cancelled_while_its_batch_runs_gets_no_event_and_the_others_do(
    batcher: Batcher, encoder: HeldEncoder
) -> None:
    hold(batcher, encoder)
    both = [ask_batcher(batcher, [random_text(7)]), ask_batcher(batcher, [random_text(8)])]
    encoder.running.clear()
    encoder.step()
    assert encoder.running.wait(20)
    assert encoder.batches == [[2], [7, 8]]
    batcher.cancel(both[0].encoding)
    encoder.free()
    both[1].wait()
    assert not both[0].ended.is_set()
    assert batcher.open == 0


def test_failed_batch_fails_its_requests_and_nothing_else(batcher: Batcher, encoder: HeldEncoder) -> None:
    hold(batcher, encoder)
    encoder.poison = POISON
    wrong = ask_batcher(batcher, [[POISON, 5], random_text(120), random_text(121)])
    beside, apart = ask_batcher(batcher, [[5, 6]]), ask_batcher(batcher, [random_text(100)])
    encoder.free()
    for one in (wrong, beside):
        assert (one.fault().code, one.fault().http_status) == (Code.INTERNAL, 500)
        assert "poisoned" not in one.fault().message
    apart.wait()
    assert [121] not in encoder.batches, "the failed request's other texts are not run"
    assert batcher.stats.snapshot().failures == 2
    ask_batcher(batcher, [random_text(3)]).wait()


def test_embedding_that_is_not_finite_fails_its_request_alone(
    batcher: Batcher, encoder: HeldEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold(batcher, encoder)
    right = Encoder.encode

    def spoil(self: Encoder, texts: list[list[int]]) -> np.ndarray:
        rows = right(self, texts)
        rows[[len(text) == 4 for text in texts], 0] = np.nan
        return rows

    monkeypatch.setattr(Encoder, "encode", spoil)
    wrong, fine = ask_batcher(batcher, [random_text(4)]), ask_batcher(batcher, [random_text(5)])
    encoder.free()
    assert wrong.fault().code is Code.INTERNAL
    assert np.isfinite(fine.wait()).all()


def test_request_beyond_the_queue_is_refused_with_a_time_to_come_back(batcher: Batcher, encoder: HeldEncoder) -> None:
    hold(batcher, encoder)
    waiting = [ask_batcher(batcher, [random_text(5)]) for _ in range(3)]
    with pytest.raises(InferenceError) as refusal:
        ask_batcher(batcher, [random_text(5)])
    assert (refusal.value.code, refusal.value.http_status) == (Code.OVERLOADED, 429)
    assert refusal.value.retry_after_s is not None
    assert refusal.value.retry_after_s >= 1
    encoder.free()
    for one in waiting:
        one.wait()
    ask_batcher(batcher, [random_text(5)]).wait()


def test_tokens_that_wait_are_bounded_too(batcher: Batcher, encoder: HeldEncoder) -> None:
    hold(batcher, encoder)
    large = ask_batcher(batcher, [random_text(100, seed) for seed in range(15)])
    with pytest.raises(InferenceError) as refusal:
        ask_batcher(batcher, [random_text(100, seed) for seed in range(6)])
    assert refusal.value.code is Code.OVERLOADED
    fits = ask_batcher(batcher, [random_text(100, seed) for seed in range(5)])
    encoder.free()
    large.wait()
    fits.wait()


@pytest.mark.parametrize(
    ("texts", "code"),
    [
        ([], Code.BAD_REQUEST),
        ([[5], []], Code.BAD_REQUEST),
        ([[384]], Code.BAD_REQUEST),
        ([[5, -1]], Code.BAD_REQUEST),
        ([[5] * 151], Code.CONTEXT_EXCEEDED),
        ([[5] * 100] * 21, Code.BAD_REQUEST),
    ],
)
def test_request_that_can_never_run_is_refused(batcher: Batcher, texts: list[list[int]], code: Code) -> None:
    with pytest.raises(InferenceError) as refusal:
        ask_batcher(batcher, texts)
    assert (refusal.value.code, refusal.value.http_status) == (code, 400)
    assert batcher.open == 0


def test_end_of_the_batcher_ends_what_is_open(encoder: HeldEncoder) -> None:
    batcher = started(Limits(150, 256, 3, 2000, wait_s=60.0), encoder)
    asked = ask_batcher(batcher, [random_text(5)])
    batcher.close()
    assert (asked.fault().code, asked.fault().http_status) == (Code.NOT_READY, 503)
    with pytest.raises(InferenceError) as refusal:
        batcher.submit(Encoding([[5]], lambda _error: None))
    assert refusal.value.code is Code.NOT_READY


def test_graph_of_other_dimensions_than_the_version_says_does_not_load() -> None:
    version = encoder_version()
    config = encoder_config(version)
    wrong = EncoderConfig(**{**config.model_dump(), "dimensions": config.dimensions + 1})
    with pytest.raises(DeployError, match="contract") as refusal:
        Encoder(version.directory, wrong, ExecutionOptions(threads=1)).warm_up()
    assert refusal.value.code is Code.LOAD_FAILED


def test_replicas_share_the_queue() -> None:
    one, other = HeldEncoder(), HeldEncoder()
    for encoder in (one, other):
        encoder.held = True
    batcher = started(Limits(150, 10, 3, 2000), one, other)
    asked = ask_batcher(batcher, [random_text(10, seed) for seed in range(6)])
    assert one.running.wait(20)
    assert other.running.wait(20), "the other replica slept although texts waited"
    for encoder in (one, other):
        encoder.free()
    rows = asked.wait()
    assert sorted([*one.batches, *other.batches]) == [[10]] * 6
    for text, row in zip(asked.encoding.texts, rows, strict=True):
        assert np.abs(row - one.encode([text])[0]).max() < TOLERANCE
    batcher.close()
