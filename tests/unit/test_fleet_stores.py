"""What the control plane keeps on disk: the library of packs and the database."""

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from fleet_samples import BOOT, Publisher, committed

from benchmarks.packs import Artifact, make_artifact
from fleet import database as database_module
from fleet.database import Database, DesiredRow, ReportKey
from fleet.library import Library, read_frame
from fleet.orders import Orders
from fleet.outbox import Outbox
from fleet.presence import Presence
from fleet.releases import Releases, Stores
from wire.digest import digest_of
from wire.documents import parse_document
from wire.errors import ArtifactError, Code, StoreError
from wire.manifest import FRAME_BYTES
from wire.messages import Desired, Reported
from wire.signing import Role, open_envelope
from wire.topics import Topics

OTHER_BOOT = "f" * 32


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(tmp_path / "fleet.sqlite")
    yield database
    database.close()


class SilentLink:
    """A connection that is down."""

    def is_up(self) -> bool:
        return False


def put(library: Library, artifact: Artifact, pack: bytes) -> None:
    library.put_manifest(artifact.digest, artifact.document)
    upload = library.begin_upload(artifact.digest)
    try:
        upload.feed(pack)
        upload.commit()
    finally:
        upload.discard()


# library


@pytest.mark.parametrize("part_bytes", [1000, FRAME_BYTES, 1 << 30])
def test_pack_uploaded_in_parts_of_any_size_is_read_back_by_frames(tmp_path: Path, part_bytes: int) -> None:
    artifact, library = make_artifact(), Library(tmp_path)
    library.put_manifest(artifact.digest, artifact.document)
    upload = library.begin_upload(artifact.digest)
    assert library.pack_path(artifact.digest) is None
    for start in range(0, len(artifact.pack), part_bytes):
        upload.feed(artifact.pack[start : start + part_bytes])
    upload.commit()
    upload.discard()
    path = library.pack_path(artifact.digest)
    assert path
    with path.open("rb") as pack:
        frames = [read_frame(pack.fileno(), artifact.manifest, i) for i in range(artifact.manifest.frame_count)]
    assert b"".join(frames) == artifact.pack
    assert [entry.name for entry in (tmp_path / "packs").iterdir()] == [artifact.digest]


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        (lambda pack: pack[:-1], Code.DIGEST_MISMATCH),
        (lambda pack: pack + b"x", Code.DIGEST_MISMATCH),
        (lambda pack: b"", Code.DIGEST_MISMATCH),
        (lambda pack: pack[:3] + b"\xff" + pack[4:], Code.FRAME_MISMATCH),
        (lambda pack: pack[:-3] + b"\xff\x00\xff", Code.FRAME_MISMATCH),
    ],
)
def test_pack_that_is_not_what_was_signed_is_refused_and_leaves_nothing(tmp_path: Path, damage, code: Code) -> None:
    artifact, library = make_artifact(), Library(tmp_path)
    library.put_manifest(artifact.digest, artifact.document)
    with pytest.raises(ArtifactError) as refused:
        put(library, artifact, damage(artifact.pack))
    assert refused.value.code is code
    assert list((tmp_path / "packs").iterdir()) == []


def test_pack_without_its_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError) as refused:
        Library(tmp_path).begin_upload("0" * 64)
    assert refused.value.code is Code.DOCUMENT_MISSING


def test_document_that_is_no_manifest_or_has_another_digest_is_refused(tmp_path: Path) -> None:
    library, artifact = Library(tmp_path), make_artifact()
    for digest, data, code in (
        (artifact.digest, artifact.document + b" ", Code.DIGEST_MISMATCH),
        (digest_of(b"{}"), b"{}", Code.BAD_MANIFEST),
    ):
        with pytest.raises(ArtifactError) as refused:
            library.put_manifest(digest, data)
        assert refused.value.code is code
        assert library.document(digest) is None


def test_start_after_a_crash_removes_unfinished_uploads(tmp_path: Path) -> None:
    artifact, library = make_artifact(), Library(tmp_path)
    library.put_manifest(artifact.digest, artifact.document)
    upload = library.begin_upload(artifact.digest)
    upload.feed(artifact.pack[:1000])
    assert len(list((tmp_path / "packs").iterdir())) == 1
    Library(tmp_path)
    assert list((tmp_path / "packs").iterdir()) == []
    upload.discard()


# releases


def test_release_is_kept_only_with_all_that_it_names(tmp_path: Path, database: Database) -> None:
    publisher, library = Publisher(tmp_path / "keys"), Library(tmp_path)
    releases = Releases(Stores(database, library), publisher.trust, Topics(), Outbox(SilentLink()))  # type: ignore[arg-type]
    full = make_artifact()
    delta = make_artifact(seed=2, base="b" * 64)
    envelope = publisher.release(full, delta=delta)
    for artifact in (full, delta):
        with pytest.raises(ArtifactError) as refused:
            releases.add(envelope)
        assert refused.value.code is Code.DOCUMENT_MISSING
        put(library, artifact, artifact.pack)
    digest, release = releases.add(envelope)
    assert releases.find(digest) == release
    wrong = publisher.release(full, delta=make_artifact(seed=2, base="c" * 64))
    with pytest.raises(ArtifactError):
        releases.add(wrong)
    swapped = publisher.release(delta)
    with pytest.raises(ArtifactError) as mixed:
        releases.add(swapped)
    assert mixed.value.code is Code.BAD_MANIFEST, "a delta cannot be the full artifact"
    assert [row["release"] for row in database.releases()] == [digest]


# database


def test_status_and_report_of_a_node_survive_a_restart(tmp_path: Path, database: Database) -> None:
    database.save_presence("n", Presence(BOOT, 3, online=True))
    database.save_reported("n", '{"generation":5}')
    database.close()
    again = Database(tmp_path / "fleet.sqlite")
    assert again.presences() == {"n": Presence(BOOT, 3, online=True)}
    assert again.reported() == {"n": '{"generation":5}'}
    (row,) = again.nodes()
    assert (row["online"], row["reported"], row["ordered"]) == (True, {"generation": 5}, {})


def test_failed_transaction_leaves_nothing_of_it(database: Database) -> None:
    def fail_in_the_middle() -> None:
        with database.transaction():
            database.save_desired([DesiredRow("n", 1, b"", {})])
            with database.transaction():
                database.save_reported("n", "{}")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_in_the_middle()
    assert database.all_desired() == []
    assert database.nodes() == []
    database.save_desired([DesiredRow("n", 1, b"", {})])
    assert len(database.all_desired()) == 1


def test_file_that_is_no_database_is_a_store_error(tmp_path: Path) -> None:
    (tmp_path / "fleet.sqlite").write_bytes(b"not a database, but long enough to be looked at" * 100)
    with pytest.raises(StoreError) as refused:
        Database(tmp_path / "fleet.sqlite")
    assert refused.value.code is Code.CORRUPT


def test_database_of_a_newer_program_is_refused(tmp_path: Path, database: Database) -> None:
    database.close()
    link = sqlite3.connect(tmp_path / "fleet.sqlite")
    link.execute("PRAGMA user_version=99")
    link.close()
    with pytest.raises(StoreError, match="99"):
        Database(tmp_path / "fleet.sqlite")


def test_reports_are_listed_by_arrival_of_one_node_or_all(database: Database) -> None:
    for seq in (1, 2, 3):
        for node in ("a", "b"):
            database.save_report(ReportKey(node, BOOT, seq, 1), "event", f'{{"seq":{seq}}}')
    database.save_report(ReportKey("a", BOOT, 4, 1), "telemetry", '{"seq":4}')
    assert [row["seq"] for row in database.reports("event", "a", None, 2)] == [2, 3], "the latest"
    assert [row["seq"] for row in database.reports("event", "a", 0, 2)] == [1, 2], "the first after an id"
    assert len(database.reports("event", None, None, 100)) == 6
    assert [row["seq"] for row in database.reports("telemetry", "a", None, 9)] == [4]


def test_old_reports_are_forgotten_and_their_repetition_is_not_stored_again(database: Database) -> None:
    assert database.save_report(ReportKey("a", BOOT, 1, 1), "event", "{}") == 1
    database._link.execute("UPDATE reports SET received_s = 5")
    database.forget_reports(older_than_s=10)
    assert database.reports("event", None, None, 9) == []
    assert database.save_report(ReportKey("a", BOOT, 1, 1), "event", "{}") == 1
    assert database.reports("event", None, None, 9) == []


def test_node_that_reports_too_much_forgets_its_own_past_only(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database_module, "REPORTS_PER_NODE", 10)
    database.save_report(ReportKey("quiet", BOOT, 1, 1), "event", '{"seq":1}')
    for seq in range(1, 31):
        database.save_report(ReportKey("loud", OTHER_BOOT, seq, 1), "event", f'{{"seq":{seq}}}')
    database.forget_reports(older_than_s=0)
    assert [row["seq"] for row in database.reports("event", "loud", None, 99)] == list(range(21, 31))
    assert len(database.reports("event", "quiet", None, 99)) == 1


# orders


def test_orders_count_up_from_what_was_sent_and_what_was_reported(tmp_path: Path, database: Database) -> None:
    publisher = Publisher(tmp_path / "keys")
    orders = Orders(database, publisher.online)
    one, two = "1" * 64, "2" * 64
    ((row, previous),) = orders.change("tales", {"n": one}, {})
    assert (row.generation, previous) == (1, None)
    reported = Reported(node="n", boot_id=BOOT, generation=7, models=(committed(one),))
    ((row, previous),) = orders.change("tales", {"n": two}, {"n": reported})
    assert (row.generation, previous) == (8, one)
    ((row, _),) = orders.change("other", {"n": one}, {"n": reported})
    desired = parse_document(Desired, open_envelope(row.envelope, Role.DESIRED, publisher.trust))
    assert desired.generation == 9
    assert {entry.model: entry.release for entry in desired.models} == {"tales": two, "other": one}
    ((row, previous),) = orders.change("tales", {"n": None}, {})
    assert (row.models, previous) == ({"other": one}, two)
    assert database.desired("n") == row


def test_orders_are_asserted_again_only_over_a_generation_that_is_not_ours(tmp_path: Path, database: Database) -> None:
    orders = Orders(database, Publisher(tmp_path / "keys").online)
    reported = Reported(node="n", boot_id=BOOT, generation=5)
    assert orders.assert_again("n", reported) is None, "never ordered"
    orders.change("tales", {"n": "1" * 64}, {"n": reported})
    assert orders.assert_again("n", reported) is None
    row = orders.assert_again("n", reported.model_copy(update={"generation": 9}))
    assert row
    assert (row.generation, row.models) == (10, {"tales": "1" * 64})


def test_release_that_failed_by_itself_is_not_named_by_the_next_order(tmp_path: Path, database: Database) -> None:
    orders = Orders(database, Publisher(tmp_path / "keys").online)
    old, bad = "1" * 64, "2" * 64
    orders.change("tales", {"n": old, "m": bad}, {})
    ((sent, _),) = orders.change("tales", {"n": bad}, {})
    orders.forget_failed("tales", [("n", bad, old), ("m", bad, None), ("absent", bad, old)])
    row = database.desired("n")
    assert row
    assert (row.models, row.envelope, row.generation) == ({"tales": old}, sent.envelope, sent.generation)
    orders.forget_failed("tales", [("n", bad, None)])
    assert database.desired("n") == row, "another order was given meanwhile"
    after = database.desired("m")
    assert after
    assert after.models == {}


def test_documents_of_a_node_without_reports_are_all_there(database: Database) -> None:
    database.save_desired([DesiredRow("n", 3, b"e", {"tales": "1" * 64})])
    assert database.nodes() == [], "named by an order, never seen"
    database.save_presence("n", Presence(BOOT, 1, online=False))
    (row,) = database.nodes()
    assert (row["ordered_generation"], row["ordered"], row["lost_reports"]) == (3, {"tales": "1" * 64}, 0)
