"""What of OpenAI's request bodies is understood, and what is refused by name."""

import json
from typing import Any

import pytest

from runtime.bodies import BIASES, ChatRequest, CompletionRequest, parse_body
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
    body = chat(min_p=0.05, repetition_penalty=1.2, logit_bias={"0": -100, "4095": 2.5})
    assert body.sampling() == Sampling(min_p=0.05, repetition_penalty=1.2, logit_bias=((0, -100.0), (4095, 2.5)))


def test_log_probabilities_are_asked_for_in_two_ways() -> None:
    assert chat().wanted_logprobs() is chat(logprobs=False).wanted_logprobs() is None
    assert (chat(logprobs=True).wanted_logprobs(), chat(logprobs=True, top_logprobs=20).wanted_logprobs()) == (0, 20)
    for asked in (None, 0, 5):
        body = {"model": "m", "prompt": "x", "logprobs": asked}
        assert parse_body(CompletionRequest, json.dumps(body).encode()).wanted_logprobs() == asked
    with pytest.raises(InferenceError, match="logprobs"):
        parse_body(CompletionRequest, json.dumps({"model": "m", "prompt": "x", "logprobs": 6}).encode())


def test_deterministic_request_has_a_seed() -> None:
    assert chat(deterministic=True).sampling().seed == 0
    assert chat(deterministic=True, seed=7).sampling().seed == 7
    assert chat().sampling().seed is None


def test_one_stop_string_needs_no_list() -> None:
    assert chat(stop="x").stops() == ("x",)


def test_parts_are_joined_and_developer_is_system() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    (message,) = chat(messages=[{"role": "developer", "content": parts}]).messages
    assert message.plain() == {"role": "system", "content": "ab"}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 2), ("tools", [{"type": "function"}]), ("response_format", {"type": "json_object"}),
        ("temperature", 2.5), ("temperature", "0.5"), ("temperature", True), ("top_p", 0), ("max_tokens", 0),
        ("max_tokens", 1.5), ("stop", [""]), ("stop", ["x"] * 17), ("messages", []),
        ("messages", [{"role": "robot", "content": "x"}]), ("max_token", 5), ("stream", "yes"), ("model", ""),
        ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "u"}}]}]),
        ("seed", 1 << 65), ("temperature", float("nan")), ("min_p", 1.1), ("min_p", -0.1), ("repetition_penalty", 0),
        ("repetition_penalty", 11), ("logit_bias", {"1": 100.5}), ("logit_bias", {"1": float("nan")}),
        ("logit_bias", {"-1": 5}), ("logit_bias", {"01": 5}), ("logit_bias", {"x": 5}), ("logit_bias", [1]),
        ("logit_bias", {str(i): 1 for i in range(BIASES + 1)}), ("logit_bias", {"9" * 10: 1}), ("logprobs", 1),
        ("top_logprobs", 21), ("top_logprobs", -1), ("top_logprobs", 3), ("deterministic", "yes"),
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
