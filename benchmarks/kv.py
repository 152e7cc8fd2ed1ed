"""Keys and values: what an int8 cache saves and costs beside float32, and what memory slots take.

Speed is of the 135 M shape, both models as their probes choose, in this process and in turns; quality is of the sample
LM on its own windows.
"""

import re
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.decoder_models import ROOT, sample, smollm
from benchmarks.decoders import probed_options
from benchmarks.harness import Row, Subject, at_least, at_most, exact, measure, row, rows_against
from forge.cache_scales import Int8Cache
from forge.evaluate import evaluate_version
from runtime.cpu import allowed_threads
from runtime.model import PREFILL_TOKENS, Model
from runtime.slab import Shape, Slab, token_bytes

INT8, FLOAT = "int8", "float32 cache"
CAPACITY, STREAMS, STEPS = 2304, 8, 8
LENGTHS = (100, 500, 1000, 2000)
WINDOWS = ROOT / "samples" / "eval" / "tales-5m-base.json"
FEW_TOKENS, SLOTS, CONTEXT = 100, 4, 4096


def run() -> Sequence[Row]:
    """Rows of speed, quality and memory."""
    return [*_speed(), *_quality(), *_memory()]


def _speed() -> list[Row]:
    decoders = {INT8: smollm(Int8Cache()), FLOAT: smollm()}
    threads, shape = allowed_threads(), Shape(STREAMS, CAPACITY)
    models = {n: Model(d.directory, d.config, shape, probed_options(d, threads)) for n, d in decoders.items()}
    for model in models.values():
        for start in range(0, LENGTHS[-1], PREFILL_TOKENS):
            model.prefill(0, [token % 4000 + 3 for token in range(start, start + PREFILL_TOKENS)], start)
        for slot in range(1, STREAMS):
            model.slab.move(0, slot, LENGTHS[-1])
    name = f"smollm-135m, {threads} threads"
    sizes = {n: token_bytes(d.config) for n, d in decoders.items()}
    rows = [row(f"{name}: bytes of a token", "B", exact(sizes[INT8]), None, (FLOAT, exact(sizes[FLOAT])))]
    for streams, length in [*((1, length) for length in LENGTHS), (STREAMS, LENGTHS[0]), (STREAMS, LENGTHS[-1])]:
        found = measure({n: _decoding(model, streams, length) for n, model in models.items()})
        target = at_most(1.0, ratio=True) if length >= LENGTHS[1] else None
        rows += rows_against(f"{name}: step of {streams} after {length} tokens", "ms", INT8, found, target)
    for length in (0, LENGTHS[-1]):
        found = measure({n: _reading(model, length) for n, model in models.items()})
        rows += rows_against(f"{name}: {PREFILL_TOKENS} tokens read after {length}", "ms", INT8, found)
    for model in models.values():
        model.close()
    return rows


def _decoding(model: Model, streams: int, length: int) -> Subject:
    def subject() -> float:
        began_s = time.perf_counter()
        for step in range(STEPS):
            model.decode([5] * streams, [length + step] * streams)
        return (time.perf_counter() - began_s) * 1e3 / STEPS

    return subject


def _reading(model: Model, length: int) -> Subject:
    def subject() -> float:
        began_s = time.perf_counter()
        model.prefill(0, [7] * PREFILL_TOKENS, length)
        return (time.perf_counter() - began_s) * 1e3

    return subject


def _quality() -> list[Row]:
    figures = evaluate_version(sample(Int8Cache()).directory, WINDOWS, 16)
    name = f"tales-5m, {figures['tokens']} tokens"
    theirs = (FLOAT, exact(figures["perplexity_float_cache"]))
    return [
        row(f"{name}: perplexity", "", exact(figures["perplexity"]), at_most(1.005, ratio=True), theirs),
        row(f"{name}: KL to {FLOAT}", "nats", exact(figures["kl_nats_of_cache"]), at_most(0.001)),
        row(f"{name}: same best token", "", exact(figures["top1_agreement_of_cache"]), at_least(0.98)),
    ]  # fmt: skip


def _memory() -> list[Row]:
    """What a few tokens in every slot commit, beside a slab as numpy makes it, and how long giving back takes."""
    config = smollm().config
    slab = Slab(config, Shape(SLOTS, CONTEXT))
    ours = _committed(slab.parts(0, SLOTS))
    shape = (2 * config.layers, SLOTS, config.kv_heads, CONTEXT, config.head_size)
    theirs = _committed(list(np.zeros(shape, np.float32)))
    for part in slab.parts(0, 1):
        part[:] = 1
    slab.free(0, CONTEXT)
    began_s = time.perf_counter()
    slab.trim()
    trim_ms = (time.perf_counter() - began_s) * 1e3
    metric = f"{FEW_TOKENS} tokens in each of {SLOTS} slots of {CONTEXT} commit"
    return [
        row(metric, "MiB", exact(ours), at_most(1.0, ratio=True), ("numpy.zeros", exact(theirs))),
        row(f"a full slot of {CONTEXT} given back", "ms", exact(trim_ms)),
    ]


def _committed(parts: list[np.ndarray[tuple[int, ...], np.dtype[np.float32]]]) -> float:
    before = _anonymous_bytes()
    for part in parts:
        part[:, :, :FEW_TOKENS] = 1
    return (_anonymous_bytes() - before) / (1 << 20)


def _anonymous_bytes() -> int:
    found = re.search(r"^Anonymous:\s+(\d+) kB", Path("/proc/self/smaps_rollup").read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0
