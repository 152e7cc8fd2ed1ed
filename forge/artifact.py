"""Artifacts as they lie in a release directory: `NAME.manifest.json` and `NAME.pack` beside it.

Nothing here writes; a manifest is bounded before it is parsed.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from host.files import read_bounded
from wire.digest import digest_of, verify_digest
from wire.documents import DOCUMENT_LIMIT_BYTES, parse_document
from wire.errors import Code, ConfigError
from wire.manifest import Manifest

MANIFEST_SUFFIX = ".manifest.json"
PACK_SUFFIX = ".pack"
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Artifact:
    """One artifact on disk; `digest` is the SHA-256 of the manifest, its name on the wire."""

    path: Path
    pack: Path
    digest: str
    manifest: Manifest
    manifest_bytes: int


def read_artifact(path: Path) -> Artifact:
    """The artifact of a manifest; its pack may be named as well.

    Raises ConfigError when `path` names none, ArtifactError when the manifest is none, or not the one it is named for.
    """
    name = path.name.removesuffix(MANIFEST_SUFFIX).removesuffix(PACK_SUFFIX)
    if name == path.name:
        raise ConfigError(
            f"{path} is no artifact: name a *{MANIFEST_SUFFIX} that a release directory holds, its pack beside it"
        )
    document = path.with_name(name + MANIFEST_SUFFIX)
    data = read_input(document)
    if _DIGEST.fullmatch(name):
        verify_digest(data, name, document.name)
    manifest = parse_document(Manifest, data, code=Code.BAD_MANIFEST)
    return Artifact(document, path.with_name(name + PACK_SUFFIX), digest_of(data), manifest, len(data))


def artifacts_in(directory: Path) -> tuple[Artifact, ...]:
    """All artifacts of a release directory, full ones first. Raises ConfigError when there is none, ArtifactError."""
    found = [read_artifact(path) for path in sorted(directory.glob(f"*{MANIFEST_SUFFIX}"))]
    if not found:
        raise ConfigError(f"{directory} holds no artifact; is it a release directory?")
    return tuple(sorted(found, key=lambda artifact: artifact.manifest.base is not None))


def read_input(path: Path, limit_bytes: int = DOCUMENT_LIMIT_BYTES) -> bytes:
    """A small file that a command was given; ConfigError when it is missing, StoreError when it is longer."""
    try:
        return read_bounded(path, limit_bytes)
    except FileNotFoundError as error:
        raise ConfigError(f"{path} is missing; is this a release directory, and whole?") from error
