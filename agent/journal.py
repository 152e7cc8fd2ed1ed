"""The agent's journal: work in progress, reports not yet acknowledged, and the last accepted order.

SQLite in WAL mode with synchronous=FULL: a transaction that returned survives a power cut. Only the engine's thread
writes. Every transition of a deployment and the event that tells of it are one transaction, so that no state is reached
unreported and nothing is reported that was not reached.
A crash leaves the last committed transaction; there is nothing to repair.
"""

import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from host.files import make_directory
from wire.bitmap import Bitmap
from wire.errors import Code, StoreError
from wire.messages import State

JOURNAL_FILE = "journal.sqlite"
SCHEMA_VERSION = 1

_SCHEMA = """
CREATE TABLE IF NOT EXISTS deployments (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    model TEXT NOT NULL, release TEXT NOT NULL, generation INTEGER NOT NULL, version TEXT NOT NULL,
    state TEXT NOT NULL, attempts INTEGER NOT NULL, entered_s REAL NOT NULL,
    reason TEXT, detail TEXT, variant TEXT, artifact TEXT, base TEXT, decoded TEXT, probe TEXT, serving_before TEXT);
CREATE INDEX IF NOT EXISTS deployments_by_model ON deployments (model, id);
CREATE TABLE IF NOT EXISTS fetch (artifact TEXT PRIMARY KEY, frames INTEGER NOT NULL, verified BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS outbox (
    boot INTEGER NOT NULL, boot_id TEXT NOT NULL, seq INTEGER NOT NULL, kind TEXT NOT NULL, body TEXT NOT NULL,
    PRIMARY KEY (boot, seq)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value BLOB NOT NULL);
"""
_COLUMNS = (
    "model", "release", "generation", "version", "state", "attempts", "entered_s", "reason", "detail", "variant",
    "artifact", "base", "decoded", "probe", "serving_before",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Deployment:
    """One release on its way, or at its end; the latest per model is kept.

    `reason` and `detail` may be set before the end: then a roll-back was decided and is not finished.
    `probe` and `serving_before` are JSON (wire/serving.py ProbeReport, ServingModel).
    """

    model: str
    release: str
    generation: int
    version: str = ""
    state: State = State.ADMITTED
    attempts: int = 0
    entered_s: float = 0.0
    reason: str | None = None
    detail: str | None = None
    variant: str | None = None
    artifact: str | None = None
    base: str | None = None
    decoded: str | None = None
    probe: str | None = None
    serving_before: str | None = None
    id: int = 0


@dataclass(frozen=True, slots=True)
class OutboxRow:
    """A report to be acknowledged; `body` is its JSON object without `first`."""

    boot_id: str
    seq: int
    first: int
    kind: str
    body: dict[str, object]


class Journal:
    """The open journal of one start of the agent, `boot_id`."""

    def __init__(self, directory: Path, boot_id: str) -> None:
        """Open or create it. Raises StoreError(corrupt) when SQLite refuses the file."""
        make_directory(directory)
        self.boot_id = boot_id
        self._depth = 0
        try:
            self._db = sqlite3.connect(directory / JOURNAL_FILE, isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.execute("PRAGMA cache_size=-512")
            self._db.executescript(_SCHEMA)
            self._check_version()
            self.boots = self._count_boot()
        except sqlite3.Error as error:
            raise StoreError(
                Code.CORRUPT,
                f"{directory / JOURNAL_FILE}: {error}; move it away, the versions in the store stay usable",
            ) from error
        self._seq = 0

    def close(self) -> None:
        """Close the file; nothing is pending outside of a transaction."""
        self._db.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All writes inside become durable together, or none does. Nested use joins the outer one."""
        if self._depth:
            yield
            return
        self._depth = 1
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        else:
            self._commit()
        finally:
            self._depth = 0

    def _commit(self) -> None:
        try:
            self._db.execute("COMMIT")
        except sqlite3.Error as error:
            self._db.execute("ROLLBACK")
            raise StoreError(Code.IO_ERROR, f"journal: {error}; check the disk and its free space") from error

    # deployments

    def save_deployment(self, deployment: Deployment) -> Deployment:
        """Insert (id 0) or update; older rows of the model go, because only the latest matters."""
        values = [getattr(deployment, column) for column in _COLUMNS]
        with self.transaction():
            if deployment.id:
                assignments = ", ".join(f"{column} = ?" for column in _COLUMNS)
                self._db.execute(f"UPDATE deployments SET {assignments} WHERE id = ?", [*values, deployment.id])  # noqa: S608
                return deployment
            marks = ", ".join("?" for _ in _COLUMNS)
            cursor = self._db.execute(f"INSERT INTO deployments ({', '.join(_COLUMNS)}) VALUES ({marks})", values)  # noqa: S608
            row_id = cursor.lastrowid or 0
            self._db.execute("DELETE FROM deployments WHERE model = ? AND id <> ?", (deployment.model, row_id))
        return replace(deployment, id=row_id)

    def deployments(self) -> tuple[Deployment, ...]:
        """The latest of every model, oldest first."""
        rows = self._db.execute(f"SELECT {', '.join(_COLUMNS)}, id FROM deployments ORDER BY id").fetchall()  # noqa: S608
        return tuple(_deployment(row) for row in rows)

    def forget_model(self, model: str) -> None:
        """The model is no longer wanted here."""
        with self.transaction():
            self._db.execute("DELETE FROM deployments WHERE model = ?", (model,))
            self._db.execute("DELETE FROM facts WHERE name = ?", (f"previous:{model}",))

    def set_previous(self, model: str, decoded: str | None) -> None:
        """The version that served before the one just committed; it stays on the node."""
        with self.transaction():
            self._set_fact(f"previous:{model}", (decoded or "").encode())

    def previous(self) -> frozenset[str]:
        """Decoded digests kept beside what serves."""
        rows = self._db.execute("SELECT value FROM facts WHERE name GLOB 'previous:*'")
        return frozenset(bytes(row[0]).decode() for row in rows if row[0])

    # fetches

    def verified(self, artifact: str) -> Bitmap | None:
        """Frames of `artifact` that are verified and on the disk, None when it was never begun."""
        row = self._db.execute("SELECT frames, verified FROM fetch WHERE artifact = ?", (artifact,)).fetchone()
        return Bitmap(row[0], row[1]) if row else None

    def save_verified(self, artifact: str, verified: Bitmap) -> None:
        """Call after fdatasync of the staging file: what is in this row is never fetched again."""
        with self.transaction():
            self._db.execute(
                "INSERT INTO fetch VALUES (?, ?, ?) ON CONFLICT (artifact) "
                "DO UPDATE SET frames = excluded.frames, verified = excluded.verified",
                (artifact, verified.length, verified.pack()),
            )

    def note_pace(self, why: str) -> None:
        """What holds the fetch back now, for whoever looks at the node; empty for nothing."""
        with self.transaction():
            self._set_fact("pace", why.encode())

    def forget_fetch(self, artifact: str) -> None:
        """Call before the staging file is removed."""
        with self.transaction():
            self._db.execute("DELETE FROM fetch WHERE artifact = ?", (artifact,))

    def fetches(self) -> tuple[str, ...]:
        """Artifacts that were begun."""
        return tuple(row[0] for row in self._db.execute("SELECT artifact FROM fetch"))

    # outbox

    def add_report(self, kind: str, body: dict[str, object], limit: int) -> int:
        """Number a report of this boot and keep it; beyond `limit` rows the oldest is dropped. Returns its seq."""
        seq = self._seq + 1
        text = json.dumps({**body, "boot_id": self.boot_id, "seq": seq}, separators=(",", ":"))
        with self.transaction():
            self._db.execute("INSERT INTO outbox VALUES (?, ?, ?, ?, ?)", (self.boots, self.boot_id, seq, kind, text))
            surplus = self._db.execute("SELECT COUNT(*) FROM outbox").fetchone()[0] - limit
            if surplus > 0:
                oldest = self._db.execute(
                    "SELECT boot, seq FROM outbox ORDER BY boot, seq LIMIT ?", (surplus,)
                ).fetchall()
                self._db.executemany("DELETE FROM outbox WHERE boot = ? AND seq = ?", oldest)
        self._seq = seq
        return seq

    def reports(self, limit: int, after: tuple[int, int] = (0, 0)) -> tuple[tuple[tuple[int, int], OutboxRow], ...]:
        """Up to `limit` ((boot, seq), row) after that place, oldest first."""
        firsts = dict(self._db.execute("SELECT boot, MIN(seq) FROM outbox GROUP BY boot").fetchall())
        rows = self._db.execute(
            "SELECT boot, boot_id, seq, kind, body FROM outbox WHERE (boot, seq) > (?, ?) ORDER BY boot, seq LIMIT ?",
            (*after, limit),
        ).fetchall()
        return tuple(
            ((boot, seq), OutboxRow(boot_id, seq, firsts[boot], kind, json.loads(body)))
            for boot, boot_id, seq, kind, body in rows
        )

    def acknowledge(self, acks: dict[str, int]) -> int:
        """Drop what the fleet has committed; how many rows that were."""
        dropped = 0
        with self.transaction():
            for boot_id, seq in acks.items():
                dropped += self._db.execute(
                    "DELETE FROM outbox WHERE boot_id = ? AND seq <= ?", (boot_id, seq)
                ).rowcount
        return dropped

    # orders

    def accept_desired(self, generation: int, payload: bytes) -> None:
        """Keep the last accepted desired state, verified payload and all."""
        with self.transaction():
            self._set_fact("generation", str(generation).encode())
            self._set_fact("desired", payload)

    def desired(self) -> tuple[int, bytes | None]:
        """(accepted generation, its payload); (0, None) before the first."""
        generation = self._fact("generation")
        return (int(generation), self._fact("desired")) if generation else (0, None)

    def _fact(self, name: str) -> bytes | None:
        row = self._db.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        return bytes(row[0]) if row else None

    def _set_fact(self, name: str, value: bytes) -> None:
        self._db.execute(
            "INSERT INTO facts VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value", (name, value)
        )

    def _check_version(self) -> None:
        found = int(self._fact("schema") or SCHEMA_VERSION)
        if found != SCHEMA_VERSION:
            raise StoreError(
                Code.UNSUPPORTED, f"journal has schema {found}, this agent knows {SCHEMA_VERSION}; upgrade the agent"
            )
        with self.transaction():
            self._set_fact("schema", str(SCHEMA_VERSION).encode())

    def _count_boot(self) -> int:
        boots = int(self._fact("boots") or 0) + 1
        with self.transaction():
            self._set_fact("boots", str(boots).encode())
        return boots


def _deployment(row: tuple[object, ...]) -> Deployment:
    values = dict(zip((*_COLUMNS, "id"), row, strict=True))
    values["state"] = State(str(values["state"]))
    return Deployment(**values)  # type: ignore[arg-type]  # the columns have the fields' types by the schema
