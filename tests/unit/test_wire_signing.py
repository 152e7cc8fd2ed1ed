"""Envelopes: whose signature counts, for what, and how many it takes; also on a node, where cryptography is missing."""

import base64
import json
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from wire.documents import encode_document
from wire.errors import ArtifactError, Code
from wire.signing import (
    PAYLOAD_TYPES,
    Envelope,
    EnvelopeSignature,
    PublicKey,
    Role,
    RoleKeys,
    TrustPolicy,
    open_envelope,
    pre_authentication_encoding,
)

PROJECT = Path(__file__).resolve().parents[2]
KEYS = [Ed25519PrivateKey.from_private_bytes(bytes([i]) * 32) for i in range(1, 5)]
PUBLIC = [PublicKey(ed25519=key.public_key().public_bytes_raw().hex()) for key in KEYS]
RELEASE_KEY, SECOND_KEY, DESIRED_KEY, STRANGER = range(4)
PAYLOAD = b'{"model":"tales"}'
POLICY = TrustPolicy(
    release=RoleKeys(keys=(PUBLIC[RELEASE_KEY], PUBLIC[SECOND_KEY])), desired=RoleKeys(keys=(PUBLIC[DESIRED_KEY],))
)
TWO_OF_TWO = POLICY.model_copy(
    update={"release": RoleKeys(keys=(PUBLIC[RELEASE_KEY], PUBLIC[SECOND_KEY]), threshold=2)}
)


def sign(signer: int, role: Role = Role.RELEASE, payload: bytes = PAYLOAD) -> EnvelopeSignature:
    signature = KEYS[signer].sign(pre_authentication_encoding(PAYLOAD_TYPES[role], payload))
    return EnvelopeSignature(keyid=PUBLIC[signer].keyid, sig=base64.b64encode(signature).decode())


def seal(*signatures: EnvelopeSignature, role: Role = Role.RELEASE, payload: bytes = PAYLOAD) -> bytes:
    envelope = Envelope(
        payloadType=PAYLOAD_TYPES[role], payload=base64.b64encode(payload).decode(), signatures=signatures
    )
    return encode_document(envelope)


def code_of(envelope: bytes, role: Role = Role.RELEASE, policy: TrustPolicy = POLICY) -> Code:
    with pytest.raises(ArtifactError) as refused:
        open_envelope(envelope, role, policy)
    return refused.value.code


def test_encoding_that_is_signed_is_that_of_the_standard() -> None:
    # The example of the DSSE protocol text.
    expected = b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    assert pre_authentication_encoding("http://example.com/HelloWorld", b"hello world") == expected


def test_envelope_of_a_trusted_key_opens() -> None:
    assert open_envelope(seal(sign(RELEASE_KEY)), Role.RELEASE, POLICY) == PAYLOAD


def test_envelope_of_a_stranger_is_refused_as_an_unknown_signer() -> None:
    assert code_of(seal(sign(STRANGER))) is Code.UNKNOWN_SIGNER


def test_stranger_who_names_a_trusted_key_is_refused() -> None:
    forged = sign(STRANGER).model_copy(update={"keyid": PUBLIC[RELEASE_KEY].keyid})
    assert code_of(seal(forged)) is Code.BAD_SIGNATURE


def test_altered_payload_is_refused() -> None:
    assert code_of(seal(sign(RELEASE_KEY), payload=PAYLOAD + b" ")) is Code.BAD_SIGNATURE


@pytest.mark.parametrize("sig", [b"", b"\0" * 64, b"short", b"\xff" * 90])
def test_signature_of_a_wrong_form_or_value_is_refused(sig: bytes) -> None:
    signature = EnvelopeSignature(keyid=PUBLIC[RELEASE_KEY].keyid, sig=base64.b64encode(sig).decode())
    assert code_of(seal(signature)) is Code.BAD_SIGNATURE


def test_key_of_one_role_cannot_sign_for_the_other() -> None:
    assert code_of(seal(sign(DESIRED_KEY))) is Code.UNKNOWN_SIGNER
    assert code_of(seal(sign(RELEASE_KEY, Role.DESIRED), role=Role.DESIRED), Role.DESIRED) is Code.UNKNOWN_SIGNER


def test_release_cannot_be_passed_off_as_desired_state() -> None:
    both = POLICY.model_copy(update={"desired": POLICY.release})
    envelope = seal(sign(RELEASE_KEY))
    assert code_of(envelope, Role.DESIRED, both) is Code.BAD_DOCUMENT
    renamed = json.loads(envelope) | {"payloadType": PAYLOAD_TYPES[Role.DESIRED]}
    assert code_of(json.dumps(renamed).encode(), Role.DESIRED, both) is Code.BAD_SIGNATURE


def test_threshold_of_two_needs_two_different_keys() -> None:
    first, second = sign(RELEASE_KEY), sign(SECOND_KEY)
    assert open_envelope(seal(first, second), Role.RELEASE, TWO_OF_TWO) == PAYLOAD
    assert code_of(seal(first), policy=TWO_OF_TWO) is Code.BAD_SIGNATURE
    assert code_of(seal(first, first), policy=TWO_OF_TWO) is Code.BAD_SIGNATURE
    assert code_of(seal(first, sign(STRANGER)), policy=TWO_OF_TWO) is Code.BAD_SIGNATURE


def test_one_key_listed_twice_is_one_key() -> None:
    with pytest.raises(ValueError, match="threshold"):
        RoleKeys(keys=(PUBLIC[0], PUBLIC[0]), threshold=2)


def test_further_signatures_of_strangers_do_no_harm() -> None:
    assert open_envelope(seal(sign(STRANGER), sign(SECOND_KEY)), Role.RELEASE, POLICY) == PAYLOAD


@pytest.mark.parametrize("envelope", [b"", b"{}", b'{"payloadType":"x","payload":"","signatures":[]}', b"[]"])
def test_bytes_that_are_no_envelope_are_refused(envelope: bytes) -> None:
    assert code_of(envelope) is Code.BAD_DOCUMENT


def test_payload_that_is_no_base64_is_refused() -> None:
    broken = json.loads(seal(sign(RELEASE_KEY))) | {"payload": "!!!!"}
    assert code_of(json.dumps(broken).encode()) is Code.BAD_DOCUMENT


def test_node_without_cryptography_comes_to_the_same_verdicts() -> None:
    """The base install verifies with securesystemslib's own Ed25519."""
    cases = {
        "good": seal(sign(RELEASE_KEY)),
        "unknown_signer": seal(sign(STRANGER)),
        "bad_signature": seal(sign(RELEASE_KEY), payload=PAYLOAD + b" "),
    }
    zero = EnvelopeSignature(keyid=PUBLIC[RELEASE_KEY].keyid, sig=base64.b64encode(b"\xff" * 64).decode())
    short = zero.model_copy(update={"sig": "AAAA"})
    code = (
        "import sys, json\n"
        "sys.modules['cryptography'] = None\n"
        "from wire.signing import Role, TrustPolicy, open_envelope\n"
        "from wire.errors import ArtifactError\n"
        "policy, envelopes = json.load(sys.stdin)\n"
        "policy = TrustPolicy.model_validate_json(policy)\n"
        "for envelope in envelopes:\n"
        "    try: open_envelope(envelope.encode(), Role.RELEASE, policy); print('good')\n"
        "    except ArtifactError as error: print(error.code)\n"
    )
    envelopes = [*cases.values(), seal(zero), seal(short)]
    told = subprocess.run(
        [sys.executable, "-c", code], cwd=PROJECT, text=True, capture_output=True, timeout=60, check=False,
        input=json.dumps([encode_document(POLICY).decode(), [envelope.decode() for envelope in envelopes]]),
    )  # fmt: skip
    assert told.stdout.split() == [*cases, "bad_signature", "bad_signature"], told.stderr[-2000:]
