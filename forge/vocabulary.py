"""A smaller vocabulary for a tokenizer.json: which tokens stay, and the file written anew.

What stays leaves no text without tokens, and has whatever the tokens that stay are made of (forge/spelling.py), so that
text which needs no others keeps its tokens. Every added token stays. Tokens keep their order, and are numbered anew
from 0.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from forge.configuration import read_json
from forge.spelling import REMEDY, Spelling, grow, spelling_of
from wire.errors import ConfigError

LIMIT_BYTES = 64 << 20


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer.json; `tokenizer` neither pads nor cuts."""

    fields: dict[str, Any]
    tokenizer: Tokenizer
    spelling: Spelling

    @classmethod
    def read(cls, path: Path) -> "Vocabulary":
        """Raises ConfigError when it is none that can be made smaller."""
        fields, tokenizer = read_json(path, LIMIT_BYTES), open_tokenizer(path)
        return cls(fields, tokenizer, spelling_of(fields))

    @cached_property
    def ids(self) -> dict[str, int]:
        """Numbers of all tokens, the added ones too."""
        added = {str(entry["content"]): int(entry["id"]) for entry in self._added}
        return {**self.fields["model"]["vocab"], **added}

    @property
    def _added(self) -> list[dict[str, Any]]:
        return self.fields.get("added_tokens") or []

    def core(self, needed: Iterable[int]) -> list[str]:
        """What always stays: what texts need, added tokens, the unknown one and that of the padding, and the tokens
        numbered in `needed`."""
        added = [str(entry["content"]) for entry in self._added]
        named = ((self.fields["model"], "unk_token"), (self.fields.get("padding") or {}, "pad_token"))
        special = [part[name] for part, name in named if part.get(name) in self.ids]
        names = {number: token for token, number in self.ids.items()}
        return [*self.spelling.always(), *added, *special, *(names[number] for number in needed)]

    def choose(self, size: int, needed: Iterable[int], texts: Iterable[str]) -> list[str]:
        """At most `size` tokens, in the order of their numbers: what must stay, then what `texts` use most, then what
        has the lowest ranks. Raises ConfigError when what must stay is more, or all."""
        uses: Counter[str] = Counter()
        for text in texts:
            uses.update(self.tokenizer.encode(text, add_special_tokens=False).tokens)
        wanted = sorted(self.ids, key=lambda token: (-uses[token], self.spelling.rank(token), self.ids[token]))
        kept = grow(self.core(needed), wanted, self.spelling.parts(), size)
        if len(kept) > size:
            raise ConfigError(f"{len(kept)} tokens are needed for any text and for special ones; keep at least as many")
        if len(kept) >= len(self.ids):
            raise ConfigError(f"the tokenizer has {len(self.ids)} tokens, all of which would stay; keep fewer")
        return sorted(kept, key=self.ids.__getitem__)

    def trimmed(self, kept: Iterable[str]) -> dict[str, Any]:
        """The file with the tokens `kept` alone, numbered in their order. Raises ConfigError when it would not hold."""
        numbers = {token: number for number, token in enumerate(kept)}
        vocabulary = {token: number for token, number in numbers.items() if token in self.fields["model"]["vocab"]}
        fields = {
            **self.fields,
            "model": {**self.fields["model"], "vocab": vocabulary, **self.spelling.pairs_among(vocabulary)},
            "added_tokens": [{**entry, "id": numbers[entry["content"]]} for entry in self._added],
            "post_processor": _renumbered(self.fields.get("post_processor"), numbers),
        }
        if padding := fields.get("padding"):
            fields["padding"] = {**padding, "pad_id": numbers[padding["pad_token"]]}
        told = Tokenizer.from_str(json.dumps(fields))
        wrong = [token for token, number in numbers.items() if told.token_to_id(token) != number]
        if wrong:
            raise ConfigError(f"the tokenizer numbers its added tokens oddly, {wrong[0]!r} among them; {REMEDY}")
        return fields


def open_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer, without the padding and cutting that its file may ask for. Raises ConfigError."""
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ConfigError(f"{path} cannot be read ({error}); export the fast tokenizer anew") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _renumbered(processor: Any, numbers: Mapping[str, int]) -> Any:
    """A post-processor with the new numbers of the tokens that it puts at a text's ends."""
    if processor is None:
        return None
    if "processors" in processor:
        return {**processor, "processors": [_renumbered(one, numbers) for one in processor["processors"]]}
    if "special_tokens" in processor:
        special = {
            name: {**entry, "ids": [numbers[token] for token in entry["tokens"]]}
            for name, entry in processor["special_tokens"].items()
        }
        return {**processor, "special_tokens": special}
    ends = {name: [processor[name][0], numbers[processor[name][0]]] for name in ("sep", "cls") if name in processor}
    return {**processor, **ends}
