"""Tokenizer, template, streaming detokenisation and stop strings of a real version."""

import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from runtime_fixtures import base_version

from runtime.text import PROMPT_LIMIT_CHARACTERS, TEMPLATE_LIMIT_BYTES, Detokeniser, StopStrings, Text
from wire.errors import Code, DeployError, InferenceError

HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def text() -> Text:
    return Text(base_version().directory, base_version().document.config)


def with_template(home: Path, template: str) -> Text:
    copy = home / "version"
    shutil.copytree(base_version().directory, copy)
    (copy / "chat_template.jinja").write_text(template)
    return Text(copy, base_version().document.config)


def test_text_goes_to_tokens_and_back(text: Text) -> None:
    tokens = text.encode("It was late, said Émile.", special=True)
    assert text.tokenizer.decode(tokens) == "It was late, said Émile."


@pytest.mark.parametrize("phrase", ["Émile – “naïve” 𝄞 漢字 🙂🙂", "plain words", "a�b"])
def test_pieces_are_whole_characters_and_join_to_the_text(text: Text, phrase: str) -> None:
    detokeniser = Detokeniser(text.vocabulary)
    tokens = text.encode(phrase, special=False)
    assert any(len(text.encode(character, special=False)) > 1 for character in phrase) or phrase.isascii()
    pieces = [detokeniser.feed(token) for token in tokens]
    assert "�" not in "".join(pieces).replace("a�b", "")
    assert "".join(pieces) + detokeniser.finish() == phrase


def test_bytes_that_are_no_character_come_out_at_the_end(text: Text) -> None:
    detokeniser = Detokeniser(text.vocabulary)
    first = text.encode("漢", special=False)[0]
    assert detokeniser.feed(first) == ""
    assert detokeniser.finish() == "�"


def test_bytes_that_are_no_character_are_held_until_that_is_sure(text: Text) -> None:
    detokeniser = Detokeniser(text.vocabulary)
    first = text.encode("漢", special=False)[0]
    assert [detokeniser.feed(first) for _ in range(4)] == ["", "\ufffd", "\ufffd", "\ufffd"]
    assert detokeniser.finish() == "\ufffd"


def test_tokens_without_text_between_the_parts_of_a_character_do_not_part_it(text: Text) -> None:
    detokeniser = Detokeniser(text.vocabulary)
    first, *others = text.encode("𝄞", special=False)
    assert len(others) == 3
    assert "".join(detokeniser.feed(token) for token in [2] * 20 + [first] + [2] * 20 + others) == "𝄞"


def test_special_tokens_give_no_text(text: Text) -> None:
    detokeniser = Detokeniser(text.vocabulary)
    assert [detokeniser.feed(token) for token in (0, 1, 2)] == ["", "", ""]
    assert detokeniser.finish() == ""


def test_stop_string_across_pieces_cuts_the_text() -> None:
    stops = StopStrings(("END",))
    assert [stops.feed(piece) for piece in ("one E", "N", "D two")] == ["one ", "", ""]
    assert stops.stopped
    assert stops.feed("more") == stops.finish() == ""


def test_beginning_of_a_stop_string_that_goes_on_otherwise_is_given_out() -> None:
    stops = StopStrings(("END", "\n\n"))
    assert [stops.feed(piece) for piece in ("E", "EN", "ergy\n")] == ["", "E", "ENergy"]
    assert stops.finish() == "\n"
    assert not stops.stopped


def test_stop_string_that_is_complete_first_wins() -> None:
    stops = StopStrings(("abcd", "c"))
    assert stops.feed("xabcd") == "xab"


def test_template_sees_messages_and_special_tokens(tmp_path: Path) -> None:
    text = with_template(
        tmp_path,
        "{%- for m in messages %}{{ bos_token }}{{ m.role }}:{{ m.content }};{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}",
    )
    assert text.render(HELLO) == "<|endoftext|>user:Hello;assistant:"


def test_template_may_refuse_a_conversation(tmp_path: Path) -> None:
    text = with_template(tmp_path, "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(InferenceError, match="roles must alternate") as refusal:
        text.render(HELLO)
    assert refusal.value.http_status == 400


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ 1 / 0 }}",
        "{{ messages[9].content }}",
        "{% for i in range(99999999) %}x{% endfor %}",
    ],
)
def test_template_that_breaks_out_or_breaks_down_is_a_bad_request(tmp_path: Path, template: str) -> None:
    with pytest.raises(InferenceError) as refusal:
        with_template(tmp_path, template).render(HELLO)
    assert refusal.value.code is Code.BAD_REQUEST


def test_template_that_writes_without_end_is_stopped(tmp_path: Path) -> None:
    line = "x" * 1000
    template = "{% for i in range(99999) %}" + line + "{{ i }}{% endfor %}"
    assert PROMPT_LIMIT_CHARACTERS < 99999 * 1000
    with pytest.raises(InferenceError, match="too long"):
        with_template(tmp_path, template).render(HELLO)


def test_version_without_a_template_refuses_chats(tmp_path: Path) -> None:
    text = with_template(tmp_path, "")
    (tmp_path / "version/chat_template.jinja").unlink()
    text = Text(tmp_path / "version", base_version().document.config)
    with pytest.raises(InferenceError, match="/v1/completions"):
        text.render(HELLO)


@pytest.mark.parametrize("template", ["{% for", "x" * (TEMPLATE_LIMIT_BYTES + 1)])
def test_template_that_cannot_be_used_is_a_failed_load(tmp_path: Path, template: str) -> None:
    with pytest.raises(DeployError) as refusal:
        with_template(tmp_path, template)
    assert refusal.value.code is Code.LOAD_FAILED


def test_broken_tokenizer_is_a_failed_load(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(base_version().directory, tmp_path / "version"))
    (copy / "tokenizer.json").write_text("{}")
    with pytest.raises(DeployError):
        Text(copy, base_version().document.config)
