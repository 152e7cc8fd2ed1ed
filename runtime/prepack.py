"""The prepack cache: weights as this CPU's kernels want them, in files that are mapped instead of on the heap.

`HOME/DECODED/KEY/` holds prepack.json and, for each session of the model, its optimised graph and its weights. The
probe child writes, the server reads. Invariants: a directory that has its final name is whole and read-only; nothing of
it reaches onnxruntime unless its document has the digest that serving.json names, and nothing computed from its weights
reaches a client unless they have the digests of the document. `sweep` bounds it. A crash leaves `.writing-KEY`, which
is never read and which the next draft or sweep removes.
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Annotated, Protocol, TypeVar

from pydantic import Field, StringConstraints

from host import files
from runtime.external import check_external_data
from runtime.session import DECODING, READING, packed_files, save_sessions
from runtime.version import GRAPH_LIMIT_BYTES, check_file
from wire.digest import Digest, digest_of
from wire.documents import Command, SchemaOne, encode_document, parse_document
from wire.errors import AmperageError, ArtifactError, Code, StoreError
from wire.serving import ExecutionOptions, IntegerReading, Serving, ServingModel, prepack_factor

DOCUMENT_FILE = "prepack.json"
DOCUMENT_LIMIT_BYTES = 64 * 1024
RESERVE_BYTES = 64 << 20
"""What must stay free on the file system of the cache."""
_WRITING = ".writing-"


class PackedFile(Command):
    """One file of a cache directory."""

    path: Annotated[str, StringConstraints(pattern=r"^[a-z]+\.(onnx|bin)$", strict=True)]
    size_bytes: Annotated[int, Field(ge=0)]
    sha256: Digest


class PrepackKey(Command):
    """What packed weights depend on; the digest of this names the directory."""

    decoded: Digest
    cpu: str
    onnxruntime: str
    provider: str
    session_config: dict[str, str]
    reading_config: dict[str, str] | None
    integer_reading: IntegerReading | None

    @classmethod
    def of(cls, decoded: str, cpu: str, onnxruntime: str, options: ExecutionOptions) -> "PrepackKey":
        """The key of a version; threads and spinning change nothing in the files."""
        return cls(
            decoded=decoded, cpu=cpu, onnxruntime=onnxruntime, provider=options.provider,
            session_config=options.session_config, reading_config=options.reading_config,
            integer_reading=options.integer_reading,
        )  # fmt: skip


class PrepackDocument(Command):
    """`prepack.json`; its digest is ServingModel.prepack."""

    schema_: SchemaOne = 1
    key: PrepackKey
    files: Annotated[tuple[PackedFile, ...], Field(min_length=2, max_length=4)]


class Model(Protocol):
    """What a cache needs of a loaded model."""

    def warm_up(self) -> None:
        """Run it once."""

    def close(self) -> None:
        """Give its memory back."""


Loadable = TypeVar("Loadable", bound=Model)


@dataclass(slots=True)
class Draft:
    """Packed weights that are not in use yet: to be judged from `directory`, then committed."""

    directory: Path
    final: Path
    document: PrepackDocument

    @property
    def size_bytes(self) -> int:
        """Of its files."""
        return sum(entry.size_bytes for entry in self.document.files)

    def commit(self) -> str:
        """Give it its name for good; returns the digest of its document. Raises StoreError."""
        if self.directory != self.final:
            files.commit_directory(self.directory, self.final)
            self.directory = self.final
        return digest_of(encode_document(self.document))


class PrepackCache:
    """All caches below one directory, and which of their bytes this process has read and found right."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self._verified: set[tuple[str, tuple[int, ...]]] = set()

    def open(self, key: PrepackKey, digest: str) -> tuple[Path, PrepackDocument]:
        """The directory of `key`, checked but for the bytes of its weights; raises StoreError, ArtifactError."""
        directory = self._directory(key)
        try:
            data = files.read_bounded(directory / DOCUMENT_FILE, DOCUMENT_LIMIT_BYTES)
        except FileNotFoundError as error:
            raise StoreError(Code.CORRUPT, f"there is no prepack cache {directory}") from error
        if digest_of(data) != digest:
            raise ArtifactError(Code.DIGEST_MISMATCH, f"{directory} is not the prepack cache that was proved")
        document = parse_document(PrepackDocument, data)
        entries = {entry.path: entry for entry in document.files}
        for entry in document.files:
            check_file(directory / entry.path, entry.size_bytes)
        for graph, weights in _pairs(key):
            if document.key != key or not {graph, weights} <= entries.keys():
                raise ArtifactError(Code.CORRUPT, f"{directory} holds other sessions than its name says")
            with (directory / graph).open("rb") as file:
                _check_bytes(file, entries[graph], directory)
            check_external_data(directory / graph, weights, GRAPH_LIMIT_BYTES)
        return directory, document

    def verify(self, directory: Path, document: PrepackDocument) -> None:
        """Read every byte that this process has not found right before; raises ArtifactError, OSError.

        A file is known by its inode, size and times: its owner cannot set back the time of a change (inode(7), ctime).
        """
        for entry in document.files:
            with (directory / entry.path).open("rb") as file:
                found = os.fstat(file.fileno())
                times = (found.st_mtime_ns, found.st_ctime_ns)
                known = (entry.sha256, (found.st_dev, found.st_ino, found.st_size, *times))
                if known not in self._verified:
                    _check_bytes(file, entry, directory)
                    self._verified.add(known)

    def load(self, entry: ServingModel, build: Callable[[Path], Loadable]) -> Loadable:
        """`build` a model over the cache that `entry` names, and warm it up.

        The weights are hashed while onnxruntime packs what it then throws away, and before anything runs.
        Raises StoreError, ArtifactError, DeployError, OSError.
        """
        if entry.prepack is None:
            raise StoreError(Code.CORRUPT, "no prepack cache was proved")
        directory, document = self.open(_key_of(entry), entry.prepack)
        with ThreadPoolExecutor(1, "prepack-check") as pool:
            check = pool.submit(self.verify, directory, document)
            model = build(directory)
            try:
                check.result()
                model.warm_up()
            except (AmperageError, OSError):
                model.close()
                raise
        return model

    @contextmanager
    def draft(self, key: PrepackKey, version: Path, options: ExecutionOptions, weights_bytes: int) -> Iterator[Draft]:
        """Packed weights of the directory `version`, found or written; what is written and not committed is removed.

        Nobody else drafts or sweeps meanwhile. Raises StoreError, DeployError.
        """
        final = self._directory(key)
        files.make_directory(final.parent)
        lock = files.lock_directory(self.home)
        writing = final.with_name(f"{_WRITING}{final.name}")
        try:
            document = self._find(key)
            if document is None:
                files.remove_tree(final)
                document = self._write(key, version, options, weights_bytes, writing)
                yield Draft(writing, final, document)
            else:
                yield Draft(final, final, document)
        finally:
            files.remove_tree(writing)
            os.close(lock)

    def sweep(self, store: Path, serving: Serving) -> tuple[str, ...]:
        """Remove what no version of `store` needs; returns what was removed, nothing while a draft is being made.

        Kept are the caches that `serving` names and, of each version, the newest: a roll-back may go to it. Of one that
        serves only when it is newer than serving.json, in which it may be about to be named. Raises StoreError.
        """
        try:
            lock = files.lock_directory(self.home)
        except (FileNotFoundError, StoreError):
            return ()
        try:
            surplus = list(self._surplus(store, serving))
            for path in surplus:
                files.remove_tree(path)
        finally:
            os.close(lock)
        return tuple(str(path.relative_to(self.home)) for path in surplus)

    def _surplus(self, store: Path, serving: Serving) -> Iterator[Path]:
        named = {self._directory(_key_of(entry)) for entry in serving.models if entry.prepack is not None}
        serves = {entry.decoded for entry in serving.models}
        for version in sorted(self.home.iterdir()):
            if not (store / "versions" / version.name).is_dir():
                yield version
                continue
            caches = sorted(version.iterdir(), key=lambda path: path.lstat().st_ctime_ns)
            whole = [path for path in caches if not path.name.startswith(_WRITING)]
            newest = whole[-1:] if version.name not in serves else [path for path in whole[-1:] if _newer(path, store)]
            yield from (path for path in caches if path not in named and path not in newest)

    def _find(self, key: PrepackKey) -> PrepackDocument | None:
        """The document of a cache that is there, whole and right; None when there is none or not such a one."""
        try:
            data = files.read_bounded(self._directory(key) / DOCUMENT_FILE, DOCUMENT_LIMIT_BYTES)
            directory, document = self.open(key, digest_of(data))
            self.verify(directory, document)
        except (AmperageError, OSError):
            return None
        return document

    def _write(
        self, key: PrepackKey, version: Path, options: ExecutionOptions, weights_bytes: int, into: Path
    ) -> PrepackDocument:
        needed = round(prepack_factor(len(_pairs(key))) * weights_bytes) + RESERVE_BYTES
        free = files.free_bytes(self.home)
        if free < needed:
            raise StoreError(Code.NO_SPACE, f"{self.home} has {free} bytes free, packed weights need {needed}")
        files.remove_tree(into)
        files.make_directory(into)
        save_sessions(version, options, into)
        written = tuple(_described(into / path) for pair in _pairs(key) for path in pair)
        document = PrepackDocument(key=key, files=written)
        files.write_atomically(into / DOCUMENT_FILE, encode_document(document))
        return document

    def _directory(self, key: PrepackKey) -> Path:
        return self.home / key.decoded / digest_of(encode_document(key))


def load_model(
    cache: PrepackCache | None, entry: ServingModel, stale: str, build: Callable[[Path | None], Loadable]
) -> tuple[Loadable, str]:
    """A warm model over the cache that `entry` names, else over the store, and why not the cache that it names.

    `stale` says why a cache cannot be right here. Raises what `build` and the model raise without a cache.
    """
    if entry.prepack is not None and not stale:
        try:
            if cache is None:
                raise StoreError(Code.CORRUPT, "runtime.toml names no `cache`")
            return cache.load(entry, build), ""
        except (AmperageError, OSError) as error:
            stale = f"the prepack cache cannot be used: {error}"
    model = build(None)
    model.warm_up()
    return model, stale


def _key_of(entry: ServingModel) -> PrepackKey:
    return PrepackKey.of(entry.decoded, entry.cpu, entry.onnxruntime, entry.options)


def _pairs(key: PrepackKey) -> list[tuple[str, str]]:
    names = [DECODING] if key.reading_config is None else [DECODING, READING]
    return [packed_files(name) for name in names]


def _newer(path: Path, store: Path) -> bool:
    try:
        return path.lstat().st_ctime_ns > (store / "serving.json").lstat().st_mtime_ns
    except FileNotFoundError:
        return True


def _check_bytes(file: BufferedReader, entry: PackedFile, directory: Path) -> None:
    if hashlib.file_digest(file, "sha256").hexdigest() != entry.sha256:
        raise ArtifactError(Code.DIGEST_MISMATCH, f"{entry.path} of {directory} is not what was proved")


def _described(path: Path) -> PackedFile:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return PackedFile(path=path.name, size_bytes=os.fstat(file.fileno()).st_size, sha256=digest)
