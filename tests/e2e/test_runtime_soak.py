"""A random mix over the socket of a real runtime: memory is flat, and every greedy answer is what one alone gets."""

import json
import random
import re
import statistics
import sys
import threading
import time
from pathlib import Path

import pytest
from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))

from engine_requests import TOLERANCE
from runtime_fixtures import MODEL, ONE_THREAD, PROJECT, Node, ask, base_version, running, wait_for
from soak import OPTIONS, TARGET, WAYS, Mix, make_prompts
from unbatched import Unbatched

from runtime.model import Model
from runtime.slab import Shape, token_bytes
from wire.documents import parse_document
from wire.serving import ExecutionOptions, IntegerReading, ModelStats, RuntimeStats

pytestmark = pytest.mark.e2e
CLIENTS, SLOTS, QUEUE, CONTEXT = 8, 3, 4, 1024
BUDGET_TOKENS, PREFIX_BYTES = 1600, 4 << 20
"""Room for one request of all the context and a little more: requests wait for memory, and prefixes are evicted."""
SAMPLE_S = 0.5
READING = ExecutionOptions(threads=1, reading_config={}, integer_reading=IntegerReading.ALL)
"""With a session that reads, which rounds otherwise than the one that decodes and reads short chunks."""
GROWTH_LIMIT_BYTES = 6 << 20
"""Of the process after the warm-up: what onnxruntime's arena and the C heap still find to keep. One slot is 6 MiB."""


def tell(line: str) -> None:
    """Seen with `scripts/test -s`."""
    sys.stdout.write(f"\n{line}")


def settings() -> str:
    budget = BUDGET_TOKENS * token_bytes(base_version().document.config) + PREFIX_BYTES
    return (
        f"max_slots = {SLOTS}\nmax_queue = {QUEUE}\ncontext_tokens = {CONTEXT}\nkv_cache_bytes = {budget}\n"
        f"prefix_cache_bytes = {PREFIX_BYTES}\nrequest_timeout_s = 3.0"
    )


def memory_bytes(node: Node) -> tuple[int, int]:
    """(proportional set, anonymous) of the process."""
    assert node.process is not None
    rollup = Path(f"/proc/{node.process.pid}/smaps_rollup").read_text()
    rows = dict(re.findall(r"^(\w+):\s+(\d+) kB", rollup, re.MULTILINE))
    return int(rows["Pss"]) * 1024, int(rows["Anonymous"]) * 1024


def stats(node: Node) -> ModelStats:
    return parse_document(RuntimeStats, ask(node.admin, "GET", "/v2/models/stats").body).models[0]


def fill(node: Node, windows: list[list[int]]) -> int:
    """Let requests take all the memory that they may, and prefixes be kept, so that no chance decides when that comes;
    the PSS then."""
    prompts = [windows[0] + windows[1][: CONTEXT - len(windows[0]) - 8], windows[2][: BUDGET_TOKENS - CONTEXT - 8]]
    bodies = [{"model": MODEL, "prompt": prompt, "max_tokens": 8, "temperature": 0} for prompt in prompts]
    largest = 0
    for _ in range(3):
        clients = [threading.Thread(target=ask, args=(node.public, "POST", TARGET, body)) for body in bodies]
        for client in clients:
            client.start()
        for client in clients:
            client.join(70)
        largest = max(largest, memory_bytes(node)[0])
    return largest


def soak(node: Node, mix: Mix) -> list[tuple[float, int, int]]:
    """Run the mix to its end; (time, PSS, anonymous) of the process meanwhile."""
    clients = [threading.Thread(target=mix.ask_on, args=(seed,)) for seed in range(CLIENTS)]
    for client in clients:
        client.start()
    samples = []
    while time.monotonic() < mix.until_s:
        samples.append((time.monotonic(), *memory_bytes(node)))
        time.sleep(SAMPLE_S)
    for client in clients:
        client.join(70)
        assert not client.is_alive(), "a client waits for ever"
    wait_for("an idle engine", lambda: stats(node).active == 0)
    return samples


def check_memory(samples: list[tuple[float, int, int]], until_s: float, seconds: float) -> None:
    """The largest sample of the last fifth against that of the fifth after the warm-up."""

    def largest(begin: float, end: float) -> tuple[int, int]:
        part = [s for s in samples if begin <= (s[0] - until_s) / seconds + 1 <= end]
        return max(pss for _, pss, _ in part), max(anonymous for _, _, anonymous in part)

    before, after = largest(0.4, 0.6), largest(0.8, 1.0)
    for name, one, other in zip(("PSS", "anonymous"), before, after, strict=True):
        tell(f"{name}: {one / 1e6:.1f} MB after the warm-up, {other / 1e6:.1f} MB at the end")
        assert other - one < GROWTH_LIMIT_BYTES


@pytest.mark.parametrize(
    ("seconds", "options"),
    [
        (20, ONE_THREAD),
        pytest.param(600, ONE_THREAD, marks=pytest.mark.full),
        pytest.param(300, READING, marks=pytest.mark.full),
    ],
)
def test_mix_of_joins_leaves_and_cancels_is_answered_rightly_in_flat_memory(
    tmp_path: Path, seconds: float, options: ExecutionOptions
) -> None:
    windows = json.loads((PROJECT / "samples" / "eval" / "tales-5m-base.json").read_text())["tokens"]
    prompts = make_prompts(windows, 24, random.Random(1))
    with running(tmp_path, base_version(), extra=settings(), options=options) as node:
        tell(f"PSS: {fill(node, windows) / 1e6:.1f} MB once requests had all that they may")
        mix = Mix(node.public, prompts, CONTEXT, time.monotonic() + seconds)
        samples = soak(node, mix)
        tell(str(dict(sorted(mix.counts.items()))))
        tell(f"{stats(node).accepted_tokens} of {stats(node).drafted_tokens} drafted tokens were accepted")
        assert mix.faults == []
        assert all(mix.counts[way] for way in WAYS)
        assert all(mix.counts[f"option {option.name}"] for option in OPTIONS)
        assert "step failed" not in node.log()
        assert "Traceback" not in node.log()
        check_memory(samples, mix.until_s, seconds)
    judge_answers(mix, options)


def judge_answers(mix: Mix, options: ExecutionOptions) -> None:
    """Every greedy answer, whole or not, by what the same sessions answer it alone."""
    config = base_version().document.config
    tokenizer = Tokenizer.from_file(str(base_version().directory / "tokenizer.json"))
    alone, ends = Model(base_version().directory, config, Shape(1, CONTEXT), options), frozenset(config.eos_token_ids)
    judge, strict = (Unbatched(alone, tokenizer.decode, ends, tolerance) for tolerance in (TOLERANCE, 0.0))
    began_s = time.monotonic()
    for one in mix.answered:
        cut = one.option.body.get("stop") is not None
        tokens = None if cut else one.tokens
        ended = one.reason == "stop" and not cut
        by = strict if one.option.exact else judge
        assert by.explains(one.prompt, one.text, tokens, ended=ended), one
    partings = judge.partings
    tell(
        f"{len(mix.answered)} different answers judged in {time.monotonic() - began_s:.0f} s; {len(partings)} tokens "
        f"were not the best of the unbatched model, but at most {max(partings, default=0):.4f} standard deviations "
        f"below it, median {statistics.median(partings or [0]):.4f}"
    )
    assert len(mix.answered) > 20
