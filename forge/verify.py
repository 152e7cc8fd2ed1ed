"""Checking what a release directory holds as a node would, before anybody publishes it.

Nothing is left behind: versions are decoded to a temporary directory.
"""

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from codec.decoder import decode_pack
from codec.inspection import check_frames, decode_sections, open_pack
from codec.versions import read_version
from forge.artifact import MANIFEST_SUFFIX, Artifact, read_artifact, read_input
from forge.progress import Progress, silent
from forge.release import RELEASE_FILE
from wire.digest import digest_of
from wire.documents import DOCUMENT_LIMIT_BYTES, parse_document
from wire.errors import ArtifactError, Code, ConfigError
from wire.release import Release
from wire.signing import Role, TrustPolicy, open_envelope

ENVELOPE_LIMIT_BYTES = 2 * DOCUMENT_LIMIT_BYTES
"""An envelope holds its payload in base64."""

OK = "ok"


def verify_release(
    directory: Path, trust: Path, base: Path | None, progress: Progress = silent
) -> dict[str, Any]:  # fmt: skip
    """Check signature, documents, packs and decoded files; deltas only when `base` is given.

    Raises ArtifactError naming the document, frame, section or file that is wrong.
    """
    release, digest = _open_release(directory, trust)
    figures: dict[str, Any] = {
        "release": digest, "model": release.model, "version": release.version, "sequence": release.sequence,
    }  # fmt: skip
    for variant in release.variants:
        full = read_artifact(directory / f"{variant.full.manifest}{MANIFEST_SUFFIX}")
        _check_leads_to(full, variant.decoded)
        _check_artifact(full, None, progress)
        figures[f"{variant.name} full"] = OK
        for delta in variant.deltas:
            fits = base is not None and read_version(base).decoded_digest() == delta.base
            if fits:
                artifact = read_artifact(directory / f"{delta.manifest}{MANIFEST_SUFFIX}")
                _check_leads_to(artifact, variant.decoded)
                _check_artifact(artifact, base, progress)
            figures[f"{variant.name} delta from {delta.base[:12]}"] = OK if fits else "not checked: give --base"
    return figures


def verify_artifact(
    path: Path, trust: Path | None, base: Path | None, progress: Progress = silent
) -> dict[str, Any]:  # fmt: skip
    """Check one artifact; with `trust` also that the signed release beside it names it.

    Raises ConfigError for a delta without `base`, ArtifactError naming the frame, section or file that is wrong.
    """
    artifact = read_artifact(path)
    manifest = artifact.manifest
    if manifest.base is not None and base is None:
        raise ConfigError(f"this is a delta; give --base with the directory of version {manifest.base[:12]}…")
    if trust is not None:
        _check_named(artifact, trust)
    figures = {
        "artifact": artifact.digest, "model": manifest.version.model, "version": manifest.version.version,
        "decoded": manifest.decoded, **_check_artifact(artifact, base, progress),
    }  # fmt: skip
    return {**figures, "signature": OK if trust else "not checked: give --trust, with release.json beside it"}


def _check_named(artifact: Artifact, trust: Path) -> None:
    release, digest = _open_release(artifact.path.parent, trust)
    for variant in release.variants:
        if artifact.digest in {ref.manifest for ref in (variant.full, *variant.deltas)}:
            _check_leads_to(artifact, variant.decoded)
            return
    raise ArtifactError(
        Code.BAD_MANIFEST, f"release {digest[:12]}… beside it does not name this artifact; make the release again"
    )


def _open_release(directory: Path, trust: Path) -> tuple[Release, str]:
    policy = parse_document(TrustPolicy, read_input(trust))
    envelope = read_input(directory / RELEASE_FILE, ENVELOPE_LIMIT_BYTES)
    return parse_document(Release, open_envelope(envelope, Role.RELEASE, policy)), digest_of(envelope)


def _check_leads_to(artifact: Artifact, decoded: str) -> None:
    if artifact.manifest.decoded != decoded:
        raise ArtifactError(Code.BAD_MANIFEST, "the manifest leads to another version than the release; sign it again")


def _check_artifact(artifact: Artifact, base: Path | None, progress: Progress) -> dict[str, int]:
    """Frames, then sections, then files: where it breaks first is nearest to the cause. Returns how many were right."""
    manifest, done = artifact.manifest, 0
    with open_pack(manifest, artifact.pack) as pack:
        frames = check_frames(pack, lambda done, total: progress("frames", done, total))
        total = sum(section.raw_size for section in pack.index.sections)
        for decoded in decode_sections(pack, base):
            done += decoded.section.raw_size
            progress("sections", done, total)
        sections = len(pack.index.sections)
    with tempfile.TemporaryDirectory(prefix="amperage-verify-") as scratch:
        decode_pack(manifest, artifact.pack, Path(scratch), base=base, progress=partial(progress, "files"))
    return {"frames": frames, "sections": sections, "files": len(manifest.version.files)}
