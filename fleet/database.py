"""What the control plane knows, in SQLite: nodes, reports, desired state, releases, rollouts.

WAL with synchronous=FULL, because a report is acknowledged once it is here and the node then forgets it. Reports are
idempotent by (node, boot_id, seq). One connection behind a lock: transactions are short and few.
"""

import json
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from host.files import make_directory

SCHEMA = """
CREATE TABLE IF NOT EXISTS nodes (
    node TEXT PRIMARY KEY, online INTEGER NOT NULL DEFAULT 0, boot_id TEXT, session INTEGER NOT NULL DEFAULT 0,
    changed_s REAL NOT NULL, reported TEXT);
CREATE TABLE IF NOT EXISTS reports (
    node TEXT NOT NULL, boot_id TEXT NOT NULL, seq INTEGER NOT NULL, kind TEXT NOT NULL, time_s REAL NOT NULL,
    body TEXT NOT NULL, PRIMARY KEY (node, boot_id, seq)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS reports_by_time ON reports (kind, node, time_s);
CREATE TABLE IF NOT EXISTS committed (
    node TEXT NOT NULL, boot_id TEXT NOT NULL, seq INTEGER NOT NULL, PRIMARY KEY (node, boot_id));
CREATE TABLE IF NOT EXISTS desired (
    node TEXT PRIMARY KEY, generation INTEGER NOT NULL, envelope BLOB NOT NULL, models TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS releases (
    release TEXT PRIMARY KEY, model TEXT NOT NULL, version TEXT NOT NULL, sequence INTEGER NOT NULL,
    envelope BLOB NOT NULL, added_s REAL NOT NULL);
CREATE TABLE IF NOT EXISTS rollouts (
    id INTEGER PRIMARY KEY AUTOINCREMENT, state TEXT NOT NULL, body TEXT NOT NULL, started_s REAL NOT NULL);
"""


@dataclass(frozen=True, slots=True)
class DesiredRow:
    """The last desired state that was sent to a node; `models` maps model to release."""

    node: str
    generation: int
    envelope: bytes
    models: dict[str, str]


class Database:
    """The tables above."""

    def __init__(self, path: Path) -> None:
        make_directory(path.parent)
        self._lock = threading.Lock()
        self._link = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        self._link.row_factory = sqlite3.Row
        self._link.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL;" + SCHEMA)

    def close(self) -> None:
        """Close the connection."""
        self._link.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._link.execute("BEGIN IMMEDIATE")
            try:
                yield self._link
            except BaseException:
                self._link.execute("ROLLBACK")
                raise
            self._link.execute("COMMIT")

    def _rows(self, query: str, *values: object) -> list[sqlite3.Row]:
        with self._lock:
            return self._link.execute(query, values).fetchall()

    def save_status(self, node: str, *, online: bool, boot_id: str, session: int) -> None:
        """A node's status; a will of an older session of the same boot is ignored."""
        with self._transaction() as link:
            row = link.execute("SELECT boot_id, session FROM nodes WHERE node = ?", (node,)).fetchone()
            if row and row["boot_id"] == boot_id and session < row["session"]:
                return
            link.execute(
                "INSERT INTO nodes (node, online, boot_id, session, changed_s) VALUES (?, ?, ?, ?, ?)"
                " ON CONFLICT (node) DO UPDATE SET online = excluded.online, boot_id = excluded.boot_id,"
                " session = excluded.session, changed_s = excluded.changed_s",
                (node, online, boot_id, session, time.time()),
            )

    def save_reported(self, node: str, body: str) -> None:
        """A node's retained report."""
        with self._transaction() as link:
            link.execute(
                "INSERT INTO nodes (node, changed_s, reported) VALUES (?, ?, ?) ON CONFLICT (node)"
                " DO UPDATE SET changed_s = excluded.changed_s, reported = excluded.reported",
                (node, time.time(), body),
            )

    def save_report(self, key: tuple[str, str, int], first: int, kind: str, time_s: float, body: str) -> int:
        """Keep a numbered report of (node, boot_id, seq); returns the seq up to which all of that boot is here.

        What lies below `first` was dropped by the node: a declared gap, not to be waited for.
        """
        node, boot_id, seq = key
        with self._transaction() as link:
            link.execute("INSERT OR IGNORE INTO reports VALUES (?, ?, ?, ?, ?, ?)", (*key, kind, time_s, body))
            row = link.execute("SELECT seq FROM committed WHERE node = ? AND boot_id = ?", (node, boot_id)).fetchone()
            reached = max(row["seq"] if row else 0, min(first, seq) - 1)
            later = link.execute(
                "SELECT seq FROM reports WHERE node = ? AND boot_id = ? AND seq > ? ORDER BY seq",
                (node, boot_id, reached),
            )
            for (held,) in later:
                if held != reached + 1:
                    break
                reached = held
            link.execute("INSERT OR REPLACE INTO committed VALUES (?, ?, ?)", (node, boot_id, reached))
        return int(reached)

    def nodes(self) -> list[dict[str, Any]]:
        """All nodes with their last report."""
        rows = self._rows(
            "SELECT nodes.*, desired.generation AS ordered, desired.models FROM nodes LEFT JOIN desired USING (node)"
            " ORDER BY node"
        )
        return [
            {
                "node": row["node"],
                "online": bool(row["online"]),
                "changed_s": row["changed_s"],
                "ordered_generation": row["ordered"],
                "ordered": json.loads(row["models"]) if row["models"] else {},
                "reported": json.loads(row["reported"]) if row["reported"] else None,
            }
            for row in rows
        ]

    def reports(self, kind: str, node: str | None, after_s: float, limit: int) -> list[dict[str, Any]]:
        """Reports of a kind in the order of time, the latest `limit` of them."""
        rows = self._rows(
            "SELECT body FROM reports WHERE kind = ? AND (? IS NULL OR node = ?) AND time_s > ?"
            " ORDER BY time_s DESC LIMIT ?",
            kind, node, node, after_s, limit,
        )  # fmt: skip
        return [json.loads(row["body"]) for row in reversed(rows)]

    def desired(self, node: str) -> DesiredRow | None:
        """What was last sent to a node."""
        rows = self._rows("SELECT * FROM desired WHERE node = ?", node)
        return _desired(rows[0]) if rows else None

    def all_desired(self) -> list[DesiredRow]:
        """Everything that was sent."""
        return [_desired(row) for row in self._rows("SELECT * FROM desired")]

    def save_desired(self, row: DesiredRow) -> None:
        """Remember what is about to be sent."""
        with self._transaction() as link:
            link.execute(
                "INSERT OR REPLACE INTO desired VALUES (?, ?, ?, ?)",
                (row.node, row.generation, row.envelope, json.dumps(row.models)),
            )

    def save_release(self, release: str, identity: tuple[str, str, int], envelope: bytes) -> None:
        """Keep a verified release; `identity` is (model, version, sequence)."""
        with self._transaction() as link:
            link.execute(
                "INSERT OR IGNORE INTO releases VALUES (?, ?, ?, ?, ?, ?)", (release, *identity, envelope, time.time())
            )

    def releases(self) -> list[dict[str, Any]]:
        """All releases, oldest first."""
        rows = self._rows("SELECT release, model, version, sequence, added_s FROM releases ORDER BY added_s")
        return [dict(row) for row in rows]

    def release_envelope(self, release: str) -> bytes | None:
        """The envelope of a release."""
        rows = self._rows("SELECT envelope FROM releases WHERE release = ?", release)
        return bytes(rows[0]["envelope"]) if rows else None

    def add_rollout(self, state: str, body: str) -> int:
        """Keep a new rollout and number it."""
        with self._transaction() as link:
            cursor = link.execute(
                "INSERT INTO rollouts (state, body, started_s) VALUES (?, ?, ?)", (state, body, time.time())
            )
            return int(cursor.lastrowid or 0)

    def save_rollout(self, identity: int, state: str, body: str) -> None:
        """Keep a rollout's progress."""
        with self._transaction() as link:
            link.execute("UPDATE rollouts SET state = ?, body = ? WHERE id = ?", (state, body, identity))

    def rollouts(self, state: str | None = None) -> list[tuple[int, str]]:
        """(id, body) of all rollouts, or of those in a state, oldest first."""
        rows = self._rows("SELECT id, body FROM rollouts WHERE ? IS NULL OR state = ? ORDER BY id", state, state)
        return [(row["id"], row["body"]) for row in rows]


def _desired(row: sqlite3.Row) -> DesiredRow:
    return DesiredRow(row["node"], row["generation"], bytes(row["envelope"]), json.loads(row["models"]))
