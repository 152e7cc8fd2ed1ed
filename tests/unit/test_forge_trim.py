"""Trimmed vocabularies: text comes back whole, tokens that stay are found again, their logits are what they were."""

import json
import random
import shutil
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

sys.path.insert(0, str(Path(__file__).parents[1]))

from checkpoint_fixtures import PROJECT, TOKENIZER, tiny_llama

from cli.main import main
from codec.versions import read_version
from forge.build import build_version
from forge.checkpoint import Checkpoint
from forge.encoder_checkpoint import EncoderCheckpoint
from forge.encoder_reference import checkpoint_encoder
from forge.reference import checkpoint_judge
from forge.spelling import BYTE_TOKENS, Parts, closure, grow, spelling_of
from forge.trim import trim_checkpoint
from forge.vocabulary import Vocabulary
from forge.windows import read_windows
from wire.errors import ConfigError

WINDOWS = PROJECT / "samples" / "eval" / "tales-5m-base.json"
BERT = PROJECT / "tests" / "fixtures" / "parity" / "tiny-bert"
ENGLISH = "It was late in the evening, and the old man had seen nothing of the boat. "


@cache
def some_text() -> str:
    windows = read_windows(WINDOWS)[:4]
    return " ".join(Tokenizer.from_file(str(TOKENIZER)).decode(window) for window in windows)


@cache
def llama_tokenizer() -> dict[str, Any]:
    """As converters write SentencePiece's BPE: bytes, every split of every token among the pairs, added tokens last."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.train_from_iterator(
        some_text().split("\n"), trainers.BpeTrainer(vocab_size=900, show_progress=False, max_token_length=12)
    )
    trained = json.loads(tokenizer.to_str())["model"]["vocab"]
    tokens = [*BYTE_TOKENS, *sorted(trained, key=trained.get)]
    vocab = {token: number for number, token in enumerate(tokens)}
    splits = [(t[:i], t[i:]) for t in tokens[256:] for i in range(1, len(t)) if t[:i] in vocab and t[i:] in vocab]
    full = Tokenizer(models.BPE(vocab=vocab, merges=splits, byte_fallback=True, fuse_unk=True))
    full.normalizer = tokenizer.normalizer
    full.add_special_tokens(["<s>", "</s>"])
    ends = [("<s>", len(tokens)), ("</s>", len(tokens) + 1)]
    full.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=ends)
    strip = [decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    full.decoder = decoders.Sequence([decoders.Replace("▁", " "), *strip])
    found: dict[str, Any] = json.loads(full.to_str())
    return found


@cache
def bert_tokenizer() -> dict[str, Any]:
    """WordPiece with a word that its single characters do not spell, padded and cut as sentence-transformers has it."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))  # noqa: S106  it is a word
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=900, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([some_text()], trainer)
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.enable_padding(length=64, pad_token="[PAD]")  # noqa: S106  as above
    tokenizer.enable_truncation(64)
    found: dict[str, Any] = json.loads(tokenizer.to_str())
    vocabulary = found["model"]["vocab"]
    letters = {letter for letter in (*some_text().lower(), "é") if f"##{letter}" not in vocabulary}
    for token in (*sorted(f"##{letter}" for letter in letters if letter in vocabulary), "é", "née"):
        vocabulary[token] = len(vocabulary)
    return found


@cache
def opened(kind: str) -> tuple[Vocabulary, Tokenizer, Parts]:
    fields = {"byte-level": lambda: json.loads(TOKENIZER.read_text()), "byte fallback": llama_tokenizer,
              "word pieces": bert_tokenizer}[kind]()  # fmt: skip
    vocabulary = Vocabulary(fields, unpadded(fields), spelling_of(fields))
    return vocabulary, vocabulary.tokenizer, vocabulary.spelling.parts()


KINDS = pytest.mark.parametrize("kind", ["byte-level", "byte fallback", "word pieces"])
texts = st.one_of(
    st.text(max_size=40),
    st.lists(st.sampled_from(some_text().split(" ")), max_size=12).map(" ".join),
)


def trimmed(kind: str, first: list[str], size: int, seed: int) -> Tokenizer:
    """The tokenizer with `first`, and then tokens by chance."""
    vocabulary, _, parts = opened(kind)
    others = sorted(vocabulary.ids)
    random.Random(seed).shuffle(others)
    kept = grow(vocabulary.core([]), [*first, *others], parts, size)
    return unpadded(vocabulary.trimmed(sorted(kept, key=vocabulary.ids.__getitem__)))


def unpadded(fields: dict[str, Any]) -> Tokenizer:
    tokenizer = Tokenizer.from_str(json.dumps(fields))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


@KINDS
@given(text=texts, size=st.integers(260, 1100), seed=st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_any_text_comes_back_as_before(kind: str, text: str, size: int, seed: int) -> None:
    _, whole, _ = opened(kind)
    small = trimmed(kind, [], size, seed)
    assert small.decode(small.encode(text).ids) == whole.decode(whole.encode(text).ids)
    if kind == "byte-level":
        assert small.decode(small.encode(text).ids) == text


@KINDS
@given(text=texts, more=st.integers(0, 300), seed=st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_text_that_needs_kept_tokens_alone_is_told_in_them(kind: str, text: str, more: int, seed: int) -> None:
    vocabulary, whole, parts = opened(kind)
    tokens = whole.encode(text).tokens
    needed = set().union(*(closure(token, parts) for token in (*vocabulary.core([]), *tokens)))
    assert trimmed(kind, tokens, len(needed) + more, seed).encode(text).tokens == tokens


@pytest.mark.parametrize("kind", ["byte-level", "byte fallback"])
def test_most_tokens_of_byte_pairs_are_made_of_two_others(kind: str) -> None:
    vocabulary, whole, parts = opened(kind)
    assert len(parts) > 0.5 * len(vocabulary.ids)
    for token, pair in parts.items():
        assert "".join(pair) == token
    assert whole.encode("ߦ").tokens[-1] in vocabulary.spelling.always()


@given(text=texts, size=st.integers(100, 900), seed=st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_word_that_had_pieces_has_pieces(text: str, size: int, seed: int) -> None:
    small, whole = trimmed("word pieces", [], size, seed), opened("word pieces")[1]
    assert small.encode(f"née {text}").tokens.count("[UNK]") == whole.encode(f"née {text}").tokens.count("[UNK]")


def test_padding_and_ends_of_word_pieces_are_numbered_anew() -> None:
    vocabulary, _, _ = opened("word pieces")
    kept = [token for token in vocabulary.ids if token not in ("[UNK]", "[PAD]")]
    fields = vocabulary.trimmed([*kept, "[UNK]", "[PAD]"])
    assert fields["padding"]["pad_id"] == len(kept) + 1
    assert Tokenizer.from_str(json.dumps(fields)).encode("a").ids[-1] == len(kept) + 1
    assert fields["post_processor"]["special_tokens"]["[CLS]"]["ids"] == [0]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tiny_llama(tmp_path / "source")
    config = json.loads((folder / "config.json").read_text()) | {"eos_token_id": [2, 4000], "pad_token_id": None}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(
        json.dumps({"bos_token_id": 0, "eos_token_id": 4000, "pad_token_id": -1})
    )
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"added_tokens_decoder": {"2": {"content": "<|im_end|>"}}})
    )
    return folder


def test_logits_of_kept_tokens_are_those_of_the_whole_model(source: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(ENGLISH)
    figures = trim_checkpoint(source, tmp_path / "out", 400, [text])
    assert (figures["tokens_before"], figures["tokens"]) == (4096, 400)
    assert figures["parameters_before"] - figures["parameters"] == 64 * 3696
    assert figures["text_tokens"] == figures["text_tokens_before"]
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole, small = (Tokenizer.from_file(str(folder / "tokenizer.json")) for folder in (source, tmp_path / "out"))
    before = checkpoint_judge(Checkpoint(source), tmp_path / "a").logits(whole.encode(ENGLISH).ids)
    after = checkpoint_judge(Checkpoint(tmp_path / "out"), tmp_path / "b").logits(small.encode(ENGLISH).ids)
    rows = [whole.token_to_id(token) for token, _ in sorted(small.get_vocab().items(), key=lambda entry: entry[1])]
    np.testing.assert_allclose(after, before[:, rows], atol=1e-5)


def test_untied_head_loses_the_same_rows(source: Path, tmp_path: Path) -> None:
    config = json.loads((source / "config.json").read_text()) | {"tie_word_embeddings": False}
    (source / "config.json").write_text(json.dumps(config))
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * np.float16(2)
    save_file(tensors, source / "model.safetensors")
    trim_checkpoint(source, tmp_path / "out", 400)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored["lm_head.weight"].shape == (400, 64)
    assert np.array_equal(stored["lm_head.weight"], stored["model.embed_tokens.weight"] * np.float16(2))


def test_every_file_numbers_the_tokens_anew(source: Path, tmp_path: Path) -> None:
    trim_checkpoint(source, tmp_path / "out", 300)
    small = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    name = Tokenizer.from_file(str(TOKENIZER)).id_to_token(4000)
    config, generation, said = (
        json.loads((tmp_path / "out" / name).read_text())
        for name in ("config.json", "generation_config.json", "tokenizer_config.json")
    )
    assert config["vocab_size"] == small.get_vocab_size() == 300
    assert (config["bos_token_id"], config["pad_token_id"]) == (0, None)
    assert config["eos_token_id"] == [small.token_to_id("<|im_end|>"), small.token_to_id(name)]
    assert generation == {"bos_token_id": 0, "eos_token_id": small.token_to_id(name), "pad_token_id": -1}
    assert said == {"added_tokens_decoder": {str(small.token_to_id("<|im_end|>")): {"content": "<|im_end|>"}}}


def test_template_at_a_texts_ends_follows_its_tokens() -> None:
    small = trimmed("byte fallback", [], 400, 1)
    assert small.token_to_id("<s>") == 398
    assert small.encode("the man").ids[0] == 398


def test_without_text_the_lowest_ranks_stay(source: Path, tmp_path: Path) -> None:
    trim_checkpoint(source, tmp_path / "out", 300)
    small = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    merges = json.loads(TOKENIZER.read_text())["model"]["merges"]
    assert all(small.token_to_id("".join(pair)) is not None for pair in merges[:30])


def test_trimmed_checkpoint_is_built_by_commands(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["forge", "trim-vocabulary", str(source), str(tmp_path / "out"), "--keep", "500", "--json"])
    assert json.loads(capsys.readouterr().out)["tokens"] == 500
    build_version(tmp_path / "out", tmp_path / "version", ("tiny", "1"))
    assert read_version(tmp_path / "version").config.vocab_size == 500


UNIGRAM = {"type": "Unigram", "unk_id": 0, "vocab": [["<|endoftext|>", 0.0], ["a", -1.0]]}


def rewritten(source: Path, **model: Any) -> None:
    fields = json.loads(TOKENIZER.read_text())
    outer = {name: model.pop(name) for name in ("pre_tokenizer", "post_processor") if name in model}
    whole = UNIGRAM if model.get("type") == "Unigram" else {**fields["model"], **model}
    (source / "tokenizer.json").write_text(json.dumps({**fields, **outer, "model": whole}))


@pytest.mark.parametrize(
    ("change", "size", "said"),
    [
        ({"type": "Unigram"}, 400, "kinds BPE and WordPiece are trimmed, this is Unigram"),
        ({"end_of_word_suffix": "</w>"}, 400, "BPE with end_of_word_suffix is not trimmed"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, 400, "for characters, not for bytes"),
        ({"byte_fallback": True}, 400, "no token for every byte"),
        ({"post_processor": {"type": "Odd"}}, 400, "export the fast tokenizer anew"),
        ({}, 100, "keep at least as many"),
        ({}, 4096, "keep fewer"),
    ],
)
def test_what_cannot_be_trimmed_is_refused_with_the_remedy(
    source: Path, tmp_path: Path, change: dict[str, Any], size: int, said: str
) -> None:
    rewritten(source, **change)
    with pytest.raises(ConfigError, match=said):
        trim_checkpoint(source, tmp_path / "out", size)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("value", "said"), [("<s>", "bos_token_id is no token"), (5000, "token 5000 of the settings")])
def test_settings_that_name_no_token_are_refused(source: Path, tmp_path: Path, value: object, said: str) -> None:
    (source / "generation_config.json").write_text(json.dumps({"bos_token_id": value}))
    with pytest.raises(ConfigError, match=said):
        trim_checkpoint(source, tmp_path / "out", 400)


def test_file_that_is_no_text_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give another file"):
        trim_checkpoint(source, tmp_path / "out", 400, [source / "model.safetensors"])


def test_encoder_answers_texts_of_kept_tokens_as_before(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(ENGLISH)
    figures = trim_checkpoint(BERT, tmp_path / "out", 300, [text])
    assert figures["text_tokens"] == figures["text_tokens_before"]
    embeddings = []
    for name, folder in (("a", BERT), ("b", tmp_path / "out")):
        (tmp_path / name).mkdir()
        ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(ENGLISH).ids
        embeddings.append(checkpoint_encoder(EncoderCheckpoint(folder), tmp_path / name).embed([ids]))
    np.testing.assert_allclose(*embeddings, atol=1e-6)
    document = build_version(tmp_path / "out", tmp_path / "version", ("tiny", "1"))
    assert document.config.vocab_size == 300


def test_padding_that_positions_count_from_must_not_move(tmp_path: Path) -> None:
    folder = shutil.copytree(BERT, tmp_path / "source")
    odd = {"architectures": ["RobertaModel"], "pad_token_id": 350, "max_position_embeddings": 400}
    (folder / "config.json").write_text(json.dumps(json.loads((BERT / "config.json").read_text()) | odd))
    with pytest.raises(ConfigError, match="positions count from token 350"):
        trim_checkpoint(folder, tmp_path / "out", 300)
