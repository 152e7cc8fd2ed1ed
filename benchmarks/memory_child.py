"""The processes that `scripts/bench memory` looks at: each loads one model in one way when it is told to.

A child reads lines of JSON and answers each with one: {"load": true} gives the seconds to the first token and what the
load cost in memory; {"memory": true} that again, now; {"read": n} and {"decode": n} the seconds for n tokens. All sizes
are in bytes: `anonymous` without keys and values, `slab` these, `resident` what is in memory of the version's files.
"""

import gc
import json
import os
import re
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from benchmarks.decoder_models import HOME, Decoder, opened, smollm
from benchmarks.decoders import CONTEXT_TOKENS, Llama
from runtime.cpu import detect_cpu
from runtime.memory import mapped_bytes, tighten_heap, trim_heap
from runtime.model import PREFILL_TOKENS, Model
from runtime.prepack import PrepackCache, load_model
from runtime.session import ONNXRUNTIME
from runtime.slab import Shape
from wire.serving import ExecutionOptions, ServingModel

CACHE = HOME / "prepack"


class Loaded(Protocol):
    """What was loaded."""

    def prefill(self, tokens: Sequence[int]) -> None:
        """Forget everything, read `tokens`."""

    def decode(self, count: int) -> None:
        """Generate `count` tokens more."""


class Ours:
    """The runtime's model as the server loads it: from the cache with every byte of it checked, or onto the heap."""

    def __init__(self, decoder: Decoder, options: ExecutionOptions, prepack: str | None) -> None:
        shape = Shape(1, min(CONTEXT_TOKENS, decoder.config.context_tokens))
        build = partial(Model, decoder.directory, decoder.config, shape, options)
        self.model, stale = load_model(PrepackCache(CACHE), entry_of(decoder, options, prepack), "", build)
        if stale:
            raise RuntimeError(stale)
        self._last = self._length = 0

    def prefill(self, tokens: Sequence[int]) -> None:
        """As the engine does it."""
        for start in range(0, len(tokens), PREFILL_TOKENS):
            logits = self.model.prefill(0, list(tokens[start : start + PREFILL_TOKENS]), start)
        self._last, self._length = int(logits.argmax()), len(tokens)

    def decode(self, count: int) -> None:
        """As the engine does it."""
        for _ in range(count):
            self._last = int(self.model.decode([self._last], [self._length])[0].argmax())
            self._length += 1


def entry_of(decoder: Decoder, options: ExecutionOptions, prepack: str | None) -> ServingModel:
    """The entry of serving.json by which this machine serves the decoder."""
    return ServingModel(
        model="bench", release="0" * 64, version="1", decoded=decoder.version.decoded_digest(), options=options,
        prepack=prepack, cpu=str(detect_cpu()), onnxruntime=ONNXRUNTIME,
    )  # fmt: skip


def serve(order: dict[str, Any]) -> None:
    """The child's side; `order` says what {"load": true} loads."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    tighten_heap()
    decoder = opened(Path(order["directory"])) if "directory" in order else smollm()
    before = rollup()
    loaded: Loaded | None = None
    print(json.dumps(before), file=replies, flush=True)
    for line in sys.stdin:
        wish = json.loads(line)
        began_s = time.perf_counter()
        if "load" in wish:
            loaded = _load(decoder, order)
        elif "read" in wish and loaded is not None:
            loaded.prefill([(7 * i + wish["seed"]) % 4000 + 3 for i in range(wish["read"])])
        elif "decode" in wish and loaded is not None:
            loaded.decode(wish["decode"])
        seconds = time.perf_counter() - began_s
        gc.collect()
        trim_heap()
        now, slab = rollup(), _slab_bytes(loaded, decoder)
        answer = {
            "seconds": seconds, "anonymous": now["Anonymous"] - before["Anonymous"] - slab, "slab": slab,
            "pss_file": now["Pss_File"], "resident": mapped_bytes(decoder.directory)[1],
        }  # fmt: skip
        print(json.dumps(answer), file=replies, flush=True)


def rollup() -> dict[str, int]:
    """Bytes by field of this process's smaps_rollup (proc(5))."""
    text = Path("/proc/self/smaps_rollup").read_text()
    return {name: 1024 * int(kib) for name, kib in re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE)}


def _load(decoder: Decoder, order: dict[str, Any]) -> Loaded:
    if order["kind"] == "llama":
        loaded: Loaded = Llama(decoder, order["threads"])
        loaded.prefill(list(range(3, 11)))  # what our warm-up does
        loaded.decode(1)
        return loaded
    return Ours(decoder, ExecutionOptions.model_validate(order["options"]), order["prepack"])


def _slab_bytes(loaded: Loaded | None, decoder: Decoder) -> int:
    """Memory for keys and values: what is there of our slab, and all of llama.cpp's float16, which it clears."""
    if isinstance(loaded, Llama):
        config = decoder.config
        return 2 * 2 * config.layers * config.kv_heads * config.head_size * CONTEXT_TOKENS
    if not isinstance(loaded, Ours):
        return 0
    address = loaded.model.slab.parts(0, 1)[0].ctypes.data
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        found = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if found:
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("Anonymous:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("the slab is not mapped")


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
