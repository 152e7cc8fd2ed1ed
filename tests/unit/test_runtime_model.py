"""Ways to run one model: prompts read by a session of their own on the same slab, and the other attention."""

import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from runtime_fixtures import base_version

from runtime.model import PREFILL_TOKENS, Model
from runtime.session import NO_FLASH_VARIABLE
from runtime.slab import Shape
from runtime.ways import FLOAT_ACTIVATIONS
from wire.serving import ExecutionOptions

TOLERANCE = 0.05
"""RMS difference of logits between kernels as a share of their deviation; measured 0.004 to 0.01."""

only_x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="only x86 has other kernels for prompts")


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    version = base_version()
    options = ExecutionOptions(threads=1, reading_config=FLOAT_ACTIVATIONS)
    loaded = Model(version.directory, version.document.config, Shape(2, 512), options)
    yield loaded
    loaded.close()


def prompt(count: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(count).integers(3, 4000, count)]


def error(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(one - other))) / other.std())


@only_x86
def test_both_sessions_read_a_chunk_alike_but_not_with_the_same_kernels(model: Model) -> None:
    tokens = prompt(PREFILL_TOKENS)
    wide = model.prefill(0, tokens, 0, wide=True).copy()
    narrow = model.prefill(0, tokens, 0, wide=False).copy()
    assert 0 < error(wide, narrow) < TOLERANCE


@only_x86
@pytest.mark.parametrize("long", [32, 12])
def test_the_length_of_a_chunk_chooses_its_session(long: int) -> None:
    version = base_version()
    options = ExecutionOptions(threads=1, reading_config=FLOAT_ACTIVATIONS, reading_tokens=long)
    model = Model(version.directory, version.document.config, Shape(1, 512), options)
    for count, wide in ((long - 1, False), (long, True)):
        told, other = (model.prefill(0, prompt(count), 0, wide=so).copy() for so in (wide, not wide))
        assert np.array_equal(model.prefill(0, prompt(count), 0), told)
        assert not np.array_equal(told, other)
    model.close()


@only_x86
def test_decoding_goes_on_from_what_the_other_session_read(model: Model) -> None:
    tokens = prompt(64)
    model.prefill(0, tokens, 0, wide=True)
    after_wide = model.decode([7], [64])[0].copy()
    model.prefill(0, tokens, 0, wide=False)
    assert error(after_wide, model.decode([7], [64])[0]) < TOLERANCE


def test_attention_is_chosen_for_each_model_by_itself() -> None:
    version = base_version()
    read = []
    for flash in (True, False, True):
        options = ExecutionOptions(threads=1, flash_attention=flash)
        model = Model(version.directory, version.document.config, Shape(1, 512), options)
        assert NO_FLASH_VARIABLE not in os.environ
        read.append(model.prefill(0, prompt(PREFILL_TOKENS), 0).copy())
        model.close()
    assert np.array_equal(read[0], read[2])
    assert 0 < error(read[0], read[1]) < TOLERANCE
