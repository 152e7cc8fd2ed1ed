"""Decoders as child processes that take orders: ours and the peers, each alone with its thread pool.

Orders (benchmarks/children.py): {"prefill": n} reads n tokens into an empty cache and gives the seconds to the first
token; {"decode": n} generates n more, greedily, and gives the seconds.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

from benchmarks.children import OrderedChild
from benchmarks.decoder_models import Decoder, pruned, sample, smollm
from benchmarks.harness import PeerAbsent
from forge.prune import Magnitude
from forge.quantise import BLOCKS
from forge.shrink import Shrinking
from wire.documents import parse_document
from wire.serving import ExecutionOptions, ProbeReport

CONTEXT_TOKENS = 2048
MODELS: dict[str, Callable[[], Decoder]] = {"smollm-135m": smollm, "tales-5m": sample}
LONG_BLOCKS: dict[str, Callable[[], Decoder]] = {
    f"{name}, blocks of {BLOCKS[-1]}": partial(make, longest=BLOCKS[-1])
    for name, make in {"smollm-135m": smollm, "tales-5m": sample}.items()
}
"""The same in the blocks that a budget has, beside peers in blocks of 32, as their own tools make them."""
PRUNED: dict[str, Callable[[], Decoder]] = {
    "smollm-135m shrunken": lambda: pruned(smollm, Shrinking(heads=1 / 3, mlp=0.25)),
    "smollm-135m with zeros": lambda: pruned(smollm, Magnitude(0.5)),
    "tales-5m shrunken": lambda: pruned(sample, Shrinking(heads=0.5, mlp=0.25)),
    "tales-5m with zeros": lambda: pruned(sample, Magnitude(0.5)),
}


class Subject(Protocol):
    """What a child runs."""

    def prefill(self, tokens: Sequence[int]) -> None:
        """Forget everything, read `tokens`, find the first token of the answer."""

    def decode(self, count: int) -> None:
        """Generate `count` tokens more."""


class Child(OrderedChild):
    """One decoder in a process of its own; ours runs as `options` say, else as its probe does.

    Raises PeerAbsent when it does not come up.
    """

    def __init__(self, kind: str, model: str, threads: int, options: ExecutionOptions | None = None) -> None:
        chosen = [options.model_dump_json()] if options is not None else []
        super().__init__("benchmarks.decoders", [kind, model, str(threads), *chosen], threads)

    def seconds(self, **order: int) -> float:
        """The seconds of one order."""
        return float(self.ask(**order)["seconds"])


def probed_options(decoder: Decoder, threads: int) -> ExecutionOptions:
    """What the node's own probe chooses for this model here. Raises RuntimeError when the probe refuses it."""
    command = [sys.executable, "-m", "runtime.main", "probe", "--candidate", str(decoder.directory), "--threads"]
    output = subprocess.run([*command, str(threads)], stdout=subprocess.PIPE, check=True).stdout
    report = parse_document(ProbeReport, output, limit_bytes=1 << 16)
    if report.options is None:
        raise RuntimeError(f"the probe says {report.verdict}: {report.detail}")
    return report.options


class Ours:
    """The runtime's model, without HTTP, with `options` in JSON or those that its probe chooses."""

    def __init__(self, decoder: Decoder, threads: int, options: str = "") -> None:
        from runtime.model import Model
        from runtime.slab import Shape

        chosen = ExecutionOptions.model_validate_json(options) if options else probed_options(decoder, threads)
        shape = Shape(1, min(CONTEXT_TOKENS, decoder.config.context_tokens))
        self._model = Model(decoder.directory, decoder.config, shape, chosen)
        self._last = self._length = 0
        self.tell = chosen.model_dump_json()

    def prefill(self, tokens: Sequence[int]) -> None:
        """As the engine does it."""
        from runtime.model import PREFILL_TOKENS

        for start in range(0, len(tokens), PREFILL_TOKENS):
            logits = self._model.prefill(0, list(tokens[start : start + PREFILL_TOKENS]), start)
        self._last, self._length = int(logits.argmax()), len(tokens)

    def decode(self, count: int) -> None:
        """As the engine does it."""
        for _ in range(count):
            self._last = int(self._model.decode([self._last], [self._length])[0].argmax())
            self._length += 1


class Llama:
    """llama-cpp-python's low-level interface: llama_decode and numpy's argmax, the leanest loop that it allows."""

    def __init__(self, decoder: Decoder, threads: int, *, flash: bool = True) -> None:
        """`flash` is its default; without it, it decodes twice as fast after long prompts on x86, and reads slower."""
        import ctypes

        import llama_cpp  # type: ignore[import-not-found]

        from benchmarks.gguf_writer import gguf_of

        self._ctypes, self._api = ctypes, llama_cpp
        self._silence = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._silence, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_load_from_file(
            str(gguf_of(decoder)).encode(), llama_cpp.llama_model_default_params()
        )
        if not model:
            raise PeerAbsent("llama.cpp does not load the GGUF")
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = settings.n_batch = min(CONTEXT_TOKENS, decoder.config.context_tokens)
        settings.n_threads = settings.n_threads_batch = threads
        if not flash:
            settings.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._context = llama_cpp.llama_init_from_model(model, settings)
        self._vocab_size = decoder.config.vocab_size
        self.tell = llama_cpp.llama_print_system_info().decode()

    def prefill(self, tokens: Sequence[int]) -> None:
        """One call."""
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), False)
        self._last = self._step(tokens)

    def decode(self, count: int) -> None:
        """One call per token."""
        for _ in range(count):
            self._last = self._step([self._last])

    def _step(self, tokens: Sequence[int]) -> int:
        import numpy as np

        array = (self._api.llama_token * len(tokens))(*tokens)
        if self._api.llama_decode(self._context, self._api.llama_batch_get_one(array, len(tokens))):
            raise RuntimeError("llama_decode failed")
        logits = np.ctypeslib.as_array(self._api.llama_get_logits_ith(self._context, -1), (self._vocab_size,))
        return int(logits.argmax())


class Genai:
    """onnxruntime-genai's generator, greedy, over the same int4 weights in the graph that its builder makes."""

    def __init__(self, decoder: Decoder, threads: int) -> None:
        import onnxruntime_genai  # type: ignore[import-not-found]

        from benchmarks.genai_model import genai_of

        self._api = onnxruntime_genai
        self._capacity = min(CONTEXT_TOKENS, decoder.config.context_tokens)
        self._model = onnxruntime_genai.Model(str(genai_of(decoder, threads)))
        self._generator: Any = None
        self.tell = onnxruntime_genai.__version__

    def prefill(self, tokens: Sequence[int]) -> None:
        """A new generator, its prompt and its first token."""
        import numpy as np

        settings = self._api.GeneratorParams(self._model)
        settings.set_search_options(max_length=self._capacity, do_sample=False)
        self._generator = self._api.Generator(self._model, settings)
        self._generator.append_tokens(np.asarray(tokens, np.int32))
        self._generator.generate_next_token()

    def decode(self, count: int) -> None:
        """One call per token."""
        for _ in range(count):
            self._generator.generate_next_token()


KINDS: dict[str, Callable[..., Any]] = {
    "ours": Ours, "llama": Llama, "llama-whole": partial(Llama, flash=False), "genai": Genai
}  # fmt: skip


def serve(kind: str, model: str, threads: int, *options: str) -> None:
    """The child's side."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    subject = KINDS[kind]((MODELS | LONG_BLOCKS | PRUNED)[model](), threads, *options)
    print(json.dumps({"tell": subject.tell}), file=replies, flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        began_s = time.perf_counter()
        if "prefill" in order:
            subject.prefill([(7 * i + order.get("seed", 0)) % 4000 + 3 for i in range(order["prefill"])])
        else:
            subject.decode(order["decode"])
        print(json.dumps({"seconds": time.perf_counter() - began_s}), file=replies, flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2], int(sys.argv[3]), *sys.argv[4:])
