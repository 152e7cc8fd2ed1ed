"""Reading the JSON files of a checkpoint, which anybody may have written: bounded, and field by field.

Nothing is guessed: a field that is missing, of another type or out of range ends in one sentence that names it.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wire.errors import ConfigError

CONFIG_LIMIT_BYTES = 1 << 20
REMEDY = "take it from the same export as the weights"


@dataclass(frozen=True, slots=True)
class Configuration:
    """A JSON object, its fields read by type; every method raises ConfigError naming the field. `null` is absent."""

    path: Path
    fields: dict[str, Any]

    def count(self, name: str, *, default: int | None = None, most: int = 1 << 22) -> int:
        """A whole number from 1 to `most`."""
        value = self._present(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise self.refusal(name, f"no whole number from 1 to {most}")
        return value

    def number(self, name: str, *, default: float | None = None) -> float:
        """A finite number over 0."""
        value = self._present(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not (value > 0 and math.isfinite(value)):
            raise self.refusal(name, "no finite number over 0")
        return float(value)

    def flag(self, name: str) -> bool:
        """True or false; absent is false."""
        value = self._present(name, False)
        if not isinstance(value, bool):
            raise self.refusal(name, "neither true nor false")
        return value

    def tokens(self, name: str, vocab_size: int) -> tuple[int, ...]:
        """One token, a list of tokens, or none; each must be below `vocab_size`."""
        value = self.fields.get(name)
        listed = value if isinstance(value, list) else [] if value is None else [value]
        if any(isinstance(token, bool) or not isinstance(token, int) for token in listed) or not all(
            0 <= token < vocab_size for token in listed
        ):
            raise self.refusal(name, f"no token below vocab_size {vocab_size}")
        return tuple(listed)

    def nested(self, name: str) -> "Configuration":
        """An object inside; absent is empty."""
        value = self._present(name, {})
        if not isinstance(value, dict):
            raise self.refusal(name, "no JSON object")
        return Configuration(self.path, value)

    def refusal(self, name: str, what: str) -> ConfigError:
        """The error for a field that is `what`."""
        said = repr(self.fields.get(name))
        return ConfigError(f"{self.path}: {name} is wrong, {said[:60]} is {what}; {REMEDY}")

    def _present(self, name: str, default: Any) -> Any:
        value = self.fields.get(name)
        value = default if value is None else value
        if value is None:
            raise ConfigError(f"{self.path}: {name} is missing; {REMEDY}")
        return value


def read_json(path: Path, limit_bytes: int = CONFIG_LIMIT_BYTES) -> Any:
    """What a JSON file of a checkpoint holds, bounded. Raises ConfigError."""
    try:
        with path.open("rb") as source:
            return json.loads(source.read(limit_bytes))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); point at a folder with {path.name}") from error


def read_config(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object. Raises ConfigError."""
    config = read_json(path)
    if not isinstance(config, dict):
        raise ConfigError(f"{path} holds no JSON object; take it from the same export")
    return config


def architectures_of(config: dict[str, Any]) -> list[str]:
    """The names under `architectures`; whatever else stands there counts as none."""
    names = config.get("architectures")
    return [str(name) for name in names] if isinstance(names, list) else []
