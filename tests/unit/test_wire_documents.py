"""Canonical JSON: one form out, and a strict, bounded way in."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wire.digest import digest_of, verify_digest
from wire.documents import DOCUMENT_LIMIT_BYTES, encode_document, parse_document
from wire.errors import (
    AmperageError,
    ArtifactError,
    Code,
    ConfigError,
    InferenceError,
    Retry,
    StoreError,
    TransferError,
)
from wire.manifest import Requirements
from wire.messages import Ack, Desired, DesiredModel, Event, State, Status
from wire.release import ArtifactRef, DeltaRef, Release, Variant

BOOT = "0" * 32
DIGEST = "a" * 64


def make_variant(name: str = "int4") -> Variant:
    return Variant(
        name=name,
        decoded=DIGEST,
        full=ArtifactRef(manifest=DIGEST, wire_bytes=10),
        deltas=(DeltaRef(manifest=DIGEST, wire_bytes=1, base="b" * 64),),
        requirements=Requirements(ram_bytes=1, disk_bytes=2, cpu_features=("asimddp",)),
    )


def test_document_is_encoded_with_sorted_keys_and_no_white_space() -> None:
    status = Status(node="n1", online=True, boot_id=BOOT, session=3)
    assert encode_document(status) == (
        b'{"boot_id":"00000000000000000000000000000000","node":"n1","online":true,"schema":1,"session":3}'
    )


def test_release_survives_the_way_through_bytes() -> None:
    release = Release(model="tales", version="1.0", sequence=1, variants=(make_variant(),))
    again = parse_document(Release, encode_document(release))
    assert again == release
    assert encode_document(again) == encode_document(release)


@settings(deadline=None)
@given(detail=st.text(max_size=300), data=st.dictionaries(st.text(max_size=8), st.integers(-(1 << 53), 1 << 53)))
def test_any_text_and_figures_survive_the_way_through_bytes(
    detail: str, data: dict[str, float | int | str | bool]
) -> None:
    if any(0xD800 <= ord(letter) < 0xE000 for letter in detail + "".join(data)):
        return  # lone surrogates are no text that UTF-8 can carry
    event = Event(
        node="n1", boot_id=BOOT, seq=1, first=1, time_s=0.5, model="m", release=DIGEST, version="1",
        before=None, after=State.ADMITTED, detail=detail, data=data,
    )  # fmt: skip
    assert parse_document(Event, encode_document(event)) == event


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"[]",
        b"{",
        b'{"schema":1}',
        b'{"node":"n1","online":1,"boot_id":"' + b"0" * 32 + b'","session":0}',
        b'{"node":"N 1","online":true,"boot_id":"' + b"0" * 32 + b'","session":0}',
        b'{"schema":2,"node":"n1","online":true,"boot_id":"' + b"0" * 32 + b'","session":0}',
        b'\xff{"node":"n1"}',
    ],
)
def test_malformed_document_is_refused_with_a_code(data: bytes) -> None:
    with pytest.raises(ArtifactError) as refused:
        parse_document(Status, data)
    assert refused.value.code is Code.BAD_DOCUMENT


def test_unknown_field_of_a_report_is_ignored() -> None:
    newer = encode_document(Status(node="n1", online=True, boot_id=BOOT, session=0))[:-1] + b',"mood":"good"}'
    assert parse_document(Status, newer).online


def test_unknown_field_of_a_command_is_refused() -> None:
    order = Desired(node="n1", generation=1, models=(DesiredModel(model="m", release=DIGEST),))
    newer = encode_document(order)[:-1] + b',"force":true}'
    with pytest.raises(ArtifactError, match="force"):
        parse_document(Desired, newer)


def test_document_over_the_limit_is_refused_unread() -> None:
    with pytest.raises(ArtifactError, match="over the limit"):
        parse_document(Ack, b" " * (DOCUMENT_LIMIT_BYTES + 1))
    with pytest.raises(ArtifactError) as refused:
        parse_document(Ack, b'{"acks":{}}', limit_bytes=4, code=Code.BAD_MANIFEST)
    assert refused.value.code is Code.BAD_MANIFEST


def test_generation_and_sequence_start_at_one() -> None:
    with pytest.raises(ArtifactError, match="generation"):
        parse_document(Desired, b'{"node":"n1","generation":0,"models":[]}')
    with pytest.raises(ValueError, match="sequence"):
        Release(model="m", version="1", sequence=0, variants=(make_variant(),))


def test_two_variants_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="two variants"):
        Release(model="m", version="1", sequence=1, variants=(make_variant(), make_variant()))


def test_other_bytes_under_a_digest_are_refused_by_name() -> None:
    verify_digest(b"tale", digest_of(b"tale"), "the tale")
    with pytest.raises(ArtifactError, match="the tale has SHA-256") as refused:
        verify_digest(b"talf", digest_of(b"tale"), "the tale")
    assert refused.value.code is Code.DIGEST_MISMATCH


def test_error_tells_code_message_retry_and_exit_status() -> None:
    assert str(StoreError(Code.NO_SPACE, "free space")) == "no_space: free space"
    assert (ConfigError("x").exit_status, AmperageError(Code.INTERNAL, "x").exit_status) == (78, 1)
    retries = [error.retry for error in (TransferError, ArtifactError, StoreError)]
    assert retries == [Retry.LATER, Retry.NEVER, Retry.OPERATOR]
    overloaded = InferenceError(Code.OVERLOADED, "try later", 429, retry_after_s=2.0)
    assert (overloaded.http_status, overloaded.retry_after_s) == (429, 2.0)


def test_every_code_and_state_is_explained_to_the_operator() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "operate.md").read_text()
    unexplained = [name for name in (*Code, *State) if f"| `{name}` |" not in page]
    assert not unexplained
