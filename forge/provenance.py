"""`amperage.json` beside a version's files: what the forge knows of it and no node needs.

It is not among the files of version.json, so that it changes no digest; a release takes it along in its manifests.
Nothing in it depends on when or where it was made.
"""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from host.files import read_bounded
from wire.documents import DOCUMENT_LIMIT_BYTES, Command, SchemaOne, encode_document, parse_document
from wire.errors import Code

PROVENANCE_FILE = "amperage.json"


class LeastNoticed(Command):
    """What golden vectors notice least of the damages that they were tried on."""

    damage: Annotated[str, Field(min_length=1, max_length=200)]
    ratio: Annotated[float, Field(ge=0)]
    """Its error as a multiple of their tolerance: below 1 such a damage is served."""

    def __str__(self) -> str:
        return f"{self.damage}: {self.ratio:g} times the tolerance"


class Provenance(Command):
    """The document."""

    schema_: SchemaOne = 1
    least_noticed: LeastNoticed


def write_provenance(directory: Path, provenance: Provenance) -> None:
    """Into a directory that is being made."""
    (directory / PROVENANCE_FILE).write_bytes(encode_document(provenance))


def read_provenance(directory: Path) -> Provenance | None:
    """None where there is none. Raises ArtifactError when it is no such document."""
    path = directory / PROVENANCE_FILE
    if not path.exists():
        return None
    return parse_document(Provenance, read_bounded(path, DOCUMENT_LIMIT_BYTES), code=Code.CORRUPT)
