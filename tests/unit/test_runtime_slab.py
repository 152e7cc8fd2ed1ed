"""Memory of slots on the real machine: what is committed, what is given back, and what is promised."""

import mmap
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.slab import Shape, Slab, Usage
from wire.errors import Code, DeployError
from wire.manifest import DecoderConfig

LAYERS, HEADS, SIZE = 4, 2, 64
CONFIG = DecoderConfig(
    layers=LAYERS, hidden_size=128, kv_heads=HEADS, head_size=SIZE, vocab_size=16, context_tokens=8192
)
TOKEN = 2 * LAYERS * HEADS * SIZE * 4
PAGE_TOKENS = mmap.PAGESIZE // (SIZE * 4)
NOISE_BYTES = 2 << 20


def anonymous_bytes() -> int:
    found = re.search(r"^Anonymous:\s+(\d+) kB", Path("/proc/self/smaps_rollup").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def fill(slab: Slab, slot: int, length: int, value: float) -> None:
    for part in slab.parts(slot, 1):
        part[0, :, :length] = value


def held(slab: Slab, slot: int, length: int) -> set[float]:
    return {float(value) for part in slab.parts(slot, 1) for value in np.unique(part[0, :, :length])}


def test_slots_cost_what_is_in_them_and_nothing_once_they_are_trimmed() -> None:
    tokens = 4096
    slab = Slab(CONFIG, Shape(8, tokens))
    before = anonymous_bytes()
    for slot in range(8):
        assert slab.reserve(slot, tokens)
        fill(slab, slot, 16, 1.0)  # huge pages would commit 2 MiB per head and part
    assert anonymous_bytes() - before < 8 * 16 * TOKEN + NOISE_BYTES
    fill(slab, 3, tokens, 1.0)
    assert anonymous_bytes() - before > tokens * TOKEN
    for slot in range(8):
        slab.free(slot, tokens if slot == 3 else 16)
    assert anonymous_bytes() - before > tokens * TOKEN, "memory goes before anybody needs it"
    slab.trim()
    assert anonymous_bytes() - before < NOISE_BYTES


def test_memory_of_a_free_slot_is_taken_for_another_when_the_budget_needs_it() -> None:
    slab = Slab(CONFIG, Shape(4, 2048, tokens=3000))
    assert slab.reserve(0, 2000)
    fill(slab, 0, 2000, 1.0)
    before = anonymous_bytes()
    slab.free(0, 2000)
    assert slab.reserve(1, 2000)
    assert before - anonymous_bytes() > 2000 * TOKEN - NOISE_BYTES
    assert not slab.reserve(0, 2000), "both together are over the budget"
    assert slab.reserve(0, 900)


def test_shorter_request_keeps_its_part_of_a_slot_when_the_rest_is_given_back() -> None:
    slab = Slab(CONFIG, Shape(2, 2048, tokens=2048))
    assert slab.reserve(0, 2000)
    fill(slab, 0, 2000, 1.0)
    slab.free(0, 2000)
    assert slab.reserve(0, 100)
    fill(slab, 0, 100, 2.0)
    assert slab.reserve(1, 1900)
    assert held(slab, 0, 100) == {2.0}
    last_page = -(-100 // PAGE_TOKENS) * PAGE_TOKENS
    assert not any(part[0, :, last_page:].any() for part in slab.parts(0, 1))


def test_moved_request_takes_its_tokens_and_its_reservation_along() -> None:
    slab = Slab(CONFIG, Shape(3, 1024, tokens=1024))
    assert slab.reserve(1, 800)
    fill(slab, 1, 300, 5.0)
    slab.move(1, 0, 300)
    assert held(slab, 0, 300) == {5.0}
    assert not slab.reserve(1, 512), "800 of 1024 are reserved in slot 0 now"
    slab.free(0, 300)
    assert slab.reserve(1, 1024)


def test_usage_tells_budget_holdings_and_what_may_still_come() -> None:
    slab = Slab(CONFIG, Shape(2, 1024, kept_blocks=10, tokens=1024))
    budget = (1024 + 160) * TOKEN
    assert slab.usage == Usage(budget, 0, budget)
    assert slab.reserve(0, 512)
    assert slab.usage == Usage(budget, 512 * TOKEN, budget)
    slab.free(0, 512)
    slab.keep(0, 0, 0)
    assert slab.usage == Usage(budget, (512 + 16) * TOKEN, (512 + 144) * TOKEN)
    slab.trim()
    assert slab.usage + Usage(1, 2, 3) == Usage(budget + 1, 16 * TOKEN + 2, (1024 + 144) * TOKEN + 3)


def test_head_that_divides_no_page_keeps_its_neighbours_apart() -> None:
    config = CONFIG.model_copy(update={"head_size": 80})
    slab = Slab(config, Shape(2, 1000))
    for slot in range(2):
        assert slab.reserve(slot, 1000)
        fill(slab, slot, 1000, slot + 1.0)
    slab.free(0, 1000)
    assert slab.reserve(0, 10)
    slab.trim()
    assert held(slab, 1, 1000) == {2.0}
    assert held(slab, 0, 10) == {1.0}


def test_address_space_that_the_machine_refuses_is_a_typed_error() -> None:
    with pytest.raises(DeployError, match="max_slots") as refusal:
        Slab(CONFIG, Shape(64, 1 << 36))
    assert refusal.value.code is Code.LOAD_FAILED


operations = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 512), st.booleans()), max_size=30)


@settings(max_examples=60, deadline=None)
@given(st.integers(512, 2048), operations)
def test_whatever_comes_and_goes_all_that_is_held_is_within_the_budget_and_intact(
    tokens: int, steps: list[tuple[int, int, bool]]
) -> None:
    """As the engine does it: requests join after the last one, whoever leaves is replaced by the last."""
    slab = Slab(CONFIG, Shape(4, 512, tokens=tokens))
    limit = -(-tokens // PAGE_TOKENS)
    running: list[tuple[int, float]] = []
    for number, (which, room, joins) in enumerate(steps):
        if joins and len(running) < 4:
            if slab.reserve(len(running), room):
                running.append((room, number + 1.0))
                fill(slab, len(running) - 1, room, number + 1.0)
            else:
                assert running, "alone it must fit"
                promised = sum(-(-other // PAGE_TOKENS) for other, _ in running)
                assert promised + -(-room // PAGE_TOKENS) > limit, "there was room"
        elif running:
            gap = which % len(running)
            slab.free(gap, running[gap][0])
            last = running.pop()
            if gap < len(running):
                slab.move(len(running), gap, last[0])
                running[gap] = last
        assert slab._held() <= limit
        for slot, (length, value) in enumerate(running):
            assert held(slab, slot, length) == {value}
