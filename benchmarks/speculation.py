"""Drafts from the text itself, on beside off: answers that repeat themselves, and answers that repeat nothing.

Two engines in this process, each over a model of its own with the options that the probe chooses, answer the same
requests in turns. Prompts begin with the first tokens of the first windows of samples/eval, none left out. Greedy
answers of such small models fall into repetition by themselves; the copy-heavy prompt is a beginning with what the
model itself made of it, greedily, and the answer goes on with that. Random weights loop, too, more regularly than text
does: their row shows what a step gains, not how often text repeats. Sampled at temperature 1, the API's default,
neither repeats.
"""

import json
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import cycle

from benchmarks.decoder_models import ROOT, Decoder
from benchmarks.decoders import MODELS, probed_options
from benchmarks.harness import ROUNDS, Row, Subject, Target, at_least, measure, row
from runtime.cpu import allowed_threads
from runtime.engine import Engine
from runtime.generation import End, Event, Generation
from runtime.model import Model
from runtime.sampling import Sampling
from runtime.slab import Shape
from runtime.speculation import Speculation
from runtime.stats import Stats

WINDOWS = ROOT / "samples" / "eval" / "tales-5m-base.json"
PROMPT_TOKENS, TALE_TOKENS, CAPACITY, SLOTS = 32, 96, 512, 4
SIZES = {"tales-5m": (8, 120, 15), "smollm-135m": (4, 64, 3)}
"""Prompts, tokens of an answer, and how often each is asked."""
COPIES, OTHERS = at_least(1.5, ratio=True), at_least(0.98, ratio=True)


@dataclass(frozen=True, slots=True)
class Case:
    """Groups of prompts that are asked together, and which of a group are answered greedily."""

    name: str
    groups: Sequence[Sequence[list[int]]]
    greedy: tuple[bool, ...]
    target: Target | None


@dataclass(slots=True, eq=False)
class Client:
    """One request; its tokens, and when they came."""

    tokens: list[int] = field(default_factory=list)
    first_s: float = 0.0
    last_s: float = 0.0
    ended: threading.Event = field(default_factory=threading.Event)

    def take(self, event: Event) -> None:
        """An event of the engine."""
        if isinstance(event, End):
            self.ended.set()
            return
        assert isinstance(event, int)
        self.tokens.append(event)
        self.last_s = time.perf_counter()
        self.first_s = self.first_s or self.last_s


def run() -> Sequence[Row]:
    """Rows for both models."""
    threads = allowed_threads(0)
    return [entry for name in MODELS for entry in _rows(MODELS[name](), threads)]


def _rows(decoder: Decoder, threads: int) -> list[Row]:
    options = probed_options(decoder, threads)
    prompts, tokens, times = SIZES[decoder.name]
    config = decoder.config
    engines = {
        name: Engine(
            name, Model(decoder.directory, config, Shape(SLOTS, CAPACITY), options), Stats(), max_queue=SLOTS,
            speculation=Speculation() if name == "on" else None,
        )
        for name in ("on", "off")
    }  # fmt: skip
    try:
        cases = _cases(engines["off"], prompts)
        return [_row(decoder.name, engines, case, tokens, times) for case in cases]
    finally:
        for engine in engines.values():
            engine.close()


def _row(model: str, engines: dict[str, Engine], case: Case, tokens: int, times: int) -> Row:
    before = engines["on"].stats.snapshot()
    rounds = max(ROUNDS, times * len(case.groups))
    speeds = measure({name: _asking(engine, case, tokens) for name, engine in engines.items()}, rounds)
    after, ours = engines["on"].stats.snapshot(), speeds["on"]
    assert ours is not None
    accepted = after.accepted_tokens - before.accepted_tokens
    drafted = after.drafted_tokens - before.drafted_tokens
    share = accepted / (after.completion_tokens - before.completion_tokens)
    told = f"{share:.0%} of tokens were drafted, {accepted} of {drafted} drafts right"
    return row(f"{model}: {case.name} ({told})", "tok/s", ours, case.target, ("off", speeds["off"]))


def _cases(engine: Engine, count: int) -> list[Case]:
    windows = json.loads(WINDOWS.read_text())["tokens"][:count]
    beginnings = [window[:PROMPT_TOKENS] for window in windows]
    tales = [[*beginning, *_ask(engine, [beginning], TALE_TOKENS, True)[0].tokens] for beginning in beginnings]
    twice = [window[:TALE_TOKENS] * 2 + window[:PROMPT_TOKENS] for window in windows]

    def groups(prompts: list[list[int]], size: int) -> list[list[list[int]]]:
        return [prompts[at : at + size] for at in range(0, len(prompts), size)]

    one_copies = [[tale, other] for tale, other in zip(tales, beginnings[1:] + beginnings[:1], strict=True)]
    return [
        Case("a tale that repeats itself goes on", groups(tales, 1), (True,), COPIES),
        Case("answers at temperature 1", groups(beginnings, 1), (False,), OTHERS),
        Case("greedy answers to beginnings", groups(beginnings, 1), (True,), None),
        Case("greedy, a tale told twice and begun again", groups(twice, 1), (True,), None),
        Case("a tale that repeats itself beside an answer at temperature 1", one_copies, (True, False), OTHERS),
        Case(f"{SLOTS} tales that repeat themselves go on together", groups(tales, SLOTS), (True,) * SLOTS, None),
        Case(f"{SLOTS} answers at temperature 1 together", groups(beginnings, SLOTS), (False,) * SLOTS, OTHERS),
    ]


def _ask(engine: Engine, group: Sequence[list[int]], tokens: int, *greedy: bool) -> list[Client]:
    """Ask for all of a group at once, and wait for the last."""
    clients = [Client() for _ in group]
    for number, (client, prompt, best) in enumerate(zip(clients, group, greedy, strict=True)):
        sampling = Sampling(temperature=0.0) if best else Sampling(seed=number + sum(prompt))
        engine.submit(Generation(list(prompt), tokens, sampling, client.take))
    for client in clients:
        client.ended.wait()
    return clients


def _asking(engine: Engine, case: Case, tokens: int) -> Subject:
    """Tokens per second from the first token of a group to its last; every call asks for the next group."""
    groups = cycle(case.groups)

    def subject() -> float:
        clients = _ask(engine, next(groups), tokens, *case.greedy)
        count = sum(len(client.tokens) - 1 for client in clients)
        return count / (max(client.last_s for client in clients) - min(client.first_s for client in clients))

    return subject
