"""The store: what survives a start, what is refused, what serves."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from agent_simulators import MODEL, Made, Publisher

from agent.store import Store
from host import files
from wire.documents import encode_document
from wire.errors import ArtifactError, Code, StoreError
from wire.serving import ExecutionOptions, Serving, ServingModel


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "store")
    store.adopt(frozenset())
    return store


@pytest.fixture(scope="module")
def made() -> list[Made]:
    publisher = Publisher()
    return [publisher.make(version, weights_bytes=2000) for version in ("1.0", "2.0", "3.0")]


def work_of(store: Store, made: Made) -> Path:
    work = store.new_work("decode")
    for name, content in made.files.items():
        (work / name).write_bytes(content)
    (work / "version.json").write_bytes(encode_document(made.version))
    return work


def entry(made: Made) -> ServingModel:
    options = ExecutionOptions(threads=1)
    return ServingModel(
        model=MODEL, release=made.digest, version="1", decoded=made.decoded, options=options, cpu="", onnxruntime=""
    )


def test_committed_version_is_adopted_by_the_next_start(store, made):
    store.commit_version(work_of(store, made[0]), made[0].decoded)
    assert store.adopt(frozenset()).versions == {made[0].decoded}


def test_version_that_is_another_is_not_committed(store, made):
    with pytest.raises(ArtifactError) as caught:
        store.commit_version(work_of(store, made[0]), made[1].decoded)
    assert caught.value.code is Code.DIGEST_MISMATCH
    assert store.versions() == frozenset()


def test_version_left_writable_by_a_crash_is_sealed(store, made):
    store.commit_version(work_of(store, made[0]), made[0].decoded)
    path = store.version_path(made[0].decoded)
    path.chmod(0o750)
    store.adopt(frozenset())
    assert path.stat().st_mode & 0o777 == 0o550


@pytest.mark.parametrize("harm", ["missing file", "short file", "other document", "odd name"])
def test_version_that_is_not_whole_is_removed_at_start(store, made, harm):
    store.commit_version(work_of(store, made[0]), made[0].decoded)
    path = store.version_path(made[0].decoded)
    path.chmod(0o750)
    if harm == "missing file":
        (path / "weights.bin").unlink()
    elif harm == "short file":
        (path / "weights.bin").chmod(0o640)
        (path / "weights.bin").write_bytes(b"short")
    elif harm == "other document":
        (path / "version.json").chmod(0o640)
        (path / "version.json").write_bytes(b"{}")
    else:
        path.rename(path.with_name("v1"))
    adopted = store.adopt(frozenset())
    assert adopted.versions == frozenset()
    assert list(store.versions_directory.iterdir()) == []
    assert len(adopted.removed) == 1


def test_version_that_serves_is_never_removed(store, made):
    store.commit_version(work_of(store, made[0]), made[0].decoded)
    store.serve(MODEL, entry(made[0]))
    path = store.version_path(made[0].decoded)
    path.chmod(0o750)
    (path / "weights.bin").unlink()
    store.adopt(frozenset())
    assert path.is_dir()
    store.prune(frozenset())
    assert path.is_dir()


def test_staging_is_kept_only_for_what_the_journal_names(store):
    kept, stray = "a" * 64, "b" * 64
    for artifact in (kept, stray):
        store.stage_manifest(artifact, b"{}")
        files.preallocate(store.pack_path(artifact), 10)
    (store.staging_directory / f".{kept}.manifest.json.tmp").write_bytes(b"half")
    (store.work_directory / "decode-x").mkdir()
    store.adopt(frozenset({kept}))
    assert sorted(path.name for path in store.staging_directory.iterdir()) == [f"{kept}.manifest.json", f"{kept}.pack"]
    assert list(store.work_directory.iterdir()) == []


def test_staged_manifest_that_changed_is_refused(store, made):
    store.stage_manifest(made[0].artifact, encode_document(made[0].manifest))
    assert store.staged_manifest(made[0].artifact) == made[0].manifest
    store.stage_manifest(made[0].artifact, encode_document(made[1].manifest))
    with pytest.raises(StoreError, match="damaged"):
        store.staged_manifest(made[0].artifact)


def test_serving_names_only_versions_that_are_here(store, made):
    with pytest.raises(StoreError, match="not on this node"):
        store.serve(MODEL, entry(made[0]))
    assert store.serving() == Serving()


def test_serving_entry_is_replaced_and_removed_without_touching_others(store, made):
    other = entry(made[1]).model_copy(update={"model": "another"})
    for one in made[:2]:
        store.commit_version(work_of(store, one), one.decoded)
    store.serve(MODEL, entry(made[0]))
    store.serve("another", other)
    assert [kept.model for kept in store.serving().models] == ["another", MODEL]
    store.serve(MODEL, None)
    assert store.serving().models == (other,)


def test_pruning_keeps_what_serves_and_what_is_named(store, made):
    for one in made:
        store.commit_version(work_of(store, one), one.decoded)
    store.serve(MODEL, entry(made[2]))
    assert store.prune(frozenset({made[1].decoded})) == (made[0].decoded,)
    assert store.versions() == {made[1].decoded, made[2].decoded}
