"""Packed weights in files: written whole or not at all, used only as they were proved, kept only while needed."""

import itertools
import os
import platform
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from runtime_fixtures import base_version

from host import files
from runtime import prepack
from runtime.candidate import USED_SHARE
from runtime.cpu import detect_cpu
from runtime.memory import resident_share
from runtime.model import Model, Shape
from runtime.prepack import DOCUMENT_FILE, PrepackCache, PrepackDocument, PrepackKey, load_model
from runtime.session import ONNXRUNTIME, save_sessions
from runtime.version import weights_bytes
from runtime.ways import FLOAT_ACTIVATIONS
from wire.digest import digest_of
from wire.documents import encode_document
from wire.errors import ArtifactError, Code, StoreError
from wire.serving import ExecutionOptions, IntegerReading, Serving, ServingModel, prepack_factor

CPU = str(detect_cpu())
OPTIONS = ExecutionOptions(threads=1)
VERSION = base_version()


def key(
    decoded: str = VERSION.decoded, options: ExecutionOptions = OPTIONS, onnxruntime: str = ONNXRUNTIME
) -> PrepackKey:
    return PrepackKey.of(decoded, CPU, onnxruntime, options)


def keep(cache: PrepackCache, wanted: PrepackKey | None = None) -> tuple[Path, str]:
    """Draft and commit the sample's weights under a key; returns the directory and the digest of its document."""
    with cache.draft(wanted or key(), VERSION.directory, OPTIONS, weights_bytes(VERSION.document)) as draft:
        digest = draft.commit()
    return draft.directory, digest


def entry(prepack: str | None, decoded: str = VERSION.decoded, onnxruntime: str = ONNXRUNTIME) -> ServingModel:
    return ServingModel(
        model="tales", release="0" * 64, version="1", decoded=decoded, options=OPTIONS, prepack=prepack, cpu=CPU,
        onnxruntime=onnxruntime,
    )  # fmt: skip


def build(packed: Path | None) -> Model:
    return Model(VERSION.directory, VERSION.document.config, Shape(1, 256), OPTIONS, packed)


@pytest.fixture
def cache(tmp_path: Path) -> PrepackCache:
    return PrepackCache(tmp_path / "cache")


@pytest.fixture
def kept(cache: PrepackCache) -> tuple[Path, str]:
    return keep(cache)


def change(path: Path, edit: Callable[[bytes], bytes]) -> None:
    """Put other bytes in the place of a read-only file."""
    path.parent.chmod(0o750)
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(edit(data))


def test_model_over_mapped_weights_computes_the_same_bits(cache: PrepackCache, kept: tuple[Path, str]) -> None:
    heap, (mapped, stale) = build(None), load_model(cache, entry(kept[1]), "", build)
    assert stale == ""
    prompt = list(range(3, 103))
    assert np.array_equal(heap.prefill(0, prompt, 0), mapped.prefill(0, prompt, 0))
    assert np.array_equal(heap.decode([7], [100]), mapped.decode([7], [100]))
    assert resident_share(kept[0].resolve()) > 0.5
    for model in (heap, mapped):
        model.close()
    assert resident_share(kept[0].resolve()) == 0.0


def test_what_is_kept_is_read_only_described_and_within_what_the_agent_counts(kept: tuple[Path, str]) -> None:
    document = PrepackDocument.model_validate_json((kept[0] / DOCUMENT_FILE).read_bytes())
    assert {path.name for path in kept[0].iterdir()} == {DOCUMENT_FILE, *(file.path for file in document.files)}
    assert all(path.stat().st_mode & 0o777 == 0o440 for path in kept[0].iterdir())
    size_bytes = sum(file.size_bytes for file in document.files)
    assert weights_bytes(VERSION.document) < size_bytes < prepack_factor(1) * weights_bytes(VERSION.document)


def test_cache_that_is_there_and_right_is_not_written_again(cache: PrepackCache, kept: tuple[Path, str]) -> None:
    before = (kept[0] / "decode.bin").stat().st_ino
    assert keep(cache) == kept
    assert (kept[0] / "decode.bin").stat().st_ino == before
    change(kept[0] / "decode.bin", lambda data: data[:-1] + b"\x55")
    assert keep(cache) == kept, "the same weights are packed to the same bytes"


@pytest.mark.parametrize(
    ("name", "edit"),
    [
        ("decode.bin", lambda data: data[:-4096]),
        ("decode.bin", lambda data: data[:5000] + bytes([data[5000] ^ 1]) + data[5001:]),
        ("decode.onnx", lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]),
        (DOCUMENT_FILE, lambda data: data.replace(b'"decode.bin"', b'"decoda.bin"')),
        (DOCUMENT_FILE, lambda data: b""),
    ],
)
def test_cache_that_is_not_what_was_proved_is_not_used(
    cache: PrepackCache, kept: tuple[Path, str], name: str, edit: Callable[[bytes], bytes]
) -> None:
    change(kept[0] / name, edit)
    model, stale = load_model(cache, entry(kept[1]), "", build)
    assert "prepack cache cannot be used" in stale
    assert resident_share(kept[0].resolve()) == 0.0
    reference = build(None)
    assert np.array_equal(model.prefill(0, [5, 6, 7], 0), reference.prefill(0, [5, 6, 7], 0))
    model.close()
    reference.close()


def test_changed_byte_is_found_though_the_file_was_right_before(cache: PrepackCache, kept: tuple[Path, str]) -> None:
    directory, document = cache.open(key(), kept[1])
    cache.verify(directory, document)
    weights = directory / "decode.bin"
    times = weights.stat()
    directory.chmod(0o750)
    weights.chmod(0o640)
    with weights.open("r+b") as file:
        file.seek(5000)
        file.write(b"\x55\xaa\x55")
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(ArtifactError) as caught:
        cache.verify(directory, document)
    assert caught.value.code is Code.DIGEST_MISMATCH


def describe_anew(directory: Path, name: str) -> str:
    """Put the digest that a file has now into the document; returns the document's."""
    digest = digest_of((directory / name).read_bytes())
    change(
        directory / DOCUMENT_FILE,
        lambda data: re.sub(rb'("%s","sha256":")[0-9a-f]+' % name.encode(), rb"\g<1>" + digest.encode(), data),
    )
    return digest_of((directory / DOCUMENT_FILE).read_bytes())


def test_cache_that_fits_its_own_document_but_was_not_proved_is_not_used(
    cache: PrepackCache, kept: tuple[Path, str]
) -> None:
    change(kept[0] / "decode.bin", lambda data: data[:9000] + bytes([data[9000] ^ 1]) + data[9001:])
    digest = describe_anew(kept[0], "decode.bin")
    cache.verify(*cache.open(key(), digest))
    with pytest.raises(ArtifactError, match="not the prepack cache that was proved"):
        cache.open(key(), kept[1])


def test_cache_of_another_version_under_the_name_is_not_used(cache: PrepackCache, kept: tuple[Path, str]) -> None:
    other = key(options=ExecutionOptions(threads=1, session_config={"session.disable_prepacking": "0"}))
    directory, digest = keep(cache, other)
    files.remove_tree(kept[0])
    files.move_directory(directory, kept[0])
    with pytest.raises(ArtifactError, match="other sessions"):
        cache.open(key(), digest)


def test_graph_that_reads_another_file_is_not_used(cache: PrepackCache, kept: tuple[Path, str]) -> None:
    """Though every digest is right: whatever wrote it, a graph reads nothing but the weights beside it."""
    change(kept[0] / "decode.onnx", lambda data: data.replace(b"decode.bin", b"../elsewhe"))
    digest = describe_anew(kept[0], "decode.onnx")
    with pytest.raises(ArtifactError, match="elsewhe"):
        cache.open(key(), digest)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="only x86 has other kernels for the same weights")
def test_weights_packed_for_other_kernels_stay_out_of_memory_by_which_a_probe_knows(kept: tuple[Path, str]) -> None:
    options = OPTIONS.model_copy(update={"session_config": FLOAT_ACTIVATIONS})
    model = Model(VERSION.directory, VERSION.document.config, Shape(1, 256), options, kept[0])
    model.warm_up()
    assert 0 < resident_share(kept[0].resolve()) < USED_SHARE
    model.close()


@pytest.mark.parametrize(
    "reading", [{"reading_config": FLOAT_ACTIVATIONS}, {"reading_config": {}, "integer_reading": IntegerReading.ALL}]
)
def test_each_session_has_files_of_its_own(cache: PrepackCache, reading: dict[str, object]) -> None:
    options = OPTIONS.model_copy(update=reading)
    with cache.draft(key(options=options), VERSION.directory, options, weights_bytes(VERSION.document)) as draft:
        draft.commit()
    assert {path.name for path in draft.directory.iterdir()} == {
        DOCUMENT_FILE, "decode.onnx", "decode.bin", "read.onnx", "read.bin",
    }  # fmt: skip
    assert draft.size_bytes < prepack_factor(2) * weights_bytes(VERSION.document)
    model = Model(VERSION.directory, VERSION.document.config, Shape(1, 256), options, draft.directory)
    heap = Model(VERSION.directory, VERSION.document.config, Shape(1, 256), options)
    for wide in (True, False):
        prompt = list(range(3, 103))
        assert np.array_equal(heap.prefill(0, prompt, 0, wide=wide), model.prefill(0, prompt, 0, wide=wide))
    model.close()
    heap.close()


def test_draft_that_is_not_committed_leaves_nothing(cache: PrepackCache) -> None:
    with cache.draft(key(), VERSION.directory, OPTIONS, weights_bytes(VERSION.document)) as draft:
        assert (draft.directory / "decode.bin").is_file()
    assert not [path for path in cache.home.rglob("*") if path.is_file()]


def test_disk_that_has_no_room_gets_nothing_written(cache: PrepackCache) -> None:
    with (
        pytest.raises(StoreError) as caught,
        cache.draft(key(), VERSION.directory, OPTIONS, weights_bytes=1 << 60),
    ):
        pytest.fail("there was room")
    assert caught.value.code is Code.NO_SPACE
    assert not [path for path in cache.home.rglob("*") if path.is_file()]


def store_with(home: Path, *decoded: str) -> Path:
    store = home / "store"
    for name in decoded:
        (store / "versions" / name).mkdir(parents=True)
    return store


def name_served(store: Path, *entries: ServingModel) -> Serving:
    serving = Serving(models=entries)
    (store / "serving.json").write_bytes(encode_document(serving))
    return serving


def test_sweep_keeps_what_serves_and_what_a_roll_back_needs(cache: PrepackCache, tmp_path: Path) -> None:
    gone, old, now = "a" * 64, "b" * 64, VERSION.decoded
    kept = {name: keep(cache, key(name)) for name in (gone, old, now)}
    elder = keep(cache, key(old, onnxruntime="1.0"))
    newer = keep(cache, key(old, onnxruntime="2.0"))
    surplus = keep(cache, key(now, onnxruntime="1.0"))
    store = store_with(tmp_path, old, now)
    serving = name_served(store, entry(kept[now][1]))
    cache.sweep(store, serving)
    left = {path.parent for path in cache.home.rglob(DOCUMENT_FILE)}
    assert left == {kept[now][0], newer[0]}
    assert not {kept[gone][0], elder[0], surplus[0]} & left
    assert not (cache.home / gone).exists()


def test_sweep_keeps_what_is_about_to_be_named(cache: PrepackCache, tmp_path: Path) -> None:
    before = keep(cache)
    store = store_with(tmp_path, VERSION.decoded)
    serving = name_served(store, entry(before[1]))
    proved = keep(cache, key(onnxruntime="2.0"))
    assert cache.sweep(store, serving) == ()
    serving = name_served(store, entry(proved[1], onnxruntime="2.0"))
    assert cache.sweep(store, serving) == (str(before[0].relative_to(cache.home)),)


def test_sweep_leaves_a_draft_alone(cache: PrepackCache, tmp_path: Path) -> None:
    with cache.draft(key(), VERSION.directory, OPTIONS, weights_bytes(VERSION.document)) as draft:
        assert cache.sweep(store_with(tmp_path), Serving()) == ()
        draft.commit()
    assert (draft.directory / DOCUMENT_FILE).is_file()
    assert cache.sweep(store_with(tmp_path), Serving()) == (VERSION.decoded,)
    assert PrepackCache(tmp_path / "none").sweep(tmp_path, Serving()) == ()


def test_draft_that_is_killed_at_any_change_of_the_disk_leaves_no_cache_that_is_taken(tmp_path: Path) -> None:
    """The points are those of host/files.py, and the middle of the file that onnxruntime writes."""
    done = subprocess.run([sys.executable, __file__, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    killed, whole = (int(word) for word in done.stdout.split())
    assert killed > 10
    assert 0 < whole < killed


def crash_everywhere(home: Path) -> None:
    """Kill drafts at one change after the other until one ends; tells how many died, and how many were whole then."""
    killed = whole = 0
    while True:
        cache = PrepackCache(home / str(killed))
        child = os.fork()
        if child == 0:
            burn(cache, at=killed + 1)
        status = os.waitpid(child, 0)[1]
        if status == 0:
            break
        assert os.WIFSIGNALED(status), status
        killed += 1
        if cache._directory(key()).is_dir():
            found = cache._find(key())
            assert found is not None, "a cache has its name and is not whole"
            whole += 1
        assert keep(cache) is not None
        assert not list(cache.home.rglob(".writing*"))
    sys.stdout.write(f"{killed} {whole}\n")


def burn(cache: PrepackCache, at: int) -> None:
    """Draft and commit in this process, which dies before its change number `at`."""
    steps = itertools.count(1)

    def step() -> None:
        if next(steps) == at:
            os.kill(os.getpid(), signal.SIGKILL)

    class Fused:
        def __getattr__(self, name: str) -> object:
            real = getattr(os, name)
            if name not in {"mkdir", "chmod", "fchmod", "write", "fsync", "replace", "rename", "unlink"}:
                return real

            def fused(*arguments: object, **more: object) -> object:
                step()
                return real(*arguments, **more)

            return fused

    def torn(version: Path, options: ExecutionOptions, into: Path) -> None:
        save_sessions(version, options, into)
        weights = into / "decode.bin"
        data = weights.read_bytes()
        weights.write_bytes(data[: len(data) // 2])
        step()
        weights.write_bytes(data)

    files.os = Fused()
    prepack.save_sessions = torn
    keep(cache)
    os._exit(0)


if __name__ == "__main__":
    crash_everywhere(Path(sys.argv[1]))
