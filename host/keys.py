"""Private keys of the producer and the control plane: Ed25519 in PKCS#8 PEM files, mode 0600. Never on a node.

The only module that imports cryptography; a node verifies with wire/signing.py. A crash leaves no key or a whole one.
"""

import base64
import os
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from host.files import read_bounded, write_atomically
from wire.documents import DOCUMENT_LIMIT_BYTES, encode_document
from wire.errors import ArtifactError, Code, ConfigError, StoreError
from wire.signing import (
    PAYLOAD_TYPES,
    Envelope,
    EnvelopeSignature,
    PublicKey,
    Role,
    pre_authentication_encoding,
)

KEY_LIMIT_BYTES = 4096
ENVELOPE_OVERHEAD_BYTES = 1024
"""More than field names, type, key identity and one signature take."""
KEY_MODE = 0o600


@dataclass(frozen=True, slots=True)
class Signer:
    """Signs envelopes with one key; its repr shows the public half only."""

    public: PublicKey
    _private: Ed25519PrivateKey

    def __repr__(self) -> str:
        return f"Signer({self.public.keyid[:12]}…)"

    def sign(self, role: Role, payload: bytes) -> bytes:
        """The envelope document of `payload`, as bytes; ArtifactError(bad_document) when no document can hold it."""
        encoded = base64.b64encode(payload).decode()
        if len(encoded) + ENVELOPE_OVERHEAD_BYTES > DOCUMENT_LIMIT_BYTES:
            raise ArtifactError(
                Code.BAD_DOCUMENT, f"{role} of {len(payload)} bytes is too long to be signed; make it smaller"
            )
        kind = PAYLOAD_TYPES[role]
        signature = self._private.sign(pre_authentication_encoding(kind, payload))
        envelope = Envelope(
            payloadType=kind,
            payload=encoded,
            signatures=(EnvelopeSignature(keyid=self.public.keyid, sig=base64.b64encode(signature).decode()),),
        )
        return encode_document(envelope)


def create_key(path: Path) -> PublicKey:
    """Make a key and write it to `path`; ConfigError when `path` exists, because a key is never overwritten."""
    if path.exists():
        raise ConfigError(f"{path} exists; a key is never overwritten, choose another place")
    private = Ed25519PrivateKey.generate()
    pem = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    write_atomically(path, pem, mode=KEY_MODE)
    return _public(private)


def load_signer(path: Path) -> Signer:
    """The signer of a key file. ConfigError when it is missing, readable by others, or no Ed25519 key."""
    try:
        mode = os.stat(path).st_mode  # noqa: PTH116  one call for existence and permissions
        pem = read_bounded(path, KEY_LIMIT_BYTES)
    except (OSError, StoreError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"key {path} cannot be read ({reason}); make one with `amperage keys init`") from error
    if mode & 0o077:
        raise ConfigError(f"key {path} can be read by others; run `chmod 600 {path}`")
    try:
        private = load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{path} is no unencrypted PEM key; make one with `amperage keys init`") from error
    if not isinstance(private, Ed25519PrivateKey):
        raise ConfigError(f"{path} is no Ed25519 key; make one with `amperage keys init`")
    return Signer(_public(private), private)


def _public(private: Ed25519PrivateKey) -> PublicKey:
    return PublicKey(ed25519=private.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw).hex())
