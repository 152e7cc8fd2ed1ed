"""The prefix cache under any history of requests: what a row holds is what the key says, and nothing held is lost."""

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.prefix import BLOCK_TOKENS, Block, PrefixCache

Tokens = tuple[int, ...]


@dataclass(slots=True)
class Request:
    """As the engine does it: matches once, extends block by block, releases at its end."""

    tokens: Tokens
    tip: Block | None = None
    kept: int = 0


@dataclass(slots=True)
class History:
    """The cache beside what a model would hold in its rows."""

    rows: int
    cache: PrefixCache = field(init=False)
    memory: dict[int, Tokens] = field(default_factory=dict)
    open: list[Request] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.cache = PrefixCache(self.rows)

    def begin(self, tokens: Tokens) -> None:
        request = Request(tokens)
        found = self.cache.match(tokens)
        for number, block in enumerate(found):
            assert self.memory[block.row] == tokens[: (number + 1) * BLOCK_TOKENS]
        if found:
            request.tip, request.kept = found[-1], len(found)
        self.open.append(request)

    def extend(self, request: Request) -> None:
        start = request.kept * BLOCK_TOKENS
        if start + BLOCK_TOKENS > len(request.tokens):
            return
        extended = self.cache.extend(request.tip, request.tokens[start : start + BLOCK_TOKENS])
        if extended is None:
            assert len(self.held_rows()) == self.rows, "a row that nobody holds was not given"
            return
        before = self.held_rows()
        request.tip, fresh = extended
        request.kept += 1
        whole = request.tokens[: start + BLOCK_TOKENS]
        if fresh:
            assert request.tip.row not in before, "a row was taken from someone who holds it"
            self.memory[request.tip.row] = whole
        assert self.memory[request.tip.row] == whole

    def end(self, request: Request) -> None:
        self.open.remove(request)
        self.cache.release(request.tip)

    def held_rows(self) -> set[int]:
        found = set()
        for request in self.open:
            block = request.tip
            while block is not None:
                found.add(block.row)
                block = block.parent
        return found

    def check(self) -> None:
        assert len(self.cache) <= self.rows
        for request in self.open:
            block, count = request.tip, request.kept
            while block is not None:
                assert self.memory[block.row] == request.tokens[: count * BLOCK_TOKENS]
                block, count = block.parent, count - 1


def prompt(path: list[int]) -> Tokens:
    """One block per step of a small tree, so that histories share, part and meet again."""
    return tuple(step * 100 + i for step in path for i in range(BLOCK_TOKENS))


prompts = st.lists(st.integers(0, 2), min_size=1, max_size=5).map(prompt)
kinds = st.sampled_from(["begin", "extend", "extend", "extend", "end"])
actions = st.lists(st.tuples(kinds, st.integers(0, 7), prompts))


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 6), actions)
def test_whatever_comes_and_goes_rows_hold_what_their_keys_say(rows: int, steps: list[tuple[str, int, Tokens]]) -> None:
    history = History(rows)
    for action, which, tokens in steps:
        if action == "begin":
            history.begin(tokens)
        elif history.open:
            request = history.open[which % len(history.open)]
            getattr(history, action)(request)
        history.check()
    for request in list(history.open):
        history.end(request)
    fresh = Request(tuple(range(10_000, 10_000 + rows * BLOCK_TOKENS)))
    history.open.append(fresh)
    for _ in range(rows):  # all rows come back
        history.extend(fresh)
    assert fresh.kept == rows


def test_longest_unused_prefix_goes_first_and_its_beginning_last() -> None:
    history = History(4)
    for path in ([1, 1], [2, 2]):
        history.begin(prompt(path))
        while history.open[0].kept < 2:
            history.extend(history.open[0])
        history.end(history.open[0])
    history.begin(prompt([1, 1]))  # used again
    history.end(history.open[0])
    history.begin(prompt([3]))
    history.extend(history.open[0])
    history.end(history.open[0])
    assert len(history.cache.match(prompt([1, 1]))) == 2
    assert len(history.cache.match(prompt([2, 2]))) == 1


def test_block_counts_only_after_the_same_beginning() -> None:
    history = History(4)
    history.begin(prompt([1, 2]))
    history.extend(history.open[0])
    history.extend(history.open[0])
    assert history.cache.match(prompt([2])) == []
    assert history.cache.match(prompt([2, 2])) == []
    assert len(history.cache.match(prompt([1, 2, 1]))) == 2
