"""Memory of a loaded model and the time to load it: weights mapped from the prepack cache, on the heap, and llama.cpp.

Every subject is a process of its own with the same int4 weights. Anonymous memory is what its smaps_rollup says after
malloc_trim, less what it was before the load and less keys and values. A load ends after a step of each shape, and from
the cache holds the check of every byte. All files are in the page cache.
"""

import json
import os
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.children import OrderedChild
from benchmarks.decoder_models import Decoder, smollm
from benchmarks.harness import Row, Samples, Subject, at_least, at_most, exact, measure, row, rows_against
from benchmarks.memory_child import CACHE, entry_of
from benchmarks.runtime_server import MODEL, runtime_server
from host.unix_http import request
from runtime.cpu import allowed_threads
from wire.serving import ExecutionOptions

LLAMA, HEAP, CACHED = "llama.cpp", "on the heap", "from the cache"
HEAP_TWO, CACHED_TWO = f"{HEAP}, two sessions", f"{CACHED}, two sessions"
ROUNDS = 7
LOOK_S = 0.0005
"""Between two looks at a process that loads."""
READ_TOKENS, DECODED_TOKENS = 256, 48
IDLE_S, SETTLE_S = 10.0, 2.0
SLOWER_LIMIT = 0.97
"""Of the speed from the heap: rounds of the same subject differ by as much here."""


class Process(OrderedChild):
    """A child of benchmarks/memory_child.py."""

    def __init__(self, order: dict[str, Any]) -> None:
        super().__init__("benchmarks.memory_child", [json.dumps(order)], order["threads"])

    def load(self) -> dict[str, Any]:
        """Load; the answer has "peak", the most anonymous memory that was seen meanwhile beyond that before."""
        peak, over = 0, threading.Event()

        def look() -> None:
            nonlocal peak
            while not over.wait(LOOK_S):
                peak = max(peak, _anonymous_bytes(self.process.pid))

        watcher = threading.Thread(target=look)
        watcher.start()
        try:
            answer = self.ask(load=1)
        finally:
            over.set()
            watcher.join()
        return answer | {"peak": peak - self.greeting["Anonymous"]}


def run() -> Sequence[Row]:
    """Rows for SmolLM2-135M's shape."""
    decoder, threads = smollm(), allowed_threads(0)
    weights = next(entry.size_bytes for entry in decoder.version.files if entry.path == "weights.bin")
    orders = _orders(decoder, threads)
    return [
        *_load_rows(orders, weights), *_second_process_rows(orders, weights), *_speed_rows(orders),
        _idle_row(decoder, threads),
    ]  # fmt: skip


def _orders(decoder: Decoder, threads: int) -> dict[str, dict[str, Any]]:
    """What each subject loads; the caches are written first."""
    from runtime.ways import FLOAT_ACTIVATIONS

    one = ExecutionOptions(threads=threads)
    two = one.model_copy(update={"reading_config": FLOAT_ACTIVATIONS})
    orders: dict[str, dict[str, Any]] = {}
    for options, heap, cached in ((one, HEAP, CACHED), (two, HEAP_TWO, CACHED_TWO)):
        order = {"kind": "ours", "threads": threads, "options": options.model_dump(mode="json"), "prepack": None}
        orders[heap], orders[cached] = order, order | {"prepack": _written(decoder, options)}
    return orders | {LLAMA: {"kind": "llama", "threads": threads}}


def _written(decoder: Decoder, options: ExecutionOptions) -> str:
    from runtime.prepack import PrepackCache, PrepackKey
    from runtime.version import weights_bytes

    entry = entry_of(decoder, options, None)
    key = PrepackKey.of(entry.decoded, entry.cpu, entry.onnxruntime, options)
    with PrepackCache(CACHE).draft(key, decoder.directory, options, weights_bytes(decoder.version)) as draft:
        return draft.commit()


def _load_rows(orders: dict[str, dict[str, Any]], weights: int) -> list[Row]:
    """Memory and time of loads in turns."""
    figures: dict[str, list[dict[str, Any]]] = {name: [] for name in orders}

    def loading(name: str) -> Subject:
        def subject() -> float:
            process = Process(orders[name])
            try:
                loaded = process.load()
                process.ask(read=READ_TOKENS, seed=1)
                used = process.ask(decode=8)
            finally:
                process.close()
            figures[name].append(loaded | {"used": used["anonymous"]})
            return float(loaded["seconds"])

        return subject

    seconds = measure({name: loading(name) for name in orders}, ROUNDS)

    def share(name: str, figure: str) -> Samples | None:
        found = figures[name][1:]  # the first was the warm-up
        return Samples(tuple(one[figure] / weights for one in found)) if found else None

    rows = []
    for sessions, heap, cached in (("one session", HEAP, CACHED), ("two sessions", HEAP_TWO, CACHED_TWO)):
        for what, figure, target in (
            ("loaded", "anonymous", at_most(0.15)), ("after use", "used", None), ("most while loading", "peak", None),
        ):  # fmt: skip
            ours = share(cached, figure)
            assert ours is not None
            metric = f"{sessions}: anonymous memory / weights, {what}"
            rows.append(row(metric, "", ours, target, (HEAP, share(heap, figure))))
            if heap is HEAP and figure != "peak":
                rows.append(row(metric, "", ours, None, (LLAMA, share(LLAMA, figure))))
        timed = {cached: seconds[cached], HEAP: seconds[heap], LLAMA: seconds[LLAMA]}
        rows += rows_against(f"{sessions}: time to load", "s", cached, timed)
    return rows


def _second_process_rows(orders: dict[str, dict[str, Any]], weights: int) -> list[Row]:
    """What a second process on the same files adds to the sum of Pss_File, interpreters apart."""
    rows = []
    for sessions, cached in (("one session", CACHED), ("two sessions", CACHED_TWO)):
        with ExitStack() as stack:
            pair = [Process(orders[cached]) for _ in range(2)]
            for process in pair:
                stack.callback(process.close)
            sums = []
            for process in pair:
                process.load()
                process.ask(read=READ_TOKENS, seed=1)
                process.ask(decode=8)
                sums.append(sum(one.ask(memory=1)["pss_file"] for one in pair))
        metric = f"{sessions}: second process adds to Pss_File / weights"
        rows.append(row(metric, "", exact((sums[1] - sums[0]) / weights), at_most(0.05)))
    return rows


def _speed_rows(orders: dict[str, dict[str, Any]]) -> list[Row]:
    """From the cache as fast as from the heap."""
    rows = []
    for sessions, heap, cached in (("one session", HEAP, CACHED), ("two sessions", HEAP_TWO, CACHED_TWO)):
        with ExitStack() as stack:
            processes = {name: Process(orders[name]) for name in (cached, heap)}
            for process in processes.values():
                stack.callback(process.close)
                process.load()
            for what, figure in (("prefill", _reading), ("decode", _decoding)):
                measured = measure({name: figure(process) for name, process in processes.items()}, ROUNDS)
                target = at_least(SLOWER_LIMIT, ratio=True)
                rows += rows_against(f"{sessions}: {what}, {CACHED}", "tok/s", cached, measured, target)
    return rows


def _reading(process: Process) -> Subject:
    seeds = iter(range(0, 1 << 30, 13))
    return lambda: READ_TOKENS / float(process.ask(read=READ_TOKENS, seed=next(seeds))["seconds"])


def _decoding(process: Process) -> Subject:
    def subject() -> float:
        process.ask(read=32, seed=1)
        process.ask(decode=4)  # threads awake, caches warm
        return DECODED_TOKENS / float(process.ask(decode=DECODED_TOKENS)["seconds"])

    return subject


def _idle_row(decoder: Decoder, threads: int) -> Row:
    """The share of one core that a server takes when nobody asks, with threads that spin while there is work."""
    options = ExecutionOptions(threads=threads, spinning=True)
    with runtime_server([(decoder.directory, decoder.version)], options, {}) as server:
        body = json.dumps({"model": MODEL, "prompt": [5, 6, 7], "max_tokens": 16, "temperature": 0, "ignore_eos": True})
        answer = request(server.public, "POST", "/v1/completions", body.encode(), timeout_s=60.0)
        if answer.status != 200:
            raise RuntimeError(answer.body[:300].decode(errors="replace"))
        time.sleep(SETTLE_S)
        before_s = _cpu_s(server.pid)
        time.sleep(IDLE_S)
        share = (_cpu_s(server.pid) - before_s) / IDLE_S
    return row(f"idle server, {threads} threads that spin: share of one core", "", exact(share), at_most(0.01))


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _anonymous_bytes(pid: int) -> int:
    rows = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((1024 * int(line.split()[1]) for line in rows if line.startswith("RssAnon:")), 0)
