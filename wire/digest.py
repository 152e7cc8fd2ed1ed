"""SHA-256 digests as lower-case hex, and the two verbs used with them.

Source: FIPS 180-4. A digest that reaches the code has the right form, because pydantic checks the pattern at the
boundary and everything inside is computed here.
"""

import hashlib
from typing import Annotated

from pydantic import StringConstraints

from wire.errors import ArtifactError, Code

Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$", strict=True)]
"""64 lower-case hexadecimal digits."""


def digest_of(data: bytes | bytearray | memoryview) -> str:
    """SHA-256 of `data` as 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def verify_digest(data: bytes | bytearray | memoryview, expected: str, what: str) -> None:
    """Raise ArtifactError(digest_mismatch) unless `data` hashes to `expected`; `what` names it to the operator."""
    actual = digest_of(data)
    if actual != expected:
        raise ArtifactError(
            Code.DIGEST_MISMATCH,
            f"{what} has SHA-256 {actual[:12]}…, expected {expected[:12]}…: fetch it again; if it repeats, "
            "the copy at the publisher is damaged",
        )
