"""Releases that were published: verified once on their way in, and announced as retained documents.

Invariant: a release is in the database only when its signature counts and its manifests and packs are in the library
and are what the release says of them; so whatever a node is ordered to run can be fetched here.
"""

from dataclasses import dataclass

import structlog

from fleet.database import Database
from fleet.library import Library
from fleet.outbox import Outbox
from wire.digest import digest_of
from wire.documents import parse_document
from wire.errors import ArtifactError, Code, ConfigError
from wire.release import ArtifactRef, Release, Variant
from wire.signing import Role, TrustPolicy, open_envelope
from wire.topics import Topics

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Stores:
    """What is on the control plane's disk."""

    database: Database
    library: Library


class Releases:
    """Takes, finds and announces releases; callable from any thread."""

    def __init__(self, stores: Stores, trust: TrustPolicy, topics: Topics, outbox: Outbox) -> None:
        self._database = stores.database
        self._library = stores.library
        self._trust = trust
        self._topics = topics
        self._outbox = outbox

    def add(self, envelope: bytes) -> tuple[str, Release]:
        """Verify, keep and announce a release.

        Raises ArtifactError: signature faults, bad_document, document_missing, bad_manifest.
        """
        release = self._open(envelope)
        digest = digest_of(envelope)
        for variant in release.variants:
            self._check_artifact(variant, variant.full, None)
            for delta in variant.deltas:
                self._check_artifact(variant, delta, delta.base)
        self._database.save_release(digest, (release.model, release.version, release.sequence), envelope)
        self._announce(digest, envelope, release)
        log.info("release_published", model=release.model, version=release.version, release=digest)
        return digest, release

    def find(self, digest: str) -> Release:
        """A release by its digest; raises ConfigError(document_missing)."""
        envelope = self._database.release_envelope(digest)
        if envelope is None:
            raise ConfigError(
                f"release {digest[:12]}… is not here; publish it with `amperage fleet publish`", Code.DOCUMENT_MISSING
            )
        return self._open(envelope)

    def announce_all(self) -> None:
        """Publish every document anew: a broker without persistence has forgotten them."""
        for row in self._database.releases():
            envelope = self._database.release_envelope(row["release"]) or b""
            try:
                self._announce(row["release"], envelope, self._open(envelope))
            except ArtifactError as error:  # the trust policy may have changed since
                log.warning("release_not_published", release=row["release"], code=str(error.code), reason=error.message)

    def _open(self, envelope: bytes) -> Release:
        return parse_document(Release, open_envelope(envelope, Role.RELEASE, self._trust))

    def _check_artifact(self, variant: Variant, reference: ArtifactRef, base: str | None) -> None:
        manifest = self._library.manifest(reference.manifest)
        name = f"artifact {reference.manifest[:12]}…"
        if self._library.pack_path(reference.manifest) is None:
            raise ArtifactError(Code.DOCUMENT_MISSING, f"the pack of {name} is not here; upload it before the release")
        if manifest.decoded != variant.decoded or manifest.base != base:
            raise ArtifactError(Code.BAD_MANIFEST, f"{name} is not what the release says of it; make the release again")

    def _announce(self, digest: str, envelope: bytes, release: Release) -> None:
        self._outbox.put(self._topics.document(digest), envelope, retain=True)
        for variant in release.variants:
            for reference in (variant.full, *variant.deltas):
                manifest = self._library.document(reference.manifest)
                if manifest is not None:
                    self._outbox.put(self._topics.document(reference.manifest), manifest, retain=True)
