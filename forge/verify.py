"""Checking a release directory as a node would, before anybody publishes it."""

import tempfile
from pathlib import Path
from typing import Any

from codec.decoder import decode_pack
from codec.versions import read_version
from forge.release import RELEASE_FILE
from wire.digest import digest_of, verify_digest
from wire.documents import DOCUMENT_LIMIT_BYTES, parse_document
from wire.errors import ArtifactError, Code, ConfigError
from wire.manifest import Manifest
from wire.release import Release
from wire.signing import Role, TrustPolicy, open_envelope


def verify_release(directory: Path, trust: Path, base: Path | None) -> dict[str, Any]:
    """Check signature, documents, packs and decoded files; deltas only when `base` is given.

    Raises ArtifactError naming what is wrong.
    """
    policy = parse_document(TrustPolicy, _read(trust))
    envelope = _read(directory / RELEASE_FILE)
    release = parse_document(Release, open_envelope(envelope, Role.RELEASE, policy))
    figures: dict[str, Any] = {
        "release": digest_of(envelope), "model": release.model, "version": release.version,
        "sequence": release.sequence,
    }  # fmt: skip
    for variant in release.variants:
        _verify_artifact(directory, variant.full.manifest, variant.decoded, None)
        figures[f"{variant.name} full"] = "ok"
        for delta in variant.deltas:
            fits = base is not None and read_version(base).decoded_digest() == delta.base
            if fits:
                _verify_artifact(directory, delta.manifest, variant.decoded, base)
            figures[f"{variant.name} delta from {delta.base[:12]}"] = "ok" if fits else "not checked: give --base"
    return figures


def _verify_artifact(directory: Path, digest: str, decoded: str, base: Path | None) -> None:
    data = _read(directory / f"{digest}.manifest.json")
    verify_digest(data, digest, f"{digest[:12]}….manifest.json")
    manifest = parse_document(Manifest, data, code=Code.BAD_MANIFEST)
    if manifest.decoded != decoded:
        raise ArtifactError(Code.BAD_MANIFEST, "the manifest leads to another version than the release; sign it again")
    with tempfile.TemporaryDirectory(prefix="amperage-verify-") as scratch:
        decode_pack(manifest, directory / f"{digest}.pack", Path(scratch), base=base)


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as source:
            return source.read(2 * DOCUMENT_LIMIT_BYTES)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); is this a release directory?") from error
