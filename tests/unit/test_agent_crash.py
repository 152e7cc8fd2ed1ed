"""The crash matrix: SIGKILL before every change of disk or journal on the way from one release to the next.

Every point runs in a forked child over the simulated ports; the killed child's disk is judged as it lies, then a second
life on the same disk has to end committed. `os` inside host/files.py and the journal's commit are counted by proxies
that exist in the child alone.
"""

import json
import os
import shutil
import signal
import sqlite3
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from agent_simulators import MODEL, TOPICS, Made, Node, Publisher

from agent.journal import Journal
from agent.store import Store
from host import files
from wire import fetch
from wire.bitmap import Bitmap
from wire.digest import digest_of
from wire.documents import encode_document
from wire.messages import State

CHANGES = (
    "fchmod", "chmod", "write", "pwrite", "fsync", "fdatasync", "replace", "rename", "mkdir", "posix_fallocate",
    "ftruncate", "unlink",
)  # fmt: skip
QUICK_POINTS = 24
JOURNAL_EVERY_BYTES = 150_000


class Fuse:
    """Counts changes and kills its process at one of them; the trace stays in a file."""

    def __init__(self, trace: Path, burn_at: int) -> None:
        self._trace = os.open(trace, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._burn_at = burn_at
        self._count = 0

    def step(self, what: str) -> None:
        self._count += 1
        os.write(self._trace, f"{what}\n".encode())
        if self._count == self._burn_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def over(self, module: object, names: tuple[str, ...], prefix: str) -> object:
        """A stand-in for `module` whose functions `names` pass the fuse first."""
        fuse = self

        class Proxy:
            def __getattr__(self, name: str) -> object:
                real = getattr(module, name)
                if name not in names:
                    return real

                def fused(*arguments: object, **more: object) -> object:
                    fuse.step(f"{prefix}{name}")
                    return real(*arguments, **more)

                return fused

        return Proxy()


@pytest.fixture(scope="module")
def publisher() -> Publisher:
    return Publisher()


@pytest.fixture(scope="module")
def releases(publisher: Publisher) -> tuple[Made, Made]:
    old = publisher.make("1.0", weights_bytes=150_000)
    return old, publisher.make("2.0", weights_bytes=700_000, base=old)


@pytest.fixture(scope="module")
def template(tmp_path_factory, publisher, releases) -> Path:
    """A node's disk on which the old release is committed."""
    directory = tmp_path_factory.mktemp("template")
    life(directory, publisher, releases, target=0)
    return directory


@pytest.fixture(scope="module")
def trace(tmp_path_factory, template, publisher, releases) -> list[str]:
    """Every change on the way to the new release, in order."""
    directory = tmp_path_factory.mktemp("trace")
    shutil.copytree(template / "store", directory / "store")
    assert in_child(lambda: burning_life(directory, publisher, releases, burn_at=0)) == 0
    return (directory / "trace").read_text().splitlines()


def life(directory: Path, publisher: Publisher, releases: tuple[Made, Made], target: int) -> Node:
    """One life of the agent, in this process, until release `target` is committed."""
    fetch.JOURNAL_EVERY_BYTES = JOURNAL_EVERY_BYTES
    node = Node(directory, publisher)
    for made in releases:
        node.broker.offer(made)
    wanted = releases[target]
    node.broker.put(TOPICS.desired(node.settings.node), publisher.desired(target + 1, wanted))
    node.start()
    node.run_until(
        lambda: (
            [row for row in node.journal.deployments() if row.release == wanted.digest]
            and node.row.state is State.COMMITTED
            and node.engine._runner is None
        )
    )
    node.turn()
    node.journal.close()
    return node


def burning_life(directory: Path, publisher: Publisher, releases: tuple[Made, Made], burn_at: int) -> None:
    fuse = Fuse(directory / "trace", burn_at)
    files.os = fuse.over(os, CHANGES, "os.")
    files.shutil = fuse.over(shutil, ("rmtree",), "shutil.")
    commit = Journal._commit

    def fused_commit(journal: Journal) -> None:
        fuse.step("journal.commit")
        commit(journal)
        fuse.step("journal.committed")

    Journal._commit = fused_commit
    life(directory, publisher, releases, target=1)


def in_child(work: Callable[[], None]) -> int:
    """Run `work` in a forked child; its wait status as a return code (negative for a signal)."""
    pid = os.fork()
    if pid == 0:
        status = 70
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def journalled(directory: Path, made: Made) -> Bitmap:
    with closing(sqlite3.connect(directory / "store/journal.sqlite")) as journal:
        row = journal.execute("SELECT frames, verified FROM fetch WHERE artifact = ?", (made.artifact,)).fetchone()
    return Bitmap(row[0], row[1]) if row else Bitmap(made.manifest.frame_count)


def assert_serves_whole(directory: Path, releases: tuple[Made, Made]) -> None:
    """serving.json names exactly one of the two releases, whose every byte is there."""
    store = Store(directory / "store")
    (entry,) = store.serving().models
    made = next(made for made in releases if made.decoded == entry.decoded)
    version = store.version_path(entry.decoded)
    assert {path.name: digest_of(path.read_bytes()) for path in version.iterdir()} == {
        **{name: digest_of(content) for name, content in made.files.items()},
        "version.json": digest_of(encode_document(made.version)),
    }


def kill_and_resume(
    directory: Path, template: Path, publisher: Publisher, releases: tuple[Made, Made], at: int
) -> None:
    shutil.copytree(template / "store", directory / "store")
    code = in_child(lambda: burning_life(directory, publisher, releases, burn_at=at))
    ended_before = code == 0 and len((directory / "trace").read_text().splitlines()) < at
    assert code == -signal.SIGKILL or ended_before  # a loaded machine may flush once more or less
    assert_serves_whole(directory, releases)
    verified = journalled(directory, releases[1])
    node = life(directory, publisher, releases, target=1)
    assert_serves_whole(directory, releases)
    store = Store(directory / "store")
    assert store.served(MODEL).decoded == releases[1].decoded
    again = [frame for artifact, frame in node.broker.sent if artifact == releases[1].artifact and frame in verified]
    assert again == []
    assert store.versions() == {releases[0].decoded, releases[1].decoded}
    assert not list(store.staging_directory.iterdir())
    assert not list(store.work_directory.iterdir())


def test_trace_covers_every_kind_of_change(trace):
    assert {"os.pwrite", "os.fdatasync", "os.replace", "os.rename", "os.chmod", "journal.commit"} <= set(trace)
    assert trace.count("os.fdatasync") >= 3


def test_no_frame_is_journalled_before_it_is_flushed(trace):
    unflushed = False
    for change in trace:
        if change == "os.pwrite":
            unflushed = True
        elif change == "os.fdatasync":
            unflushed = False
        assert not (change == "journal.commit" and unflushed)


@pytest.mark.parametrize("share", range(QUICK_POINTS))
def test_agent_killed_at_a_sampled_change_resumes_and_commits(tmp_path, template, publisher, releases, trace, share):
    at = 1 + share * len(trace) // QUICK_POINTS
    kill_and_resume(tmp_path, template, publisher, releases, at)


@pytest.mark.full
def test_agent_killed_at_every_change_resumes_and_commits(tmp_path, template, publisher, releases, trace):
    failed = {}
    for at in range(1, len(trace) + 1):
        directory = tmp_path / str(at)
        directory.mkdir()
        try:
            kill_and_resume(directory, template, publisher, releases, at)
        except AssertionError as error:
            failed[f"{at} {trace[at - 1]}"] = str(error)[:300]
        files.remove_tree(directory)
    assert not failed, json.dumps(failed, indent=1)


@pytest.mark.full
def test_agent_killed_again_and_again_still_commits(tmp_path, template, publisher, releases):
    shutil.copytree(template / "store", tmp_path / "store")
    for at in range(3, 60, 4):
        in_child(lambda at=at: burning_life(tmp_path, publisher, releases, burn_at=at))
        assert_serves_whole(tmp_path, releases)
    life(tmp_path, publisher, releases, target=1)
    assert Store(tmp_path / "store").served(MODEL).decoded == releases[1].decoded
