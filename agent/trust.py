"""Whose signature counts on this node: a port, and its present implementation over trust.json.

Invariant: nothing of a release or of a desired state is looked at before its envelope was opened here. The port is the
seam where TUF takes over (docs/design.md section 4): callers name a role and never see keys.
"""

from pathlib import Path
from typing import Protocol

from host.files import read_bounded
from wire.documents import DOCUMENT_LIMIT_BYTES, parse_document
from wire.errors import ArtifactError, ConfigError, StoreError
from wire.signing import Role, TrustPolicy, open_envelope


class Trust(Protocol):
    """Opens what arrived from the network."""

    def open(self, envelope: bytes, role: Role) -> bytes:
        """The signed payload; raises ArtifactError (bad_document, unknown_signer, bad_signature)."""
        ...


class PinnedTrust:
    """Trust in the keys of one TrustPolicy, fixed until the process starts anew."""

    def __init__(self, policy: TrustPolicy) -> None:
        self._policy = policy

    def open(self, envelope: bytes, role: Role) -> bytes:
        """See Trust.open."""
        return open_envelope(envelope, role, self._policy)


def load_trust(path: Path) -> PinnedTrust:
    """Read trust.json; raises ConfigError, because an agent without trust can do nothing."""
    try:
        document = read_bounded(path, DOCUMENT_LIMIT_BYTES)
        return PinnedTrust(parse_document(TrustPolicy, document))
    except FileNotFoundError as error:
        raise ConfigError(f"trust: {path} is missing; copy trust.json of the operator's keys to it") from error
    except (StoreError, ArtifactError) as error:
        raise ConfigError(f"trust: {path}: {error.message}") from error
