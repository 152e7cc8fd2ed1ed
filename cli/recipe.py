"""`amperage forge recipe`: a whole way from a checkpoint to a release as one file, run as far as it is not done.

Every step makes its result in the work folder under a temporary name, and renames it; then its note, beside it, gets
the digest of all that decided the result. A step whose note says the same as before, and whose result is as noted, is
not run again. A kill leaves a temporary name that the next run removes, or a training state that it goes on from.
"""

import hashlib
import io
import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import Field
from rich.table import Table

from cli.recipe_steps import STEPS, Kind, Thing, read_options, source_parameter
from cli.terminal import AsJson, console
from forge.provenance import digest_of_file, tools
from host.files import read_bounded, write_atomically
from host.settings import FilePath, Settings, load_settings
from wire.digest import Digest, digest_of
from wire.documents import Command, encode_document, parse_document
from wire.errors import ArtifactError, ConfigError
from wire.manifest import Name

NOTE_LIMIT_BYTES = 4096


class Recipe(Settings):
    """The file: what the result is called, the checkpoint that it begins with, and steps, each with `do`."""

    model: Name
    version: Annotated[str, Field(min_length=1, max_length=64)]
    source: FilePath
    step: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=32)]


class Note(Command):
    """What made a result, and the result's own digest."""

    made_of: Digest
    result: Digest


@dataclass(frozen=True, slots=True)
class Planned:
    """One step with its options by parameter; `folder` is the work folder."""

    number: int
    do: str
    kind: Kind
    options: Mapping[str, Any]
    folder: Path

    @property
    def result(self) -> Path:
        """Where its result is."""
        return self.folder / f"{self.number:02}-{self.do}"

    @property
    def temporary(self) -> Path:
        """Where it is made."""
        return self.folder / f".{self.number:02}-{self.do}.making"

    @property
    def note(self) -> Path:
        """Where its note is."""
        return self.folder / f"{self.number:02}-{self.do}.note"

    @property
    def begun(self) -> Path:
        """Tells what the last try was made of, for training that goes on."""
        return self.folder / f".{self.number:02}-{self.do}.begun"


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a step is: `made` now, as `before`, or to `do`; figures of one made now."""

    planned: Planned
    state: str
    figures: Any = None


def recipe(
    file: Annotated[Path, typer.Argument(help="TOML file; its paths are relative to its own folder.")],
    work: Annotated[Path, typer.Option(help="Folder for the results of all steps; the same one goes on.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be done.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run the steps of a recipe that are not done yet, from a checkpoint to a release."""
    read = load_settings(Recipe, file)
    steps = plan(read, file.absolute().parent, work)
    outcomes = list(_run(read, file.absolute().parent / read.source, steps, dry_run=dry_run))
    if as_json:
        rows = [
            {"step": one.planned.do, "state": one.state, "result": str(one.planned.result), "figures": one.figures}
            for one in outcomes
        ]
        print(json.dumps(rows))
        return
    table = Table("step", "state", "result", title=f"{read.model} {read.version}")
    for one in outcomes:
        table.add_row(one.planned.do, one.state, str(one.planned.result))
    console().print(table)


def plan(read: Recipe, beside: Path, work: Path) -> list[Planned]:
    """The steps, checked: names, options, and that each gets what it takes. Raises ConfigError."""
    if not (beside / read.source).is_dir():
        raise ConfigError(f"source: {beside / read.source} is no folder; name that of the checkpoint")
    at, maker, steps = Thing.CHECKPOINT, "the source is", []
    for number, fields in enumerate(read.step, 1):
        do = fields.get("do")
        if do not in STEPS:
            raise ConfigError(f"step {number}: do = {do!r} is no step; choose one of {', '.join(STEPS)}")
        where, kind = f"step {number} ({do})", STEPS[do]
        if kind.takes is not at:
            raise ConfigError(f"{where} takes a {kind.takes}, but {maker} a {at}; put it elsewhere")
        options = read_options(do, {name: value for name, value in fields.items() if name != "do"}, where, beside)
        steps.append(Planned(number, do, kind, options, work))
        if kind.makes is not Thing.FIGURES:
            at, maker = kind.makes, f"step {number} ({do}) makes"
    return steps


def _run(read: Recipe, source: Path, steps: Sequence[Planned], *, dry_run: bool) -> Iterator[Outcome]:
    """Do what is not done; in a dry run only tell."""
    current, stale = source, False
    for planned in steps:
        made_of = "" if stale else _made_of(read, planned, current)
        if not stale and _is_done(planned, made_of):
            yield Outcome(planned, "before")
        elif dry_run:
            stale = True
            yield Outcome(planned, "do")
        else:
            print(f"step {planned.number} of {len(steps)}: {planned.do}", file=sys.stderr, flush=True)
            yield Outcome(planned, "made", _make(read, planned, current, made_of))
        if planned.kind.makes is not Thing.FIGURES:
            current = planned.result


def _make(read: Recipe, planned: Planned, source: Path, made_of: str) -> Any:
    """Run a step; returns its figures."""
    planned.folder.mkdir(parents=True, exist_ok=True)
    training = planned.temporary.with_name(f".{planned.temporary.name}.training")
    goes_on = planned.begun.exists() and read_bounded(planned.begun, NOTE_LIMIT_BYTES).decode() == made_of
    for path in (planned.note, planned.result, planned.temporary, *([] if goes_on else [training])):
        _remove(path)
    write_atomically(planned.begun, made_of.encode(), mode=0o644)
    accepted = planned.kind.command.__annotations__
    given = {"name": read.model, "version": read.version, "resume": goes_on and training.exists()}
    told = io.StringIO()
    with redirect_stdout(told):
        planned.kind.command(
            **{source_parameter(planned.kind): source, "out": planned.temporary, "as_json": True, **planned.options},
            **{name: value for name, value in given.items() if name in accepted},
        )
    note = Note(made_of=made_of, result=_digest_of_tree(planned.temporary))
    planned.temporary.rename(planned.result)
    write_atomically(planned.note, encode_document(note), mode=0o644)
    planned.begun.unlink()
    return json.loads(told.getvalue())


def _is_done(planned: Planned, made_of: str) -> bool:
    if not (planned.note.exists() and planned.result.exists()):
        return False
    try:
        note = parse_document(Note, read_bounded(planned.note, NOTE_LIMIT_BYTES))
    except ArtifactError:
        return False
    return note.made_of == made_of and note.result == _digest_of_tree(planned.result)


def _made_of(read: Recipe, planned: Planned, source: Path) -> str:
    """SHA-256 of what decides a step's result."""
    parts = {
        "do": planned.do, "source": _digest_of_tree(source), "model": read.model, "version": read.version,
        "tools": tools(), "options": {name: _told(value) for name, value in planned.options.items()},
    }  # fmt: skip
    return digest_of(json.dumps(parts, sort_keys=True).encode())


def _told(value: Any) -> Any:
    """An option as JSON; of files and folders their digests."""
    if isinstance(value, Path):
        return _digest_of_tree(value)
    if isinstance(value, list):
        return [_told(item) for item in value]
    return value.value if isinstance(value, Enum) else value


def _digest_of_tree(path: Path) -> str:
    """SHA-256 of a file, or of the names and digests of all files of a folder."""
    if path.is_file():
        return digest_of_file(path)
    found = hashlib.sha256()
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        found.update(f"{digest_of_file(file)}  {file.relative_to(path).as_posix()}\n".encode())
    return found.hexdigest()


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
