"""The steps that a recipe may have: commands of the forge, their options by the names of the command line.

A new step is a line in STEPS, when its command takes first what it works on and makes its result at `out`. What options
there are, and of which type, is read from the command itself, so that a recipe and a command line cannot part.
"""

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum, StrEnum
from functools import cache, reduce
from operator import or_
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from pydantic import BaseModel, Field, ValidationError, create_model
from typer.models import OptionInfo

from cli.building import build, release
from cli.quantising import quantise
from cli.shrinking import distil, prune, train_quantised, trim_vocabulary
from cli.terminal import AsJson, progress
from forge.bounds import WINDOWS, Demand, measure_quality, parse_bounds
from host.files import write_atomically
from host.settings import Settings, first_fault
from wire.documents import encode_document
from wire.errors import ConfigError


class Thing(StrEnum):
    """What a step takes or makes."""

    CHECKPOINT = "checkpoint"
    VERSION = "version"
    RELEASE = "release"
    FIGURES = "figures"


def hold_to_quality(
    version_dir: Path,
    out: Path,
    windows: Path | None = None,
    checkpoint: Path | None = None,
    min_quality: str | None = None,
    limit: int = WINDOWS,
    as_json: AsJson = False,
) -> None:
    """Measure a version as `forge release` does, without releasing it, and write the figures to the file `out`."""
    bounds = parse_bounds(min_quality) if min_quality is not None else None
    with progress() as report:
        quality = measure_quality(version_dir, Demand(windows, checkpoint, bounds, limit), report)
    write_atomically(out, encode_document(quality), mode=0o644)
    if as_json:
        print(json.dumps(quality.model_dump(exclude_none=True)))


@dataclass(frozen=True, slots=True)
class Kind:
    """A step: its command, what that takes first, and what it makes; figures leave the next step what this one took."""

    command: Callable[..., None]
    takes: Thing
    makes: Thing


STEPS = {
    "prune": Kind(prune, Thing.CHECKPOINT, Thing.CHECKPOINT),
    "trim-vocabulary": Kind(trim_vocabulary, Thing.CHECKPOINT, Thing.CHECKPOINT),
    "distil": Kind(distil, Thing.CHECKPOINT, Thing.CHECKPOINT),
    "train-quantised": Kind(train_quantised, Thing.CHECKPOINT, Thing.CHECKPOINT),
    "build": Kind(build, Thing.CHECKPOINT, Thing.VERSION),
    "quantise": Kind(quantise, Thing.CHECKPOINT, Thing.VERSION),
    "evaluate": Kind(hold_to_quality, Thing.VERSION, Thing.FIGURES),
    "release": Kind(release, Thing.VERSION, Thing.RELEASE),
}
GIVEN = {"out", "name", "version", "as_json", "resume"}
"""Parameters that the recipe as a whole decides, beside the first."""


def read_options(step: str, fields: Mapping[str, Any], where: str, beside: Path) -> dict[str, Any]:
    """Options of a step by parameter; paths are relative to the folder `beside`. Raises ConfigError that begins with
    `where` and names the option."""
    try:
        found = _options_model(step).model_validate(dict(fields))
    except ValidationError as error:
        raise ConfigError(f"{where}: {first_fault(error)}") from error
    options = {name: _resolved(getattr(found, name), beside) for name in type(found).model_fields}
    for name, value in options.items():
        for path in value if isinstance(value, list) else [value]:
            if isinstance(path, Path) and not path.exists():
                raise ConfigError(f"{where}: {name.replace('_', '-')}: {path} is not there; correct the path")
    if options.get("min_quality") is not None:
        parse_bounds(options["min_quality"])
    return options


def source_parameter(kind: Kind) -> str:
    """The command's parameter for what it works on."""
    return next(iter(inspect.signature(kind.command).parameters))


@cache
def _options_model(step: str) -> type[BaseModel]:
    kind = STEPS[step]
    hints = get_type_hints(kind.command, include_extras=True)
    fields: dict[str, Any] = {}
    for name, parameter in inspect.signature(kind.command).parameters.items():
        if name in GIVEN or name == source_parameter(kind):
            continue
        told = [extra for extra in get_args(hints[name]) if isinstance(extra, OptionInfo)]
        required = parameter.default is inspect.Parameter.empty
        fields[name] = (
            Annotated[_spelled(hints[name]), Field(ge=told[0].min if told else None)],
            Field(... if required else parameter.default, alias=name.replace("_", "-")),
        )
    return create_model(step, __base__=Settings, **fields)


def _spelled(annotation: Any) -> Any:
    """The type with paths and choices read from strings, since TOML has nothing else for them."""
    parts = get_args(annotation)
    if isinstance(annotation, type) and not parts:
        return Annotated[annotation, Field(strict=False)] if issubclass(annotation, Path | Enum) else annotation
    if get_origin(annotation) is Annotated:
        return _spelled(parts[0])
    if get_origin(annotation) is list:
        return list[_spelled(parts[0])]  # type: ignore[misc]  # an annotation that is made here
    return reduce(or_, (_spelled(part) for part in parts))


def _resolved(value: Any, beside: Path) -> Any:
    if isinstance(value, list):
        return [_resolved(item, beside) for item in value]
    return beside / value if isinstance(value, Path) else value
