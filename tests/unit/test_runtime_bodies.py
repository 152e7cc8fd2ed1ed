"""What of OpenAI's request bodies is understood, and what is refused by name."""

import json
from typing import Any

import pytest

from runtime.bodies import ChatRequest, CompletionRequest, parse_body
from runtime.sampling import Sampling
from wire.errors import Code, InferenceError

SAY = {"model": "m", "messages": [{"role": "user", "content": "x"}]}


def chat(**more: Any) -> ChatRequest:
    return parse_body(ChatRequest, json.dumps(SAY | more).encode())


def test_defaults_are_openais() -> None:
    body = chat()
    assert body.sampling() == Sampling(temperature=1.0, top_p=1.0)
    assert (body.stops(), body.wanted_tokens(), body.stream) == ((), None, None)


def test_everything_supported_is_taken() -> None:
    body = chat(
        temperature=0, top_p=0.5, top_k=3, seed=-1, frequency_penalty=1, presence_penalty=-1.5, stop=["a", "b"],
        max_completion_tokens=7, max_tokens=9, user="u", n=1, stream=True, stream_options={"include_usage": True},
    )  # fmt: skip
    assert body.sampling() == Sampling(0.0, 0.5, 3, 2**64 - 1, 1.0, -1.5)
    assert (body.stops(), body.wanted_tokens()) == (("a", "b"), 7)


def test_one_stop_string_needs_no_list() -> None:
    assert chat(stop="x").stops() == ("x",)


def test_parts_are_joined_and_developer_is_system() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    (message,) = chat(messages=[{"role": "developer", "content": parts}]).messages
    assert message.plain() == {"role": "system", "content": "ab"}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 2), ("logprobs", True), ("tools", [{"type": "function"}]), ("response_format", {"type": "json_object"}),
        ("temperature", 2.5), ("temperature", "0.5"), ("temperature", True), ("top_p", 0), ("max_tokens", 0),
        ("max_tokens", 1.5), ("stop", [""]), ("stop", ["x"] * 17), ("logit_bias", {"1": 5}), ("messages", []),
        ("messages", [{"role": "robot", "content": "x"}]), ("max_token", 5), ("stream", "yes"), ("model", ""),
        ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "u"}}]}]),
        ("seed", 1 << 65), ("temperature", float("nan")),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_refused_by_its_name(field: str, value: Any) -> None:
    with pytest.raises(InferenceError, match=field) as refusal:
        chat(**{field: value})
    assert (refusal.value.code, refusal.value.http_status) == (Code.BAD_REQUEST, 400)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"model":"m"}', b"[" * 100_000])
def test_bytes_that_are_no_request_are_refused(data: bytes) -> None:
    with pytest.raises(InferenceError) as refusal:
        parse_body(ChatRequest, data)
    assert refusal.value.http_status == 400
    assert len(refusal.value.message) <= 500


@pytest.mark.parametrize("prompt", ["text", ["text"], [1, 2, 3]])
def test_completion_takes_text_and_tokens(prompt: Any) -> None:
    body = parse_body(CompletionRequest, json.dumps({"model": "m", "prompt": prompt}).encode())
    assert (body.wanted_tokens(), body.default_tokens) == (None, 16)


@pytest.mark.parametrize("prompt", [[], ["a", "b"], [[1], [2]], [-1], None, 5])
def test_completion_refuses_several_prompts_and_none(prompt: Any) -> None:
    with pytest.raises(InferenceError, match="prompt"):
        parse_body(CompletionRequest, json.dumps({"model": "m", "prompt": prompt}).encode())
