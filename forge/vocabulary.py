"""A smaller vocabulary for a tokenizer.json of byte-pair encoding: which tokens stay, and the file written anew.

What stays has every byte, so that any text still has tokens and comes back whole; every added token; and whatever the
tokens that stay are made of (forge/merges.py), so that text which needs no others keeps its tokens. They keep their
order, and are numbered anew from 0.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from forge.configuration import read_json
from forge.merges import Merges, Pair, grow
from wire.errors import ConfigError

LIMIT_BYTES = 64 << 20
BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))
"""How SentencePiece's BPE writes bytes."""
REMEDY = "keep its vocabulary whole"


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer.json."""

    path: Path
    fields: dict[str, Any]
    tokenizer: Tokenizer

    @classmethod
    def read(cls, path: Path) -> "Vocabulary":
        """Raises ConfigError when it is none that can be made smaller."""
        fields = read_json(path, LIMIT_BYTES)
        model = fields.get("model") if isinstance(fields, dict) else None
        if not isinstance(model, dict) or model.get("type") != "BPE":
            kind = model.get("type") if isinstance(model, dict) else "none"
            raise ConfigError(f"{path}: only vocabularies of byte-pair encoding are trimmed, this is {kind}; {REMEDY}")
        odd = [name for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix") if model.get(name)]
        if odd:
            raise ConfigError(f"{path}: a byte-pair encoding with {odd[0]} is not trimmed; {REMEDY}")
        found = cls(path, fields, _open(path))
        missing = [token for token in found.bytes if token not in found.ids]
        if missing:
            raise ConfigError(f"{path} has no token for every byte ({missing[0]!r}), so no text is sure; {REMEDY}")
        return found

    @cached_property
    def ids(self) -> dict[str, int]:
        """Numbers of all tokens, the added ones too."""
        added = {str(entry["content"]): int(entry["id"]) for entry in self.fields.get("added_tokens") or []}
        return {**self.fields["model"]["vocab"], **added}

    @cached_property
    def merges(self) -> Merges:
        """The pairs, which older files write with a space between."""
        pairs = self.fields["model"]["merges"]
        return Merges([_pair(entry.split(" ") if isinstance(entry, str) else entry) for entry in pairs])

    @cached_property
    def bytes(self) -> tuple[str, ...]:
        """The tokens of single bytes."""
        if self.fields["model"].get("byte_fallback"):
            return BYTE_TOKENS
        if '"ByteLevel"' not in json.dumps(self.fields.get("pre_tokenizer")):
            raise ConfigError(f"{self.path} has tokens for characters, not for bytes, so texts would be lost; {REMEDY}")
        return tuple(_byte_level_alphabet())

    def core(self, needed: Iterable[int]) -> list[str]:
        """What always stays: bytes, characters that the decoder replaces, added tokens, the unknown one, and the tokens
        numbered in `needed`."""
        replaced = sorted(token for token in set("".join(_strings(self.fields.get("decoder")))) if token in self.ids)
        added = [str(entry["content"]) for entry in self.fields.get("added_tokens") or []]
        unknown = self.fields["model"].get("unk_token")
        names = {number: token for token, number in self.ids.items()}
        return [*self.bytes, *replaced, *added, *([unknown] if unknown else []), *(names[number] for number in needed)]

    def choose(self, size: int, needed: Iterable[int], texts: Iterable[str]) -> list[str]:
        """At most `size` tokens, in the order of their numbers: what must stay, then what `texts` use most, then what
        has the lowest ranks. Raises ConfigError when what must stay is more, or all."""
        parts = self.merges.parts(self.ids)
        uses = self._uses(texts)
        ranked = {a + b: rank for rank, (a, b) in reversed(list(enumerate(self.merges.pairs)))}
        last = len(ranked)
        wanted = sorted(self.ids, key=lambda token: (-uses[token], ranked.get(token, last), self.ids[token]))
        core = self.core(needed)
        kept = grow(core, wanted, parts, size)
        if len(kept) > size:
            raise ConfigError(f"bytes and added tokens of {self.path} are {len(kept)} already; keep at least as many")
        if len(kept) >= len(self.ids):
            raise ConfigError(f"{self.path} has {len(self.ids)} tokens, all of which would stay; keep fewer")
        return sorted(kept, key=self.ids.__getitem__)

    def trimmed(self, kept: Iterable[str]) -> dict[str, Any]:
        """The file with the tokens `kept` alone, numbered in their order. Raises ConfigError when it would not hold."""
        numbers = {token: number for number, token in enumerate(kept)}
        model = self.fields["model"]
        merges = [list(pair) for pair in self.merges.among(token for token in model["vocab"] if token in numbers)]
        fields = {
            **self.fields,
            "model": {**model, "vocab": {token: numbers[token] for token in numbers if token in model["vocab"]},
                      "merges": merges},
            "added_tokens": [{**entry, "id": numbers[entry["content"]]} for entry in self.fields["added_tokens"]],
            "post_processor": self._renumbered(self.fields.get("post_processor"), numbers),
        }  # fmt: skip
        told = Tokenizer.from_str(json.dumps(fields))
        wrong = [token for token, number in numbers.items() if told.token_to_id(token) != number]
        if wrong:
            raise ConfigError(f"{self.path} numbers its added tokens oddly ({wrong[0]!r}); {REMEDY}")
        return fields

    def _uses(self, texts: Iterable[str]) -> Counter[str]:
        uses: Counter[str] = Counter()
        for text in texts:
            uses.update(self.tokenizer.encode(text, add_special_tokens=False).tokens)
        return uses

    def _renumbered(self, processor: Any, numbers: Mapping[str, int]) -> Any:
        """A post-processor with the new numbers of the tokens that it puts at a text's ends."""
        if processor is None:
            return None
        if "processors" in processor:
            return {**processor, "processors": [self._renumbered(one, numbers) for one in processor["processors"]]}
        if "special_tokens" in processor:
            special = {
                name: {**entry, "ids": [numbers[token] for token in entry["tokens"]]}
                for name, entry in processor["special_tokens"].items()
            }
            return {**processor, "special_tokens": special}
        ends = {name: [processor[name][0], numbers[processor[name][0]]] for name in ("sep", "cls") if name in processor}
        return {**processor, **ends}


def _open(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ConfigError(f"{path} cannot be read ({error}); export the fast tokenizer anew") from error


def _strings(part: Any) -> Iterator[str]:
    """What a part of the file compares text with: all its strings but the names of types."""
    if isinstance(part, str):
        yield part
    elif isinstance(part, dict | list):
        entries = part.items() if isinstance(part, dict) else enumerate(part)
        yield from (text for name, entry in entries if name != "type" for text in _strings(entry))


def _pair(entry: list[str]) -> Pair:
    first, second = entry
    return first, second


def _byte_level_alphabet() -> Iterable[str]:
    """How byte-level BPE writes the 256 bytes: printable ones as themselves, the others from U+0100 on (GPT-2)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    hidden = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in sorted(printable)] + [chr(256 + place) for place in range(len(hidden))]
