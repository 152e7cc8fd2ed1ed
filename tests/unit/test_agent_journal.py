"""The journal on a real SQLite file: what a second life reads."""

import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest

from agent.journal import JOURNAL_FILE, Deployment, Journal
from wire.bitmap import Bitmap
from wire.errors import Code, StoreError
from wire.messages import State

BOOT = "0" * 31


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path, BOOT + "1")


def reopened(journal: Journal, tmp_path: Path, boot: str) -> Journal:
    journal.close()
    return Journal(tmp_path, BOOT + boot)


def test_every_commit_is_flushed_to_the_disk(journal):
    assert journal._db.execute("PRAGMA synchronous").fetchone() == (2,)
    assert journal._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_deployment_and_its_event_are_written_together_or_not_at_all(journal):
    row = journal.save_deployment(Deployment("tales", "a" * 64, 1))

    class PowerCutError(Exception):
        pass

    def cut() -> None:
        with journal.transaction():
            journal.save_deployment(replace(row, state=State.FETCHING))
            journal.add_report("event", {"after": "fetching"}, 100)
            raise PowerCutError

    with pytest.raises(PowerCutError):
        cut()
    assert journal.deployments() == (row,)
    assert journal.reports(10) == ()


def test_second_life_reads_what_the_first_wrote(journal, tmp_path):
    row = journal.save_deployment(Deployment("tales", "a" * 64, 3, "1.0", State.SOAKING, attempts=2, reason="x"))
    journal.accept_desired(3, b"payload")
    bitmap = Bitmap(10)
    bitmap.set(7)
    journal.save_verified("b" * 64, bitmap)
    journal.set_previous("tales", "c" * 64)
    again = reopened(journal, tmp_path, "2")
    assert again.deployments() == (row,)
    assert again.desired() == (3, b"payload")
    assert again.verified("b" * 64) == bitmap
    assert again.fetches() == ("b" * 64,)
    assert again.previous() == {"c" * 64}
    assert again.boots == 2


def test_fetch_table_is_the_one_that_others_read(journal, tmp_path):
    bitmap = Bitmap.full(9)
    journal.save_verified("b" * 64, bitmap)
    with sqlite3.connect(tmp_path / JOURNAL_FILE) as other:
        assert other.execute("SELECT artifact, frames, verified FROM fetch").fetchall() == [
            ("b" * 64, 9, bitmap.pack())
        ]
    other.close()


def test_only_the_latest_deployment_of_a_model_is_kept(journal):
    journal.save_deployment(Deployment("tales", "a" * 64, 1))
    other = journal.save_deployment(Deployment("other", "a" * 64, 1))
    latest = journal.save_deployment(Deployment("tales", "b" * 64, 2))
    assert journal.deployments() == (other, latest)
    journal.forget_model("tales")
    assert journal.deployments() == (other,)


def test_reports_are_numbered_per_boot_and_offered_oldest_first(journal, tmp_path):
    for i in range(3):
        journal.add_report("event", {"i": i}, 100)
    again = reopened(journal, tmp_path, "2")
    again.add_report("telemetry", {"i": 9}, 100)
    rows = again.reports(10)
    assert [(row.boot_id[-1], row.seq, row.first, row.kind) for _, row in rows] == [
        ("1", 1, 1, "event"), ("1", 2, 1, "event"), ("1", 3, 1, "event"), ("2", 1, 1, "telemetry"),
    ]  # fmt: skip
    assert rows[3][1].body == {"i": 9, "boot_id": BOOT + "2", "seq": 1}
    assert [row.seq for _, row in again.reports(10, after=rows[1][0])] == [3, 1]


def test_acknowledgement_drops_a_boot_up_to_its_seq_only(journal, tmp_path):
    for i in range(3):
        journal.add_report("event", {"i": i}, 100)
    again = reopened(journal, tmp_path, "2")
    again.add_report("event", {"i": 9}, 100)
    assert again.acknowledge({BOOT + "1": 2, "f" * 32: 50}) == 2
    assert [(row.seq, row.first) for _, row in again.reports(10)] == [(3, 3), (1, 1)]


def test_full_outbox_drops_the_oldest_and_declares_the_gap(journal):
    for i in range(8):
        journal.add_report("telemetry", {"i": i}, 5)
    rows = [row for _, row in journal.reports(10)]
    assert [row.seq for row in rows] == [4, 5, 6, 7, 8]
    assert {row.first for row in rows} == {4}


def test_file_that_is_no_journal_is_a_store_error(tmp_path):
    (tmp_path / JOURNAL_FILE).write_bytes(b"not a database" * 100)
    with pytest.raises(StoreError) as caught:
        Journal(tmp_path, BOOT + "1")
    assert caught.value.code is Code.CORRUPT


def test_journal_of_a_newer_agent_is_refused(journal, tmp_path):
    with journal.transaction():
        journal._set_fact("schema", b"2")
    with pytest.raises(StoreError) as caught:
        reopened(journal, tmp_path, "2")
    assert caught.value.code is Code.UNSUPPORTED
