"""What the control plane knows, in SQLite: nodes, reports, desired state, releases, rollouts.

WAL with synchronous=FULL, because a report is acknowledged once it is here and the node then forgets it. Reports are
idempotent by (node, boot_id, seq). One connection behind a lock; what belongs together is one `transaction`, so a crash
leaves all of it or nothing.
"""

import json
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fleet.presence import Presence
from host.files import make_directory
from wire.errors import Code, StoreError

REPORTS_PER_NODE = 100_000
"""Bound for one node, kept for its newest: a node that reports too much forgets its own past."""
SCHEMA_VERSION = 1
SCHEMA = """
CREATE TABLE IF NOT EXISTS nodes (
    node TEXT PRIMARY KEY, online INTEGER NOT NULL DEFAULT 0, boot_id TEXT, session INTEGER NOT NULL DEFAULT 0,
    changed_s REAL NOT NULL, reported TEXT);
CREATE TABLE IF NOT EXISTS reports (
    id INTEGER PRIMARY KEY AUTOINCREMENT, node TEXT NOT NULL, boot_id TEXT NOT NULL, seq INTEGER NOT NULL,
    kind TEXT NOT NULL, received_s REAL NOT NULL, body TEXT NOT NULL, UNIQUE (node, boot_id, seq));
CREATE INDEX IF NOT EXISTS reports_of_node ON reports (kind, node, id);
CREATE INDEX IF NOT EXISTS reports_by_age ON reports (received_s);
CREATE TABLE IF NOT EXISTS committed (
    node TEXT NOT NULL, boot_id TEXT NOT NULL, seq INTEGER NOT NULL, lost INTEGER NOT NULL, touched_s REAL NOT NULL,
    PRIMARY KEY (node, boot_id));
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
    """The last desired state that was sent to a node; `models` maps model to release and is what the next builds on."""

    node: str
    generation: int
    envelope: bytes
    models: dict[str, str]


@dataclass(frozen=True, slots=True)
class ReportKey:
    """What a numbered report is known by, and `first`, the lowest seq that the node still held."""

    node: str
    boot_id: str
    seq: int
    first: int


class Database:
    """The tables above."""

    def __init__(self, path: Path) -> None:
        make_directory(path.parent)
        self._lock = threading.RLock()
        self._depth = 0
        try:
            self._link = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            self._link.row_factory = sqlite3.Row
            self._link.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; PRAGMA busy_timeout=5000;")
            known = self._link.execute("PRAGMA user_version").fetchone()[0]
            if known not in (0, SCHEMA_VERSION):
                raise StoreError(Code.CORRUPT, f"{path} is of schema {known}, this program knows {SCHEMA_VERSION}")
            self._link.executescript(f"{SCHEMA} PRAGMA user_version={SCHEMA_VERSION};")
        except sqlite3.DatabaseError as error:
            raise StoreError(Code.CORRUPT, f"{path}: {error}; move it away to start with an empty one") from error

    def close(self) -> None:
        """Close the connection."""
        with self._lock:
            self._link.close()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All or nothing, durable at its end; within another one it is a part of that one. Raises StoreError."""
        with self._lock:
            if self._depth:
                yield self._link
                return
            self._depth = 1
            try:
                self._link.execute("BEGIN IMMEDIATE")
                yield self._link
                self._link.execute("COMMIT")
            except BaseException as error:
                if self._link.in_transaction:
                    self._link.execute("ROLLBACK")
                if isinstance(error, sqlite3.OperationalError):
                    raise StoreError(
                        Code.IO_ERROR, f"database: {error}; check the disk of the control plane"
                    ) from error
                raise
            finally:
                self._depth = 0

    def save_presence(self, node: str, presence: Presence) -> None:
        """A node's status that counts."""
        with self.transaction() as link:
            link.execute(
                "INSERT INTO nodes (node, online, boot_id, session, changed_s) VALUES (?, ?, ?, ?, ?)"
                " ON CONFLICT (node) DO UPDATE SET online = excluded.online, boot_id = excluded.boot_id,"
                " session = excluded.session, changed_s = excluded.changed_s",
                (node, presence.online, presence.boot_id, presence.session, time.time()),
            )

    def presences(self) -> dict[str, Presence]:
        """The last status of every node that ever sent one."""
        rows = self._rows("SELECT node, online, boot_id, session FROM nodes WHERE boot_id IS NOT NULL")
        return {row["node"]: Presence(row["boot_id"], row["session"], bool(row["online"])) for row in rows}

    def save_reported(self, node: str, body: str) -> None:
        """A node's retained report."""
        with self.transaction() as link:
            link.execute(
                "INSERT INTO nodes (node, changed_s, reported) VALUES (?, ?, ?) ON CONFLICT (node)"
                " DO UPDATE SET changed_s = excluded.changed_s, reported = excluded.reported",
                (node, time.time(), body),
            )

    def reported(self) -> dict[str, str]:
        """The last retained report of every node."""
        return {row["node"]: row["reported"] for row in self._rows("SELECT * FROM nodes WHERE reported IS NOT NULL")}

    def save_report(self, key: ReportKey, kind: str, body: str) -> int:
        """Keep a numbered report; returns the seq up to which all of that boot is here.

        What lies below `first` was dropped by the node: a declared gap, counted as lost and not waited for.
        """
        now_s = time.time()
        of_boot = (key.node, key.boot_id)
        with self.transaction() as link:
            row = link.execute("SELECT seq, lost FROM committed WHERE node = ? AND boot_id = ?", of_boot).fetchone()
            reached, lost = (row["seq"], row["lost"]) if row else (0, 0)
            if key.seq > reached:
                link.execute(
                    "INSERT OR IGNORE INTO reports (node, boot_id, seq, kind, received_s, body)"
                    " VALUES (?, ?, ?, ?, ?, ?)", (*of_boot, key.seq, kind, now_s, body),
                )  # fmt: skip
            floor = min(key.first, key.seq) - 1
            if floor > reached:
                held = "SELECT COUNT(*) FROM reports WHERE node = ? AND boot_id = ? AND seq > ? AND seq <= ?"
                lost += floor - reached - link.execute(held, (*of_boot, reached, floor)).fetchone()[0]
                reached = floor
            reached = _contiguous(link, of_boot, reached)
            link.execute("INSERT OR REPLACE INTO committed VALUES (?, ?, ?, ?, ?)", (*of_boot, reached, lost, now_s))
        return int(reached)

    def nodes(self) -> list[dict[str, Any]]:
        """All nodes with their last report."""
        rows = self._rows(
            "SELECT nodes.*, desired.generation, desired.models,"
            " (SELECT SUM(lost) FROM committed WHERE committed.node = nodes.node) AS lost"
            " FROM nodes LEFT JOIN desired USING (node) ORDER BY node"
        )
        return [
            {
                "node": row["node"],
                "online": bool(row["online"]),
                "boot_id": row["boot_id"],
                "session": row["session"],
                "changed_s": row["changed_s"],
                "lost_reports": row["lost"] or 0,
                "ordered_generation": row["generation"],
                "ordered": json.loads(row["models"]) if row["models"] else {},
                "reported": json.loads(row["reported"]) if row["reported"] else None,
            }
            for row in rows
        ]

    def reports(self, kind: str, node: str | None, after: int | None, limit: int) -> list[dict[str, Any]]:
        """Reports of a kind by arrival, each with its `id`: the first `limit` after the id `after`, or the latest."""
        of_node, named = ("AND node = ?", (node,)) if node is not None else ("", ())
        where = f"FROM reports WHERE kind = ? {of_node}"
        if after is None:
            query = f"SELECT * FROM (SELECT id, body {where} ORDER BY id DESC LIMIT ?) ORDER BY id"  # noqa: S608
            rows = self._rows(query, kind, *named, limit)
        else:
            query = f"SELECT id, body {where} AND id > ? ORDER BY id LIMIT ?"
            rows = self._rows(query, kind, *named, after, limit)
        return [{"id": row["id"], **json.loads(row["body"])} for row in rows]

    def forget_reports(self, older_than_s: float) -> None:
        """Drop reports received before that wall time, and of each node all but its newest REPORTS_PER_NODE."""
        with self.transaction() as link:
            link.execute("DELETE FROM reports WHERE received_s < ?", (older_than_s,))
            link.execute("DELETE FROM committed WHERE touched_s < ?", (older_than_s,))
            crowded = "SELECT node FROM reports GROUP BY node HAVING COUNT(*) > ?"
            for (node,) in link.execute(crowded, (REPORTS_PER_NODE,)).fetchall():
                link.execute(
                    "DELETE FROM reports WHERE node = ? AND id <= (SELECT id FROM reports WHERE node = ?"
                    " ORDER BY id DESC LIMIT 1 OFFSET ?)", (node, node, REPORTS_PER_NODE),
                )  # fmt: skip

    def desired(self, node: str) -> DesiredRow | None:
        """What was last sent to a node."""
        rows = self._rows("SELECT * FROM desired WHERE node = ?", node)
        return _desired(rows[0]) if rows else None

    def all_desired(self) -> list[DesiredRow]:
        """Everything that was sent."""
        return [_desired(row) for row in self._rows("SELECT * FROM desired ORDER BY node")]

    def save_desired(self, rows: Iterable[DesiredRow]) -> None:
        """Remember what is about to be sent."""
        with self.transaction() as link:
            link.executemany(
                "INSERT OR REPLACE INTO desired VALUES (?, ?, ?, ?)",
                [(row.node, row.generation, row.envelope, json.dumps(row.models)) for row in rows],
            )

    def save_release(self, release: str, identity: tuple[str, str, int], envelope: bytes) -> None:
        """Keep a verified release; `identity` is (model, version, sequence)."""
        with self.transaction() as link:
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
        with self.transaction() as link:
            cursor = link.execute(
                "INSERT INTO rollouts (state, body, started_s) VALUES (?, ?, ?)", (state, body, time.time())
            )
            return int(cursor.lastrowid or 0)

    def save_rollout(self, identity: int, state: str, body: str) -> None:
        """Keep a rollout's progress."""
        with self.transaction() as link:
            link.execute("UPDATE rollouts SET state = ?, body = ? WHERE id = ?", (state, body, identity))

    def rollouts(self, state: str | None = None) -> list[tuple[int, str]]:
        """(id, body) of all rollouts, or of those in a state, oldest first."""
        rows = self._rows("SELECT id, body FROM rollouts WHERE ? IS NULL OR state = ? ORDER BY id", state, state)
        return [(row["id"], row["body"]) for row in rows]

    def rollout(self, identity: int) -> str | None:
        """The body of one rollout."""
        rows = self._rows("SELECT body FROM rollouts WHERE id = ?", identity)
        return str(rows[0]["body"]) if rows else None

    def _rows(self, query: str, *values: object) -> list[sqlite3.Row]:
        with self._lock:
            return self._link.execute(query, values).fetchall()


def _contiguous(link: sqlite3.Connection, of_boot: tuple[str, str], reached: int) -> int:
    """The highest seq that everything from `reached` on is here up to."""
    later = link.execute(
        "SELECT seq FROM reports WHERE node = ? AND boot_id = ? AND seq > ? ORDER BY seq", (*of_boot, reached)
    )
    for (held,) in later:
        if held != reached + 1:
            break
        reached = held
    return reached


def _desired(row: sqlite3.Row) -> DesiredRow:
    return DesiredRow(row["node"], row["generation"], bytes(row["envelope"]), json.loads(row["models"]))
