"""Trimming a vocabulary: a checkpoint with fewer tokens, whose logits of those that stay are what they were.

The embedding is a large part of a small model. A row leaves it, and the head, for every token that leaves the
tokenizer; nothing else of the model changes. A text that needed such a token takes several in its place.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from forge.checkpoint_folder import Folder, read_folder, refuse_existing, write_folder
from forge.configuration import read_config
from forge.quantise import Float
from forge.vocabulary import Vocabulary
from wire.errors import ConfigError

TOKENIZER = "tokenizer.json"
TABLES = ("model.embed_tokens.weight", "lm_head.weight")
NUMBERED = "_token_id"
"""How fields of config.json and generation_config.json end that hold one token or a list of them."""


def trim_checkpoint(source: Path, out: Path, size: int, texts: Sequence[Path] = ()) -> dict[str, Any]:
    """Write the checkpoint `out`: `source` with at most `size` tokens, those that `texts` use most, else those of the
    lowest ranks. Returns figures.

    Raises ConfigError when the tokenizer is of a kind that cannot be trimmed, or when `size` fits nothing.
    """
    refuse_existing(out)
    folder = read_folder(source)
    vocabulary = Vocabulary.read(source / TOKENIZER)
    settings = _settings(source, folder)
    needed = sorted({token for fields in settings.values() for token in _tokens(fields)})
    names = set(vocabulary.ids.values())
    if missing := [token for token in needed if token not in names]:
        raise ConfigError(f"{source} names token {missing[0]}, which {TOKENIZER} lacks; take both from the same export")
    kept = vocabulary.choose(size, needed, _paragraphs(texts))
    rows = [vocabulary.ids[token] for token in kept]
    if max(rows) >= folder.architecture.vocab_size:
        raise ConfigError(
            f"{TOKENIZER} has more tokens than the model's {folder.architecture.vocab_size}; fix config.json"
        )
    numbers = {row: number for number, row in enumerate(rows)}
    files = {TOKENIZER: vocabulary.trimmed(kept)} | {
        name: _renumbered(fields, numbers) for name, fields in settings.items() if name != "config.json"
    }
    config = {**_renumbered(settings["config.json"], numbers), "vocab_size": len(kept)}
    tensors = {name: values[rows] if name in TABLES else values for name, values in folder.tensors.items()}
    write_folder(source, out, config, tensors, {name: _as_text(fields) for name, fields in files.items()})
    return {
        "tokens_before": folder.architecture.vocab_size, "tokens": len(kept),
        "parameters_before": _count(folder.tensors), "parameters": _count(tensors),
        **_lengths(texts, source, out),
    }  # fmt: skip


def _settings(source: Path, folder: Folder) -> dict[str, dict[str, Any]]:
    """The files of a checkpoint that number tokens, by name."""
    beside = ("generation_config.json", "tokenizer_config.json")
    found = {name: read_config(source / name) for name in beside if (source / name).is_file()}
    return {"config.json": folder.config, **found}


def _tokens(fields: Mapping[str, Any]) -> Iterator[int]:
    """All tokens that a file numbers."""
    for name, value in fields.items():
        if name.endswith(NUMBERED):
            yield from value if isinstance(value, list) else [] if value is None else [value]
    yield from (int(number) for number in fields.get("added_tokens_decoder") or {})


def _renumbered(fields: Mapping[str, Any], numbers: Mapping[int, int]) -> dict[str, Any]:
    """A file with the new numbers."""

    def renumber(value: Any) -> Any:
        return (
            [numbers[token] for token in value]
            if isinstance(value, list)
            else None
            if value is None
            else numbers[value]
        )

    changed = {name: renumber(value) for name, value in fields.items() if name.endswith(NUMBERED)}
    if "added_tokens_decoder" in fields:
        entries = fields["added_tokens_decoder"].items()
        changed["added_tokens_decoder"] = {str(numbers[int(number)]): entry for number, entry in entries}
    return {**fields, **changed}


def _paragraphs(texts: Sequence[Path]) -> Iterator[str]:
    """The texts in pieces that are cut where no token is."""
    for path in texts:
        try:
            whole = path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} is no text in UTF-8 ({error}); give another file") from error
        yield from whole.split("\n\n")


def _lengths(texts: Sequence[Path], source: Path, out: Path) -> dict[str, int]:
    """How many tokens the texts take with both tokenizers; nothing without a text."""
    if not texts:
        return {}

    def length(folder: Path) -> int:
        tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
        return sum(len(tokenizer.encode(text, add_special_tokens=False).ids) for text in _paragraphs(texts))

    return {"text_tokens_before": length(source), "text_tokens": length(out)}


def _count(tensors: Mapping[str, Float]) -> int:
    return sum(values.size for values in tensors.values())


def _as_text(fields: Mapping[str, Any]) -> str:
    return json.dumps(fields, indent=2, ensure_ascii=False) + "\n"
