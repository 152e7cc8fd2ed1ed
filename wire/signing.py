"""Signed envelopes, and the policy that says whose signature counts for what.

The envelope is DSSE (https://github.com/secure-systems-lab/dsse, protocol v1.0.2): signatures cover the
pre-authentication encoding of type and payload, never re-serialised JSON. Keys are Ed25519 (RFC 8032). `TrustPolicy`
is the seam where TUF's root and targets roles take over: callers ask `open_envelope` for a role and never see keys.
"""

import base64
import binascii
from enum import StrEnum
from typing import Annotated, Self

from pydantic import Field, StringConstraints, model_validator
from securesystemslib.exceptions import UnverifiedSignatureError
from securesystemslib.signer._key import SSlibKey
from securesystemslib.signer._signature import Signature as LibrarySignature

from wire.digest import Digest, digest_of
from wire.documents import Command, parse_document
from wire.errors import ArtifactError, Code

PAYLOAD_TYPES = {"release": "application/vnd.amperage.release+json", "desired": "application/vnd.amperage.desired+json"}


class Role(StrEnum):
    """What a key may sign."""

    RELEASE = "release"
    DESIRED = "desired"


class EnvelopeSignature(Command):
    """One signature; `sig` is base64 of 64 bytes."""

    keyid: Digest
    sig: Annotated[str, StringConstraints(max_length=128, strict=True)]


class Envelope(Command):
    """A DSSE envelope with a base64 payload."""

    payloadType: Annotated[str, StringConstraints(max_length=128, strict=True)]  # noqa: N815  DSSE's own field name
    payload: Annotated[str, StringConstraints(max_length=64 * 1024, strict=True)]
    signatures: Annotated[tuple[EnvelopeSignature, ...], Field(min_length=1, max_length=16)]


class PublicKey(Command):
    """An Ed25519 public key, 32 bytes in hex."""

    ed25519: Digest

    @property
    def keyid(self) -> str:
        """SHA-256 of the 32 key bytes."""
        return digest_of(bytes.fromhex(self.ed25519))


class RoleKeys(Command):
    """Keys of a role and how many different ones must sign."""

    keys: Annotated[tuple[PublicKey, ...], Field(min_length=1, max_length=16)]
    threshold: Annotated[int, Field(ge=1, le=16)] = 1

    @model_validator(mode="after")
    def _check_threshold(self) -> Self:
        if self.threshold > len({key.keyid for key in self.keys}):
            raise ValueError("threshold is larger than the number of keys")
        return self


class TrustPolicy(Command):
    """`trust.json` on a node: who may sign releases and who may sign desired state."""

    release: RoleKeys
    desired: RoleKeys

    def keys_of(self, role: Role) -> RoleKeys:
        """The keys and threshold of `role`."""
        return self.release if role is Role.RELEASE else self.desired


def pre_authentication_encoding(payload_type: str, payload: bytes) -> bytes:
    """DSSE's PAE: the exact bytes that are signed."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def open_envelope(data: bytes, role: Role, policy: TrustPolicy) -> bytes:
    """Verify the envelope `data` for `role` and return its payload bytes.

    Raises ArtifactError: bad_document (form, type), unknown_signer (no signature by a key of the role),
    bad_signature (a key of the role is named but does not verify, or fewer than the threshold do).
    """
    envelope = _parse(data, role)
    payload = _decode(envelope.payload)
    signed = pre_authentication_encoding(envelope.payloadType, payload)
    role_keys = policy.keys_of(role)
    trusted = {key.keyid: key for key in role_keys.keys}
    named = [signature for signature in envelope.signatures if signature.keyid in trusted]
    if not named:
        signer = envelope.signatures[0].keyid[:12]
        raise ArtifactError(
            Code.UNKNOWN_SIGNER,
            f"{role} is signed by key {signer}…, which this node does not trust; sign it with a key of trust.json "
            "or enrol the node anew",
        )
    valid = {signature.keyid for signature in named if _verifies(trusted[signature.keyid], signature, signed)}
    if len(valid) < role_keys.threshold:
        raise ArtifactError(
            Code.BAD_SIGNATURE,
            f"{role} carries {len(valid)} valid signatures of trusted keys and needs {role_keys.threshold}; "
            "it was altered after signing or signed by too few: sign it again",
        )
    return payload


def unverified_payload(data: bytes, role: Role) -> bytes:
    """The payload of an envelope that nobody has checked: good for passing it on, never for acting on it.

    Raises ArtifactError(bad_document).
    """
    return _decode(_parse(data, role).payload)


def _parse(data: bytes, role: Role) -> Envelope:
    envelope = parse_document(Envelope, data)
    if envelope.payloadType != PAYLOAD_TYPES[role]:
        raise ArtifactError(Code.BAD_DOCUMENT, f"envelope is of type {envelope.payloadType}, not a {role}")
    return envelope


def _verifies(key: PublicKey, signature: EnvelopeSignature, signed: bytes) -> bool:
    library_key = SSlibKey(key.keyid, "ed25519", "ed25519", {"public": key.ed25519})
    try:
        library_key.verify_signature(LibrarySignature(key.keyid, _decode(signature.sig).hex()), signed)
    except UnverifiedSignatureError:
        return False
    return True


def _decode(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ArtifactError(Code.BAD_DOCUMENT, "envelope holds invalid base64; fetch it again") from error
