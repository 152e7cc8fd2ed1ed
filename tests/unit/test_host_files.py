"""Durable files: what a reader sees, what is refused, and in which order the disk is told."""

import os
import stat
from pathlib import Path

import pytest

from host import files
from wire.errors import Code, StoreError


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the calls of `os` that change the disk, in order."""
    seen: list[str] = []

    class Spy:
        def __getattr__(self, name: str) -> object:
            real = getattr(os, name)
            if name not in {"fsync", "replace", "rename", "chmod", "write", "fdatasync"}:
                return real

            def spied(*arguments: object, **more: object) -> object:
                seen.append(name)
                return real(*arguments, **more)

            return spied

    monkeypatch.setattr(files, "os", Spy())
    return seen


def test_write_flushes_file_before_rename_and_directory_after(tmp_path, calls):
    files.write_atomically(tmp_path / "a.json", b"new")
    assert calls == ["write", "fsync", "replace", "fsync"]
    assert (tmp_path / "a.json").read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    files.write_atomically(path, b"old")

    def full(*_: object) -> int:
        raise OSError(28, "full")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(StoreError) as caught:
        files.write_atomically(path, b"new")
    assert caught.value.code is Code.NO_SPACE
    assert path.read_bytes() == b"old"


def test_write_over_a_left_temporary_file_succeeds(tmp_path):
    (tmp_path / ".a.tmp").write_bytes(b"half of something longer")
    files.write_atomically(tmp_path / "a", b"new", mode=0o600)
    assert (tmp_path / "a").read_bytes() == b"new"
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o600


def test_committed_directory_is_read_only_and_flushed_before_its_name(tmp_path, calls):
    work = tmp_path / "work"
    work.mkdir()
    (work / "a").write_bytes(b"a")
    (work / "b").write_bytes(b"b")
    final = tmp_path / "versions"
    final.mkdir()
    files.commit_directory(work, final / "v")
    assert stat.S_IMODE((final / "v").stat().st_mode) == 0o550
    assert {stat.S_IMODE(path.stat().st_mode) for path in (final / "v").iterdir()} == {0o440}
    assert calls.count("fsync") == 6  # two files, the directory before, sealed, and both parents
    assert calls.index("rename") == 5


def test_commit_refuses_links_and_existing_names(tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    (work / "link").symlink_to("/etc/passwd")
    with pytest.raises(StoreError, match="no plain file"):
        files.commit_directory(work, tmp_path / "v")
    (tmp_path / "w").mkdir()
    with pytest.raises(StoreError, match="never replaced"):
        files.commit_directory(work, tmp_path / "w")


def test_tree_of_read_only_directories_is_removed_and_links_are_not_followed(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "keep").write_bytes(b"x")
    tree = tmp_path / "tree"
    (tree / "inner").mkdir(parents=True)
    (tree / "inner" / "file").write_bytes(b"x")
    (tree / "link").symlink_to(outside)
    (tree / "inner").chmod(0o550)
    tree.chmod(0o550)
    files.remove_tree(tree)
    files.remove_tree(tree)
    assert not tree.exists()
    assert (outside / "keep").exists()


def test_preallocated_file_has_its_size_and_keeps_what_was_there(tmp_path):
    path = tmp_path / "pack"
    files.preallocate(path, 100_000)
    assert path.stat().st_size == 100_000
    assert path.stat().st_blocks * 512 >= 100_000
    with path.open("r+b") as file:
        files.write_at(file.fileno(), b"frame", 5000)
        files.sync_data(file.fileno())
    files.preallocate(path, 100_000)
    assert path.read_bytes()[5000:5005] == b"frame"


def test_reading_is_bounded_and_missing_is_no_store_fault(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"12345")
    assert files.read_bounded(path, 5) == b"12345"
    with pytest.raises(StoreError) as caught:
        files.read_bounded(path, 4)
    assert caught.value.code is Code.CORRUPT
    with pytest.raises(FileNotFoundError):
        files.read_bounded(tmp_path / "b", 4)


def test_directory_lock_is_held_once(tmp_path):
    held = files.lock_directory(tmp_path)
    with pytest.raises(StoreError, match="another process"):
        files.lock_directory(tmp_path)
    os.close(held)
    os.close(files.lock_directory(tmp_path))


def test_directories_are_made_with_their_parents(tmp_path: Path):
    files.make_directory(tmp_path / "a/b/c")
    files.make_directory(tmp_path / "a/b/c")
    assert (tmp_path / "a/b/c").is_dir()
    assert files.tree_size_bytes(tmp_path / "a") == 0
