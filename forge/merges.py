"""Byte-pair encoding as a graph: which tokens another is made of, and which a smaller vocabulary needs.

BPE joins the pair of the lowest rank until no pair of its list is left. Whatever it joins inside a token it joins in
the same order when it is given that token's characters alone, since nothing crosses the token's ends. So a set that
has, with every token, the two that its last join took, contains every step towards its tokens; and text that came out
in such tokens comes out in them again when all other tokens and their pairs are gone.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

Pair = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Merges:
    """Pairs in the order of their ranks, which is their importance to the text that the tokenizer was made of."""

    pairs: Sequence[Pair]

    def among(self, tokens: Iterable[str]) -> list[Pair]:
        """The pairs that join two of `tokens` to one of them, in their order."""
        kept = frozenset(tokens)
        return [(a, b) for a, b in self.pairs if a in kept and b in kept and a + b in kept]

    def parts(self, tokens: Iterable[str]) -> dict[str, Pair]:
        """For each of `tokens` that the pairs make of its characters, the pair that makes it."""
        ranks = {pair: rank for rank, pair in enumerate(self.pairs)}  # of two alike the last counts, as in the library
        found = ((token, _last_pair(token, ranks)) for token in tokens)
        return {token: pair for token, pair in found if pair is not None}


def grow(core: Iterable[str], wanted: Iterable[str], parts: Mapping[str, Pair], size: int) -> set[str]:
    """`core`, what it is made of, and of `wanted`, in its order, each that still fits into `size` tokens with whatever
    it is made of."""
    kept: set[str] = set()
    for token in core:
        kept |= closure(token, parts)
    for token in wanted:
        if len(kept) >= size:
            break
        more = closure(token, parts) - kept
        if len(kept) + len(more) <= size:
            kept |= more
    return kept


def closure(token: str, parts: Mapping[str, Pair]) -> set[str]:
    """The token and all that it is made of."""
    found, waiting = set(), [token]
    while waiting:
        one = waiting.pop()
        if one not in found:
            found.add(one)
            waiting += parts.get(one, ())
    return found


def _last_pair(token: str, ranks: Mapping[Pair, int]) -> Pair | None:
    """The join that makes `token` of its characters; None where they end up in several tokens, or where it is one."""
    parts = list(token)
    last = None
    while len(parts) > 1:
        places = [(ranks[pair], i) for i, pair in enumerate(pairwise(parts)) if pair in ranks]
        if not places:
            return None
        _, i = min(places)
        last = (parts[i], parts[i + 1])
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return last
