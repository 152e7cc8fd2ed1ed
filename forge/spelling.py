"""How tokenizers make tokens of characters, and so which tokens a smaller vocabulary needs beside those that it wants.

Byte-pair encoding joins the pair of the lowest rank until no pair of its list is left. Whatever it joins inside a token
it joins in the same order when it is given that token's characters alone, since nothing crosses the token's ends. So a
set that has, with every token, the two that its last join took, contains every step towards its tokens; and text that
came out in such tokens comes out in them again when all other tokens and their pairs are gone.

WordPiece takes the longest token that a word begins with, again and again. It takes the same one when others are gone,
and finds one in any case while all single characters are there, at a word's beginning and within.
"""

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Protocol

from wire.errors import ConfigError

Pair = tuple[str, str]
Parts = Mapping[str, tuple[str, ...]]

BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))
"""How SentencePiece's BPE writes bytes."""
REMEDY = "keep its vocabulary whole"


class Spelling(Protocol):
    """The `model` of a tokenizer.json, of a kind that can lose tokens and no text."""

    def always(self) -> list[str]:
        """The tokens without which some text would have none. Raises ConfigError when they are not there."""

    def parts(self) -> Parts:
        """For tokens that are made of others, these."""

    def rank(self, token: str) -> int:
        """How early a token comes without a text to say how often it is used."""

    def pairs_among(self, kept: Collection[str]) -> dict[str, Any]:
        """Fields of the model that change with its vocabulary."""


@dataclass(frozen=True)
class BytePairs:
    """Byte-pair encoding of bytes, or of characters with bytes for those that it lacks."""

    model: Mapping[str, Any]
    pre_tokenizer: Any
    decoder: Any

    @cached_property
    def pairs(self) -> Sequence[Pair]:
        """In the order of their ranks; older files write them with a space between."""
        entries = self.model["merges"]
        split = (entry.split(" ") if isinstance(entry, str) else entry for entry in entries)
        return [(first, second) for first, second in split]

    @cached_property
    def _ranks(self) -> dict[Pair, int]:
        return {pair: rank for rank, pair in enumerate(self.pairs)}  # of two alike the last counts, as in the library

    @cached_property
    def _first(self) -> dict[str, int]:
        """Of each token, the rank of the first pair that makes it."""
        return {a + b: rank for rank, (a, b) in reversed(list(enumerate(self.pairs)))}

    def always(self) -> list[str]:
        """Bytes, and the characters that the decoder replaces, which it would not know as bytes."""
        vocabulary = self.model["vocab"]
        if self.model.get("byte_fallback"):
            every: Iterable[str] = BYTE_TOKENS
        elif '"ByteLevel"' in json.dumps(self.pre_tokenizer):
            every = _byte_level_alphabet()
        else:
            raise ConfigError(f"the tokenizer has tokens for characters, not for bytes, and would lose texts; {REMEDY}")
        found = list(every)
        if missing := [token for token in found if token not in vocabulary]:
            raise ConfigError(f"the tokenizer has no token for every byte, {missing[0]!r} is none; {REMEDY}")
        return [*found, *sorted(sign for sign in set("".join(_strings(self.decoder))) if sign in vocabulary)]

    def parts(self) -> Parts:
        """For each token that the pairs make of its characters, the two that the last join takes."""
        found = ((token, _last_pair(token, self._ranks)) for token in self.model["vocab"])
        return {token: pair for token, pair in found if pair is not None}

    def rank(self, token: str) -> int:
        """That of the first pair that makes it, which is its weight in the text that the tokenizer was made of."""
        return self._first.get(token, len(self._first))

    def pairs_among(self, kept: Collection[str]) -> dict[str, Any]:
        """The pairs that join two of `kept` to one of them, in their order."""
        return {"merges": [[a, b] for a, b in self.pairs if a in kept and b in kept and a + b in kept]}


@dataclass(frozen=True)
class WordPieces:
    """WordPiece, as BERT has it."""

    model: Mapping[str, Any]

    def always(self) -> list[str]:
        """Single characters, and the tokens that these cannot spell."""
        return [token for token in self.model["vocab"] if len(self._letters(token)) == 1 or not self._spelled(token)]

    def parts(self) -> Parts:
        """None: every token is looked up."""
        return {}

    def rank(self, token: str) -> int:
        """Its number: such vocabularies are written in the order of how often words are used."""
        return int(self.model["vocab"].get(token, 0))

    def pairs_among(self, kept: Collection[str]) -> dict[str, Any]:  # noqa: ARG002  as its kind asks
        """Nothing but the vocabulary changes."""
        return {}

    def _letters(self, token: str) -> list[str]:
        """The tokens of single characters that would spell it."""
        prefix = str(self.model["continuing_subword_prefix"])
        within = token.startswith(prefix) and len(token) > len(prefix)
        letters = token[len(prefix) :] if within else token
        return [letter if i == 0 and not within else prefix + letter for i, letter in enumerate(letters)]

    def _spelled(self, token: str) -> bool:
        return all(letter in self.model["vocab"] for letter in self._letters(token))


def spelling_of(fields: Mapping[str, Any]) -> Spelling:
    """The way in which a tokenizer.json spells. Raises ConfigError when tokens cannot be taken out of it."""
    model = fields["model"]
    kind = model.get("type")
    if kind == "WordPiece":
        return WordPieces(model)
    if kind != "BPE":
        raise ConfigError(f"only tokenizers of the kinds BPE and WordPiece are trimmed, this is {kind}; {REMEDY}")
    odd = [name for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix") if model.get(name)]
    if odd:
        raise ConfigError(f"a tokenizer of the kind BPE with {odd[0]} is not trimmed; {REMEDY}")
    return BytePairs(model, fields.get("pre_tokenizer"), fields.get("decoder"))


def grow(core: Iterable[str], wanted: Iterable[str], parts: Parts, size: int) -> set[str]:
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


def closure(token: str, parts: Parts) -> set[str]:
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


def _strings(part: Any) -> Iterator[str]:
    """What a part of the file compares text with: all its strings but the names of types."""
    if isinstance(part, str):
        yield part
    elif isinstance(part, dict | list):
        entries = part.items() if isinstance(part, dict) else enumerate(part)
        yield from (text for name, entry in entries if name != "type" for text in _strings(entry))


def _byte_level_alphabet() -> list[str]:
    """How byte-level BPE writes the 256 bytes: printable ones as themselves, the others from U+0100 on (GPT-2)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    hidden = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in sorted(printable)] + [chr(256 + place) for place in range(len(hidden))]
