"""How well a version knows the judging windows, in figures that compare although a recipe changes the tokens.

A version with fewer tokens reads each token that it lacks as the ones that make it up, so that it reads the same bytes.
Its perplexity is told for each token of the original, however many it takes itself; what it makes of single tokens has
no counterpart, so that there is no divergence.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from benchmarks.decoder_models import SAMPLE
from codec.versions import read_version
from forge.evaluate import evaluate_version, window_losses
from forge.reference import shipped_judge
from forge.windows import read_windows
from wire.errors import ConfigError

TOKENIZER = "tokenizer.json"
FIGURES = ("perplexity", "kl_nats_of_checkpoint", "top1_agreement_of_checkpoint")
"""Of `forge evaluate --checkpoint`."""


@dataclass(frozen=True, slots=True)
class Quality:
    """Perplexity for each token of the original, and the same in bits for each byte of text; divergence from the
    original in nats, and how often the best token is the same, where these can be told."""

    perplexity: float
    bits_per_byte: float
    kl_nats: float | None = None
    top1_agreement: float | None = None


def judge_version(directory: Path, judging: Path) -> Quality:
    """Against the sample's checkpoint in float32, on the windows of its tokens in the file `judging`."""
    windows = read_windows(judging)
    whole, own = (Tokenizer.from_file(str(folder / TOKENIZER)) for folder in (SAMPLE, directory))
    tokens = sum(len(window) - 1 for window in windows)  # no model is asked for the first of each
    size_bytes = sum(len(_name(whole, token)) for window in windows for token in window[1:])  # a letter is a byte

    def quality(perplexity: float, *others: float) -> Quality:
        return Quality(perplexity, math.log2(perplexity) * tokens / size_bytes, *others)

    if whole.get_vocab() == own.get_vocab():
        found = evaluate_version(directory, judging, len(windows), checkpoint=SAMPLE)
        return quality(*(found[name] for name in FIGURES))
    judge = shipped_judge(directory, read_version(directory))
    losses = [window_losses(judge, respelled(window, whole, own)).sum() for window in windows]
    return quality(math.exp(sum(losses) / tokens))


def respelled(window: Sequence[int], whole: Tokenizer, own: Tokenizer) -> list[int]:
    """The bytes of `window`, tokens of `whole`, in tokens of `own`."""
    spelled = []
    for token in window:
        name = _name(whole, token)
        number = own.token_to_id(name)
        spelled += [part.id for part in own.model.tokenize(name)] if number is None else [number]
    return spelled


def _name(tokenizer: Tokenizer, token: int) -> str:
    name = tokenizer.id_to_token(token)
    if name is None:
        raise ConfigError(f"token {token} of the windows is none of the sample's; take windows that were made for it")
    return name
