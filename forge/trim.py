"""Trimming a vocabulary: a checkpoint with fewer tokens, which answers texts of those that stay as it did.

The embedding is a large part of a small model. A row leaves it, and the head of a decoder, for every token that leaves
the tokenizer; nothing else of the model changes. A text that needed such a token takes several in its place.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from forge.checkpoint import Checkpoint
from forge.checkpoint_folder import refuse_existing, write_folder
from forge.configuration import read_config
from forge.encoder_checkpoint import EncoderCheckpoint, is_encoder
from forge.spelling import REMEDY
from forge.vocabulary import Vocabulary, open_tokenizer
from wire.errors import ConfigError

CONFIG, TOKENIZER = "config.json", "tokenizer.json"
NUMBERING = (CONFIG, "generation_config.json", "tokenizer_config.json")
"""Files that number tokens."""
NUMBERED = "_token_id"
"""How the fields of these end that hold one token or a list of them."""
TABLES = ("model.embed_tokens.weight", "lm_head.weight", "embeddings.word_embeddings.weight")
"""Tensors with a row for every token, of encoders behind the name of their family."""
UNREAD = ("position_ids", "cls.", "lm_head.")
"""What encoders' checkpoints have beside the encoder: places in the order of their numbers, and heads of a training."""


def trim_checkpoint(source: Path, out: Path, size: int, texts: Sequence[Path] = ()) -> dict[str, Any]:
    """Write the checkpoint `out`: `source` with at most `size` tokens, those that `texts` use most, else those of the
    lowest ranks. Returns figures.

    Raises ConfigError when the tokenizer is of a kind that cannot be trimmed, or when `size` fits nothing.
    """
    refuse_existing(out)
    checkpoint, names = _opened(source)
    vocabulary = Vocabulary.read(source / TOKENIZER)
    settings = {name: read_config(source / name) for name in NUMBERING if (source / name).is_file()}
    kept = vocabulary.choose(size, _needed(settings, vocabulary), _paragraphs(texts))
    rows = [vocabulary.ids[token] for token in kept]
    rows_before = checkpoint.architecture.vocab_size
    if max(rows) >= rows_before:
        raise ConfigError(f"{TOKENIZER} has more tokens than the model's {rows_before}; take both from the same export")
    numbers = {row: number for number, row in enumerate(rows)}
    _check_positions(checkpoint, numbers)
    changed = {name: _renumbered(fields, numbers) for name, fields in settings.items()}
    config = {**changed.pop(CONFIG), "vocab_size": len(kept)}
    changed[TOKENIZER] = vocabulary.trimmed(kept)
    tensors = {name: checkpoint.tensor(name, checkpoint.shape(name)) for name in names}
    parameters = sum(values.size for values in tensors.values())
    tensors |= {name: values[rows] for name, values in tensors.items() if name.endswith(TABLES)}
    write_folder(source, out, config, tensors, {name: _as_text(fields) for name, fields in changed.items()})
    return {
        "tokens_before": rows_before, "tokens": len(kept),
        "parameters_before": parameters, "parameters": sum(values.size for values in tensors.values()),
        **_lengths(texts, source, out),
    }  # fmt: skip


def _opened(source: Path) -> tuple[Checkpoint | EncoderCheckpoint, list[str]]:
    """The checkpoint, and the names of the tensors to take over."""
    if not is_encoder(source):
        decoder = Checkpoint(source)
        return decoder, sorted(decoder.names)
    encoder = EncoderCheckpoint(source)
    return encoder, sorted(name for name in encoder.names if not any(part in name for part in UNREAD))


def _check_positions(checkpoint: Checkpoint | EncoderCheckpoint, numbers: Mapping[int, int]) -> None:
    """RoBERTa's positions begin behind the padding's number, which must stay. Raises ConfigError."""
    if isinstance(checkpoint, EncoderCheckpoint) and (first := checkpoint.architecture.first_position):
        padding = first - 1
        if numbers.get(padding) != padding:
            raise ConfigError(f"positions count from token {padding}, the padding, which would move; {REMEDY}")


def _needed(settings: Mapping[str, Mapping[str, Any]], vocabulary: Vocabulary) -> list[int]:
    """All tokens that the files number. Raises ConfigError when the tokenizer lacks one."""
    needed = sorted({token for fields in settings.values() for token in _tokens(fields)})
    known = set(vocabulary.ids.values())
    if missing := [token for token in needed if token not in known]:
        raise ConfigError(f"token {missing[0]} of the settings is not in {TOKENIZER}; take both from the same export")
    return needed


def _tokens(fields: Mapping[str, Any]) -> Iterator[int]:
    for name, value in fields.items():
        if name.endswith(NUMBERED) and value is not None:
            yield from (token for token in _listed(name, value) if token >= 0)
    yield from (int(number) for number in fields.get("added_tokens_decoder") or {})


def _renumbered(fields: Mapping[str, Any], numbers: Mapping[int, int]) -> dict[str, Any]:
    """A file with the new numbers; those below 0 stand for no token and stay."""
    changed: dict[str, Any] = {}
    for name, value in fields.items():
        if name.endswith(NUMBERED) and value is not None:
            moved = [numbers[token] if token >= 0 else token for token in _listed(name, value)]
            changed[name] = moved if isinstance(value, list) else moved[0]
    if added := fields.get("added_tokens_decoder"):
        changed["added_tokens_decoder"] = {str(numbers[int(number)]): entry for number, entry in added.items()}
    return {**fields, **changed}


def _listed(name: str, value: Any) -> list[int]:
    """One token or a list of them. Raises ConfigError naming the field."""
    tokens = value if isinstance(value, list) else [value]
    if any(type(token) is not int for token in tokens):
        raise ConfigError(f"{name} is no token and no list of them; take it from the same export as the weights")
    return tokens


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
        tokenizer = open_tokenizer(folder / TOKENIZER)
        return sum(len(tokenizer.encode(text, add_special_tokens=False).ids) for text in _paragraphs(texts))

    return {"text_tokens_before": length(source), "text_tokens": length(out)}


def _as_text(fields: Mapping[str, Any]) -> str:
    return json.dumps(fields, indent=2, ensure_ascii=False) + "\n"
