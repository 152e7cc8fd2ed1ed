"""Sampling, stop strings, log probabilities and deterministic requests over the socket, by the official client."""

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from runtime_fixtures import MODEL, Node, base_version, running

from runtime.text import Text
from runtime.ways import FLOAT_ACTIVATIONS

pytestmark = pytest.mark.e2e
SAY: Any = [{"role": "user", "content": "It was late in the evening when the"}]
END = 2
"""<|im_end|>, which this model's settings do not name as an end."""


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    with running(tmp_path_factory.mktemp("node"), base_version(), extra="max_queue = 20") as node:
        yield node


@pytest.fixture(scope="module")
def client(node: Node) -> Iterator[openai.OpenAI]:
    with node.client() as client:
        yield client


@pytest.fixture(scope="module")
def text() -> Text:
    return Text(base_version().directory, base_version().document.config)


def chat(client: openai.OpenAI, **more: Any) -> Any:
    request: dict[str, Any] = {"model": MODEL, "messages": SAY, "max_tokens": 24, "temperature": 0} | more
    return client.chat.completions.create(**request)


def complete(client: openai.OpenAI, **more: Any) -> Any:
    request: dict[str, Any] = {"model": MODEL, "prompt": "The captain", "max_tokens": 24, "temperature": 0} | more
    return client.completions.create(**request)


def joined(entries: list[Any]) -> bytes:
    return b"".join(bytes(entry.bytes or ()) for entry in entries)


def test_chat_gives_log_probabilities_of_the_tokens_its_text_is_made_of(client: openai.OpenAI) -> None:
    reply = chat(client, logprobs=True, top_logprobs=3)
    entries = reply.choices[0].logprobs.content
    assert len(entries) == reply.usage.completion_tokens == 24
    assert joined(entries).decode() == reply.choices[0].message.content
    for entry in entries:
        assert len(entry.top_logprobs) == 3
        assert (entry.token, entry.logprob) == (entry.top_logprobs[0].token, entry.top_logprobs[0].logprob)
        assert 0 >= entry.logprob >= entry.top_logprobs[1].logprob >= entry.top_logprobs[2].logprob


def test_stream_gives_the_same_log_probabilities_with_the_text_they_belong_to(client: openai.OpenAI) -> None:
    whole = chat(client, logprobs=True, top_logprobs=2)
    given_out = b""
    entries: list[Any] = []
    for chunk in chat(client, logprobs=True, top_logprobs=2, stream=True):
        new = chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else []
        entries += new
        given_out += (chunk.choices[0].delta.content or "").encode()
        assert joined(entries) == given_out
    assert [entry.token for entry in entries] == [entry.token for entry in whole.choices[0].logprobs.content]


def test_completion_gives_log_probabilities_with_offsets_whole_and_streamed(client: openai.OpenAI) -> None:
    reply = complete(client, logprobs=2)
    answer, rows = reply.choices[0].text, reply.choices[0].logprobs
    assert "".join(rows.tokens) == answer
    for token, offset, logprob, top in zip(
        rows.tokens, rows.text_offset, rows.token_logprobs, rows.top_logprobs, strict=True
    ):
        assert answer[offset:].startswith(token)
        assert top[token] == logprob == max(top.values())
        assert len(top) == 2
    streamed = [chunk.choices[0].logprobs for chunk in complete(client, logprobs=2, stream=True)]
    assert [offset for some in streamed if some for offset in some.text_offset] == rows.text_offset
    assert [token for some in streamed if some for token in some.tokens] == rows.tokens
    assert all(len(top) == 1 for top in complete(client, logprobs=0).choices[0].logprobs.top_logprobs)


def test_nothing_of_it_comes_unasked(client: openai.OpenAI) -> None:
    assert chat(client).choices[0].logprobs is None
    assert all(chunk.choices[0].logprobs is None for chunk in complete(client, stream=True))


def test_log_probabilities_are_the_models_whatever_is_drawn(client: openai.OpenAI) -> None:
    plain = chat(client, logprobs=True, top_logprobs=5, max_tokens=1).choices[0].logprobs.content[0]
    second = plain.top_logprobs[1]
    bent = chat(client, logprobs=True, top_logprobs=5, max_tokens=1, seed=1, temperature=1.9, frequency_penalty=1.0,
                logit_bias={str(base_token(second.bytes)): 100}).choices[0].logprobs.content[0]  # fmt: skip
    assert bent.token == second.token
    assert bent.logprob == second.logprob
    assert bent.top_logprobs == plain.top_logprobs


def base_token(data: list[int]) -> int:
    text = Text(base_version().directory, base_version().document.config)
    return next(token for token in range(4096) if text.vocabulary.bytes_of(token) == bytes(data))


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_that_are_half_a_character_are_bytes(client: openai.OpenAI, text: Text, stream: bool) -> None:
    half = text.encode("漢", special=False)[0]
    reply = chat(client, logprobs=True, max_tokens=12, logit_bias={str(half): 100}, stream=stream)
    chunks = list(reply) if stream else [reply]
    entries = [entry for c in chunks if c.choices[0].logprobs for entry in c.choices[0].logprobs.content]
    assert [(entry.token, entry.bytes) for entry in entries] == [("\\xe6", [0xE6])] * 12
    words = [c.choices[0].delta.content or "" if stream else c.choices[0].message.content for c in chunks]
    assert "".join(words) == "\ufffd" * 12


@pytest.mark.parametrize("stream", [False, True])
def test_stop_string_across_tokens_leaves_neither_text_nor_tokens_behind_it(
    client: openai.OpenAI, stream: bool
) -> None:
    free = chat(client, logprobs=True, max_tokens=40)
    words, tokens = free.choices[0].message.content, free.choices[0].logprobs.content
    border = len(joined(tokens[:9]).decode())
    stop = words[border - 2 : border + 2]
    reply = chat(client, logprobs=True, max_tokens=40, stop=[stop], stream=stream,
                 **({"stream_options": {"include_usage": True}} if stream else {}))  # fmt: skip
    chunks = list(reply) if stream else [reply]
    choices = [choice for c in chunks for choice in c.choices]
    said = "".join(choice.delta.content or "" if stream else choice.message.content for choice in choices)
    entries = [entry for choice in choices if choice.logprobs for entry in choice.logprobs.content]
    assert choices[-1].finish_reason == "stop"
    assert said == words[: words.index(stop)]
    assert said.encode().startswith(joined(entries))
    assert [entry.token for entry in entries] == [entry.token for entry in tokens[: len(entries)]]
    whole = next(n for n in range(40) if stop in joined(tokens[:n]).decode(errors="ignore"))
    assert chunks[-1].usage.completion_tokens == whole


def test_stop_string_that_names_a_special_token_ends_the_answer_there(client: openai.OpenAI) -> None:
    forced = {"logit_bias": {str(END): 100}, "max_tokens": 5}
    free, ended = chat(client, **forced), chat(client, **forced, stop="<|im_end|>")
    assert (free.choices[0].finish_reason, free.usage.completion_tokens) == ("length", 5)
    assert (ended.choices[0].finish_reason, ended.usage.completion_tokens) == ("stop", 1)
    assert free.choices[0].message.content == ended.choices[0].message.content == ""


def test_filters_and_penalties_change_the_answer_as_they_say(client: openai.OpenAI) -> None:
    greedy = chat(client).choices[0].message.content
    for narrow in ({"min_p": 1.0}, {"top_k": 1}):
        assert chat(client, temperature=2, extra_body=narrow).choices[0].message.content == greedy
    assert chat(client, temperature=2, top_p=1e-9).choices[0].message.content == greedy
    rows = complete(client, logprobs=0, max_tokens=60, extra_body={"repetition_penalty": 10}).choices[0].logprobs
    assert len(set(rows.tokens)) == 60
    assert len(set(complete(client, logprobs=0, max_tokens=60).choices[0].logprobs.tokens)) < 60


@pytest.mark.parametrize(
    "change",
    [
        {"logit_bias": {"4096": 1}}, {"logit_bias": {"7": 101}}, {"logprobs": True, "top_logprobs": 21},
        {"top_logprobs": 1}, {"extra_body": {"min_p": 2}}, {"extra_body": {"repetition_penalty": -1}},
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_done_is_a_bad_request(client: openai.OpenAI, change: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        chat(client, **change)
    assert refusal.value.code == "bad_request"
    assert next(iter(change.get("extra_body", change))) in refusal.value.message


def test_deterministic_request_gives_the_same_tokens_alone_and_in_a_crowd(tmp_path: Path) -> None:
    """With float activations, whose kernels round differently in batches (as in tests/unit/test_runtime_alone.py)."""
    node = Node(tmp_path, "max_slots = 8\nmax_queue = 40")
    node.order(base_version())
    entry = node.entries[MODEL]
    options = entry.options.model_copy(update={"session_config": FLOAT_ACTIVATIONS})
    node.entries[MODEL] = entry.model_copy(update={"options": options})
    node.write()
    node.start()
    try:
        node.wait_ready()
        with node.client() as client, ThreadPoolExecutor(16) as pool:
            check_crowd(client, pool)
    finally:
        assert node.process is not None
        node.process.kill()
        node.process.wait(10)


def check_crowd(client: openai.OpenAI, pool: ThreadPoolExecutor) -> None:
    def watched(*, deterministic: bool) -> tuple[str, list[float]]:
        reply = chat(client, temperature=0.9, top_p=0.95, seed=7, max_tokens=60, logprobs=True,
                     extra_body={"deterministic": deterministic})  # fmt: skip
        choice = reply.choices[0]
        return choice.message.content, [entry.logprob for entry in choice.logprobs.content]

    def other(number: int) -> None:
        said = [{"role": "user", "content": "a " * number}]
        chat(client, temperature=1.2, max_tokens=20 + number % 50, messages=said)

    alone = watched(deterministic=True)
    assert watched(deterministic=True) == alone
    crowd = [pool.submit(other, 1 + 7 * i) for i in range(20)]
    beside = [pool.submit(watched, deterministic=True) for _ in range(2)]
    batched = pool.submit(watched, deterministic=False)
    crowd += [pool.submit(other, 1 + 7 * i) for i in range(20)]
    assert [one.result() for one in beside] == [alone, alone]
    assert batched.result() != alone, "a crowd changes no bit: this proves nothing"
    for one in crowd:
        one.result()
