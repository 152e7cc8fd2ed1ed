"""Text to tokens and back: tokenizer, chat template, streaming detokenisation, stop strings.

Invariants: a piece of text that was given out is never taken back, so a character whose bytes are not complete and the
beginning of a possible stop string are held; templates run in a sandbox and what they write is bounded.
"""

import codecs
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # threads are counted: none but onnxruntime's

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from host.files import read_bounded
from runtime.version import TEMPLATE_FILE, TOKENIZER_FILE
from runtime.vocabulary import Vocabulary
from wire.errors import Code, DeployError, InferenceError
from wire.manifest import DecoderConfig, ModelConfig

TEMPLATE_LIMIT_BYTES = 64 * 1024
PROMPT_LIMIT_CHARACTERS = 4 << 20

Message = dict[str, str]


class Text:
    """Tokenizer and chat template of a version. Raises DeployError(load_failed) when they cannot be used."""

    def __init__(self, directory: Path, config: ModelConfig, *, shared: "Text | None" = None) -> None:
        """`shared` is the text of a version whose tokenizer.json is the same: parsing one stops every thread of the
        process (the library keeps the interpreter's lock), 10 ms for 4,096 words and a second for 200,000.
        """
        try:
            self.tokenizer: Tokenizer = (
                shared.tokenizer if shared else Tokenizer.from_file(str(directory / TOKENIZER_FILE))
            )
            self._template = _template(directory / TEMPLATE_FILE)
        except Exception as error:  # tokenizers raises bare Exception
            raise DeployError(Code.LOAD_FAILED, f"tokenizer or chat template of {directory}: {error}") from error
        if shared is None:
            self.tokenizer.no_padding()
            self.tokenizer.no_truncation()
        self.vocabulary: Vocabulary = shared.vocabulary if shared else Vocabulary(self.tokenizer)
        decoder = config if isinstance(config, DecoderConfig) else None
        self._names = {
            "bos_token": self._token_text(decoder.bos_token_id if decoder else None),
            "eos_token": self._token_text(next(iter(decoder.eos_token_ids), None) if decoder else None),
        }

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Tokens of `text`; `special` lets the tokenizer add its begin and end tokens."""
        return list(self.tokenizer.encode_batch_fast([text], add_special_tokens=special)[0].ids)

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of each text, with what the tokenizer adds."""
        return [list(encoding.ids) for encoding in self.tokenizer.encode_batch_fast(texts)]

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt of a conversation; raises InferenceError(bad_request) when the template refuses it."""
        if self._template is None:
            raise InferenceError(Code.BAD_REQUEST, "this model has no chat template; use /v1/completions", 400)
        pieces: list[str] = []
        room = PROMPT_LIMIT_CHARACTERS
        try:
            for piece in self._template.generate(messages=messages, add_generation_prompt=True, **self._names):
                room -= len(piece)
                if room < 0:
                    raise InferenceError(Code.BAD_REQUEST, "the conversation is too long; send less of it", 400)
                pieces.append(piece)
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise InferenceError(
                Code.BAD_REQUEST, f"the model's chat template refuses the messages: {error}", 400
            ) from error
        return "".join(pieces)

    def _token_text(self, token: int | None) -> str:
        return (self.tokenizer.id_to_token(token) or "") if token is not None else ""


class Detokeniser:
    """Tokens one by one to pieces of text that are whole characters; bytes that can be none become U+FFFD.

    Joined, the pieces are the text of all tokens.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._drops_space = vocabulary.drops_first_space

    @property
    def within_character(self) -> bool:
        """Whether the last bytes may become a character with the next."""
        return bool(self._decoder.getstate()[0])

    def feed(self, token: int) -> str:
        """The text that `token` completes, often none."""
        text = self._decoder.decode(self._vocabulary.bytes_of(token) or b"")
        if text and self._drops_space:
            self._drops_space = False
            return text.removeprefix(" ")
        return text

    def finish(self) -> str:
        """What is held, which never became a character."""
        return self._decoder.decode(b"", final=True)


@dataclass(slots=True)
class StopStrings:
    """Cuts text at the stop string that is complete first; of two complete at once, at the one that began first."""

    stops: tuple[str, ...]
    stopped: bool = False
    _held: str = ""

    def feed(self, piece: str) -> str:
        """What of `piece` and the text held can be given out; nothing more once `stopped`."""
        if not self.stops or self.stopped:
            return "" if self.stopped else piece
        text = self._held + piece
        found = [(at + len(stop), at) for stop in self.stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        hold = max(_overlap(text, stop) for stop in self.stops)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold]

    def finish(self) -> str:
        """The text held, when no stop string came."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop` and is not all of it."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def _template(path: Path) -> jinja2.Template | None:
    """As Hugging Face renders chat templates (transformers, chat_template_utils.py), in the sandbox that they use."""
    try:
        source = read_bounded(path, TEMPLATE_LIMIT_BYTES).decode()
    except FileNotFoundError:
        return None
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.globals["raise_exception"] = _refuse
    return environment.from_string(source)


def _refuse(message: Any) -> None:
    raise jinja2.TemplateError(str(message))
