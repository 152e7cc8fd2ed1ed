"""Settings: a TOML file becomes a frozen, strict model, or an error that names the file and the key.

Invariant: nothing else reads TOML, and no setting has an effect unless its model declares it.
"""

from pathlib import Path
from typing import Annotated, TypeVar

import tomli
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from host.files import read_bounded
from wire.errors import ConfigError, StoreError

SETTINGS_LIMIT_BYTES = 256 * 1024

FilePath = Annotated[Path, Field(strict=False)]
"""A path in settings: TOML only has strings."""


class Settings(BaseModel):
    """Base of every settings table: an unknown key is a typing error of the operator, not a wish to be ignored."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


Model = TypeVar("Model", bound=BaseModel)


def load_settings(model: type[Model], path: Path) -> Model:
    """Read the TOML file `path` as `model`; raises ConfigError naming file and key."""
    try:
        text = read_bounded(path, SETTINGS_LIMIT_BYTES).decode()
        table = tomli.loads(text)
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file; give the settings with --settings") from error
    except (StoreError, UnicodeDecodeError, tomli.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: {error}; it must be a readable TOML file") from error
    try:
        return model.model_validate(table)
    except ValidationError as error:
        raise ConfigError(f"{path}: {first_fault(error)}") from error


def first_fault(error: ValidationError) -> str:
    """The key that is wrong, and what to do, for people."""
    first = error.errors(include_url=False, include_input=False)[0]
    key = ".".join(str(part) for part in first["loc"]) or "the file"
    if first["type"] == "extra_forbidden":
        return f"{key}: no such setting; remove it or correct its spelling"
    return f"{key}: {first['msg']}; correct it"
