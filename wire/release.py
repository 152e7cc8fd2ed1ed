"""A release: one version of one model, signed as a whole, with the artifacts that lead to it."""

from typing import Annotated, Self

from pydantic import Field, StringConstraints, model_validator

from wire.digest import Digest
from wire.documents import Command, SchemaOne
from wire.manifest import Name, Requirements, Size


class ArtifactRef(Command):
    """An artifact by the SHA-256 of its manifest document, with what it costs to fetch."""

    manifest: Digest
    wire_bytes: Size


class DeltaRef(ArtifactRef):
    """An artifact that needs `base` (a decoded digest) on the node."""

    base: Digest


class Variant(Command):
    """One way of building the version; the agent chooses the first whose requirements the node meets."""

    name: Name
    decoded: Digest
    full: ArtifactRef
    deltas: tuple[DeltaRef, ...] = ()
    requirements: Requirements


class Release(Command):
    """The payload of a release envelope (wire/signing.py, role `release`)."""

    schema_: SchemaOne = 1
    model: Name
    version: Annotated[str, StringConstraints(min_length=1, max_length=64, strict=True)]
    sequence: Annotated[int, Field(ge=1)]
    """Counts up with every release of the model, for people and for rollback protection."""
    variants: Annotated[tuple[Variant, ...], Field(min_length=1, max_length=16)]

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        if len({variant.name for variant in self.variants}) != len(self.variants):
            raise ValueError("two variants have one name")
        return self
