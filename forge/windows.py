"""Windows of token ids: the text that calibrates and judges models, as in samples/eval."""

import json
from collections.abc import Sequence
from pathlib import Path

from wire.errors import ConfigError

WINDOWS_LIMIT_BYTES = 16 * 1024 * 1024


def read_windows(path: Path) -> list[list[int]]:
    """Token windows from a JSON file with the key `tokens`: lists of token ids. Raises ConfigError when it has none."""
    try:
        with path.open("rb") as source:
            windows = json.loads(source.read(WINDOWS_LIMIT_BYTES))["tokens"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _no_windows(path, str(error)) from error
    if not isinstance(windows, list) or not windows or not all(isinstance(window, list) for window in windows):
        raise _no_windows(path, "`tokens` is no list of lists")
    if not all(type(token) is int for window in windows for token in window):
        raise _no_windows(path, "a token is no whole number")
    return windows


def _no_windows(path: Path, why: str) -> ConfigError:
    return ConfigError(f"{path} holds no token windows ({why}); use a file like samples/eval/*.json")


def fit_windows(
    windows: Sequence[Sequence[int]], vocab_size: int, longest: int, *, shortest: int = 2
) -> list[list[int]]:
    """The windows cut to `longest` tokens, what a model takes.

    Raises ConfigError when there is none, or when one has fewer tokens than `shortest` or such as the model has not.
    """
    for window in windows:
        if len(window) < shortest or not 0 <= min(window) <= max(window) < vocab_size:
            raise ConfigError(
                f"a window has fewer than {shortest} tokens, or tokens that are not of this model's {vocab_size}; make "
                "the windows with its tokenizer"
            )
    if not windows:
        raise ConfigError("there is no window of tokens to read; make some with the model's tokenizer")
    return [list(window[:longest]) for window in windows]
