"""Texts that come in any mixture: each gets what it would have got alone, whatever shared its batch."""

import sys
from functools import cache
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1]))

from encoder_fixtures import HeldEncoder, ask_batcher, random_text, started

from forge.golden import embedding_error
from forge.quantise import Precision
from runtime.batcher import Limits
from runtime.model import Float

DIMENSIONS = 64
TOLERANCE = {Precision.FLOAT32: 1e-11, Precision.INT8: 1e-4, Precision.INT4: 1e-4}
"""1 - cosine to the embedding of the text alone. Kernels for other batches sum in another order (1e-14 was seen in
float32); with int8 activations the last bit of a sum may round an activation to the next step (1e-6 was seen)."""


@cache
def load(precision: Precision) -> HeldEncoder:
    return HeldEncoder(precision)


@cache
def alone(precision: Precision, length: int, seed: int) -> Float:
    return load(precision).encode([random_text(length, seed)])[0]


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(list(TOLERANCE)),
    st.sampled_from([1, 64, 256, 1024]),
    st.lists(st.lists(st.tuples(st.integers(1, 150), st.integers(0, 2)), min_size=1, max_size=5), max_size=8),
    st.sets(st.integers(0, 7)),
)
def test_any_mixture_of_texts_gets_what_each_gets_alone(
    precision: Precision, batch_tokens: int, requests: list[list[tuple[int, int]]], cancelled: set[int]
) -> None:
    encoder = load(precision)
    encoder.close = lambda: None  # type: ignore[method-assign]  # the next example uses it, too
    batcher = started(Limits(150, batch_tokens, 10, 1 << 16), encoder)
    try:
        asked = [ask_batcher(batcher, [random_text(*text) for text in request]) for request in requests]
        for number in cancelled & set(range(len(asked))):
            batcher.cancel(asked[number].encoding)
        for number, (request, one) in enumerate(zip(requests, asked, strict=True)):
            if number in cancelled:
                continue
            rows = one.wait()
            assert rows.shape == (len(request), DIMENSIONS)
            for text, row in zip(request, rows, strict=True):
                assert embedding_error(alone(precision, *text), row) < TOLERANCE[precision]
    finally:
        batcher.close()
    assert batcher.open == 0
