"""One stream: tokens per second of decoding and of reading a prompt, beside llama.cpp and onnxruntime-genai.

Every decoder is a process of its own with the same weights (int4 in blocks of 32, the tied head too; ours in longer
blocks, besides) and the same number of threads, and works while the others wait. A step cannot be faster than memory
gives all weights once.
"""

import time
from collections.abc import Sequence

import numpy as np

from benchmarks.decoders import LONG_BLOCKS, MODELS, Child
from benchmarks.harness import PeerAbsent, Row, Samples, Subject, at_least, exact, measure, row, rows_against
from runtime.cpu import allowed_threads

PROMPT_TOKENS, DECODED_TOKENS = 256, 96
SHORT_TOKENS, LONG_TOKENS = 32, 896
"""What decoding goes on from: the second is nearly all that the sample's context holds."""
ROUNDS = 7
PEERS = {"llama.cpp": "llama", "llama.cpp, no flash attention": "llama-whole", "onnxruntime-genai": "genai"}
TARGETS = {"llama.cpp": 1.15, "llama.cpp, no flash attention": 1.15, "onnxruntime-genai": 1.05}
PREFILL_TARGET = 1.2


def run() -> Sequence[Row]:
    """Rows for both models, and for both in long blocks."""
    threads = allowed_threads(0)
    pairs = [*((model, model) for model in MODELS), *zip(LONG_BLOCKS, MODELS, strict=True)]
    return [entry for model, theirs in pairs for entry in _rows(model, theirs, threads)]


def _rows(model: str, theirs: str, threads: int) -> list[Row]:
    """Ours of `model` beside peers of `theirs`."""
    children: dict[str, Child | PeerAbsent] = {
        "ours": _start("ours", model, threads), **{name: _start(kind, theirs, threads) for name, kind in PEERS.items()}
    }  # fmt: skip
    try:
        reading = measure({name: _reading(child) for name, child in children.items()}, ROUNDS)
        decoded = {
            length: measure({name: decoding(child, length) for name, child in children.items()}, ROUNDS)
            for length in (SHORT_TOKENS, LONG_TOKENS)
        }
    finally:
        for child in children.values():
            if isinstance(child, Child):
                child.close()
    rows = []
    for length, found in decoded.items():
        metric = f"{model}: decode after {length}, {threads} threads"
        for name, bound in TARGETS.items():
            pair = {"ours": found["ours"], name: found[name]}
            rows += rows_against(metric, "tok/s", "ours", pair, at_least(bound, ratio=True))
    rows += rows_against(
        f"{model}: prefill of {PROMPT_TOKENS}", "tok/s", "ours", reading, at_least(PREFILL_TARGET, ratio=True)
    )
    ours = decoded[SHORT_TOKENS]["ours"]
    assert ours is not None
    return [*rows, _limit(model, ours)]


def _start(kind: str, model: str, threads: int) -> Child | PeerAbsent:
    try:
        return Child(kind, model, threads)
    except PeerAbsent as absence:
        if kind == "ours":
            raise
        return absence


def _reading(child: Child | PeerAbsent) -> Subject:
    seeds = iter(range(0, 1 << 30, 13))

    def subject() -> float:
        if isinstance(child, PeerAbsent):
            raise child
        return PROMPT_TOKENS / child.seconds(prefill=PROMPT_TOKENS, seed=next(seeds))

    return subject


def decoding(child: Child | PeerAbsent, length: int = SHORT_TOKENS) -> Subject:
    """Tokens per second of a decoder that is warm, after a prompt of `length` tokens."""

    def subject() -> float:
        if isinstance(child, PeerAbsent):
            raise child
        child.seconds(prefill=length)
        child.seconds(decode=4)  # threads awake, caches warm
        return DECODED_TOKENS / child.seconds(decode=DECODED_TOKENS)

    return subject


def _limit(model: str, ours: Samples) -> Row:
    """The share of the memory's speed that our decoding reaches: weights read per second over a plain read's."""
    version = (MODELS | LONG_BLOCKS)[model]().version
    weights = next(entry.size_bytes for entry in version.files if entry.path.endswith(".bin"))
    memory = np.ones(max(weights, 1 << 26) // 8, np.int64)
    spans = []
    for _ in range(5):
        began_s = time.perf_counter()
        memory.max()
        spans.append(time.perf_counter() - began_s)
    speed = memory.nbytes / min(spans)
    share = ours.median * weights / speed
    return row(f"{model}: decode, share of one core's memory speed ({speed / 1e9:.1f} GB/s)", "", exact(share))
