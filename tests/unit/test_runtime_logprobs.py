"""Tokens as text and bytes, and log probabilities in OpenAI's two forms."""

import sys
from pathlib import Path

import pytest
from openai.types.chat.chat_completion import ChoiceLogprobs
from openai.types.completion_choice import Logprobs
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE

sys.path.insert(0, str(Path(__file__).parents[1]))

from runtime_fixtures import base_version

from runtime.logprobs import LEAST, chat_logprobs, completion_logprobs
from runtime.sampling import Scored
from runtime.text import Detokeniser, Text
from runtime.transcript import Placed
from runtime.vocabulary import Vocabulary


@pytest.fixture(scope="module")
def text() -> Text:
    return Text(base_version().directory, base_version().document.config)


@pytest.fixture(scope="module")
def vocabulary(text: Text) -> Vocabulary:
    return text.vocabulary


def test_halves_of_a_character_have_bytes_that_join_to_it(text: Text, vocabulary: Vocabulary) -> None:
    tokens = text.encode("漢", special=False)
    assert len(tokens) > 1
    assert b"".join(vocabulary.bytes_of(token) or b"" for token in tokens) == "漢".encode()
    assert "".join(vocabulary.written(token) for token in tokens) == "\\xe6\\xbc\\xa2"


def test_special_tokens_have_a_name_and_no_bytes(vocabulary: Vocabulary) -> None:
    assert (vocabulary.bytes_of(2), vocabulary.written(2), vocabulary.special("<|im_end|>")) == (None, "<|im_end|>", 2)
    assert vocabulary.special("said") is None


def test_rows_of_the_embedding_without_a_token_are_numbers(vocabulary: Vocabulary) -> None:
    assert (vocabulary.bytes_of(99_999), vocabulary.written(99_999)) == (None, "token_id:99999")


def test_tokens_of_sentencepiece_keep_their_spaces_and_single_bytes() -> None:
    words = ["<unk>", "<0xE6>", "<0xBC>", "<0xA2>", "▁Hello", "▁", "lo", "a"]
    tokenizer = Tokenizer(BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    vocabulary = Vocabulary(tokenizer)
    pieces = [vocabulary.bytes_of(token) for token in range(1, 8)]
    assert pieces == [b"\xe6", b"\xbc", b"\xa2", b" Hello", b" ", b"lo", b"a"]
    detokeniser = Detokeniser(vocabulary)
    answer = [4, 1, 2, 3, 5, 6, 4]
    assert "".join(detokeniser.feed(token) for token in answer) == tokenizer.decode(answer) == "Hello漢 lo Hello"


def scores(text: Text) -> list[Placed]:
    whole, half = text.encode(" said", special=False)[0], text.encode("漢", special=False)[0]
    return [Placed(Scored(whole, -0.5, ((whole, -0.5), (2, -1.5))), 0),
            Placed(Scored(half, -3.5, ((whole, -0.1), (2, float("-inf")))), 5)]  # fmt: skip


def test_chat_form_is_openais(text: Text) -> None:
    content = chat_logprobs(text.vocabulary, scores(text))
    assert set(content) == {"content", "refusal"}
    said = {"token": " said", "logprob": -0.5, "bytes": list(b" said")}
    end = {"token": "<|im_end|>", "logprob": -1.5, "bytes": None}
    assert content["content"][0] == said | {"top_logprobs": [said, end]}
    half = content["content"][1]
    assert (half["token"], half["bytes"], half["top_logprobs"][1]["logprob"]) == ("\\xe6", [0xE6], LEAST)
    ChoiceLogprobs.model_validate(content, strict=True)


def test_completion_form_is_openais_and_holds_the_token_drawn(text: Text) -> None:
    content = completion_logprobs(text.vocabulary, scores(text))
    assert content == {
        "tokens": [" said", "bytes:\\xe6"], "token_logprobs": [-0.5, -3.5], "text_offset": [0, 5],
        "top_logprobs": [
            {" said": -0.5, "<|im_end|>": -1.5}, {"bytes:\\xe6": -3.5, " said": -0.1, "<|im_end|>": LEAST},
        ],
    }  # fmt: skip
    Logprobs.model_validate(content, strict=True)
