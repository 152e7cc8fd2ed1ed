"""Text to tokens and back: the tokenizer, the chat template, and decoding that never splits a character.

The template comes with the signed version, but it is still a program: it runs in jinja's immutable sandbox.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from wire.errors import Code, DeployError, InferenceError

TOKENIZER_FILE = "tokenizer.json"
TEMPLATE_FILE = "chat_template.jinja"
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
HOLD_TOKENS = 8
"""A character of UTF-8 has at most four bytes, so a tail that is still broken after these is really broken."""


class TextCodec:
    """Tokenizer and template of one version; safe to use from several threads."""

    def __init__(self, directory: Path) -> None:
        """Raises DeployError(load_failed) when the files are not usable."""
        try:
            self._tokenizer = Tokenizer.from_file(str(directory / TOKENIZER_FILE))
            environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, autoescape=False)
            self._template = environment.from_string((directory / TEMPLATE_FILE).read_text())
        except Exception as error:  # tokenizers raises bare Exception
            raise DeployError(
                Code.LOAD_FAILED, f"tokenizer or chat template: {error}; build the version again"
            ) from error

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`."""
        return [int(token) for token in self._tokenizer.encode(text).ids]

    def decode(self, tokens: list[int]) -> str:
        """Text of `tokens`; bytes that are no whole character become U+FFFD."""
        return str(self._tokenizer.decode(tokens))

    def chat_prompt(self, messages: list[dict[str, Any]]) -> str:
        """The prompt of a conversation. Raises InferenceError(bad_request) when the template refuses it."""
        try:
            return self._template.render(messages=messages, add_generation_prompt=True)
        except TemplateError as error:
            raise InferenceError(Code.BAD_REQUEST, f"chat template: {error}; change the messages", 400) from error


@dataclass(slots=True)
class TextStream:
    """Turns a request's tokens into pieces of text, holding back what may still become a character or a stop string."""

    codec: TextCodec
    stops: tuple[str, ...] = ()
    _tokens: list[int] = field(default_factory=list)
    _prefix: int = 0
    """Tokens whose text was handed out; one of them stays as context, because decoding depends on its neighbour."""
    _held: str = ""
    stopped: bool = False

    def push(self, token: int) -> str:
        """Text that is certain after `token`; '' when all of it is held back. After `stopped` nothing comes."""
        self._tokens.append(token)
        start = max(self._prefix - 1, 0)
        before = self.codec.decode(self._tokens[start : self._prefix])
        after = self.codec.decode(self._tokens[start:])
        piece = after[len(before) :]
        if piece.endswith(REPLACEMENT) and len(self._tokens) - self._prefix < HOLD_TOKENS:
            return ""
        self._prefix = len(self._tokens)
        if self._prefix > HOLD_TOKENS:
            self._tokens = self._tokens[-1:]
            self._prefix = 1
        return self._release(piece)

    def finish(self) -> str:
        """What was held back, when no stop string completed it."""
        if self.stopped:
            return ""
        start = max(self._prefix - 1, 0)
        before = self.codec.decode(self._tokens[start : self._prefix])
        rest = self.codec.decode(self._tokens[start:])[len(before) :]
        text, self._held = self._held + rest, ""
        return text

    def _release(self, piece: str) -> str:
        text = self._held + piece
        for stop in self.stops:
            found = text.find(stop)
            if found >= 0:
                self.stopped, self._held = True, ""
                return text[:found]
        keep = max((_overlap(text, stop) for stop in self.stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for size in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
