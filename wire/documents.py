"""Bounded, strict, canonical JSON: the only way that documents enter and leave a process.

Canonical form: UTF-8, sorted keys, no white space, no trailing newline. The same model gives the same bytes on any
machine, so digests of documents are comparable.
"""

import json
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from wire.errors import ArtifactError, Code

DOCUMENT_LIMIT_BYTES = 64 * 1024
"""Largest release, manifest or trust document: a retained MQTT message that every broker accepts."""


SchemaOne = Annotated[Literal[1], Field(alias="schema")]
"""The `schema` number of a document; named schema_ in Python because pydantic owns `schema`."""


class Command(BaseModel):
    """A document that orders or identifies something: unknown fields are refused, because ignoring them is unsafe."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Report(BaseModel):
    """A document that tells something: a reader ignores fields of newer writers."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)


Document = TypeVar("Document", bound=BaseModel)


def encode_document(document: BaseModel) -> bytes:
    """Canonical JSON bytes of `document`."""
    plain = document.model_dump(mode="json", by_alias=True)
    return json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def parse_document(
    model: type[Document], data: bytes, *, limit_bytes: int = DOCUMENT_LIMIT_BYTES, code: Code = Code.BAD_DOCUMENT
) -> Document:
    """Parse untrusted `data` as `model`.

    Raises ArtifactError(code) when it is longer than `limit_bytes`, not JSON, or not of the model's form.
    """
    name = model.__name__
    if len(data) > limit_bytes:
        raise ArtifactError(
            code, f"{name} of {len(data)} bytes is over the limit of {limit_bytes}: publish a smaller one"
        )
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "document"
        raise ArtifactError(
            code, f"{name} refused at {where}: {first['msg']}; was it made by a newer version? Upgrade this side."
        ) from error
