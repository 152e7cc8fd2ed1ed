"""The node's store: whole versions, the staging of what is being fetched, and serving.json.

Only the engine's thread writes here; the runtime reads. Invariants: a directory below `versions/` is complete and
read-only, serving.json names only versions that exist, and both hold at every instant, because they change by rename.
A crash leaves at most temporary names and the contents of `work/`, which `adopt` clears at the next start.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from host import files
from wire.digest import digest_of
from wire.documents import DOCUMENT_LIMIT_BYTES, encode_document, parse_document
from wire.errors import AmperageError, ArtifactError, Code, StoreError
from wire.manifest import Manifest, VersionDocument
from wire.serving import Serving, ServingModel

SERVING_FILE = "serving.json"
SERVING_LIMIT_BYTES = 1 << 20
VERSION_FILE = "version.json"
VERSION_LIMIT_BYTES = 4 * DOCUMENT_LIMIT_BYTES
_DIGEST_LETTERS = frozenset("0123456789abcdef")


@dataclass(frozen=True, slots=True)
class Adopted:
    """What `adopt` found at start."""

    versions: frozenset[str]
    removed: tuple[str, ...]


class Store:
    """Paths and durable changes below one root."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.versions_directory = root / "versions"
        self.staging_directory = root / "staging"
        self.work_directory = root / "work"
        self.serving_path = root / SERVING_FILE

    def adopt(self, staged: frozenset[str]) -> Adopted:
        """Make the store whole after any crash: call once, before anything else writes.

        Empties work/, drops staging that no journal row (`staged` artifacts) stands for, seals or removes versions.
        """
        for directory in (self.root, self.versions_directory, self.staging_directory, self.work_directory):
            files.make_directory(directory)
        removed = [self._remove(path) for path in sorted(self.work_directory.iterdir())]
        strays = (path for path in self.staging_directory.iterdir() if path.name.partition(".")[0] not in staged)
        removed += [self._remove(path) for path in sorted(strays)]
        try:
            served = {entry.decoded for entry in self.serving().models}
        except StoreError:  # nobody can serve by it; aside, so that what is ordered is activated anew
            files.move_file(self.serving_path, self.serving_path.with_suffix(".damaged"))
            served = set()
            removed.append(SERVING_FILE)
        versions = set()
        for path in sorted(self.versions_directory.iterdir()):
            if self._is_whole(path):
                files.seal_directory(path)
                versions.add(path.name)
            elif path.name not in served:  # what serves stays, whole or not: the runtime judges it
                removed.append(self._remove(path))
        return Adopted(frozenset(versions), tuple(removed))

    # versions

    def version_path(self, decoded: str) -> Path:
        """Directory of a version, whether it exists or not."""
        return self.versions_directory / decoded

    def has_version(self, decoded: str) -> bool:
        """True when the whole version is on the node."""
        return self.version_path(decoded).is_dir()

    def versions(self) -> frozenset[str]:
        """Decoded digests of the versions on the node."""
        return frozenset(path.name for path in self.versions_directory.iterdir() if _is_digest(path.name))

    def new_work(self, name: str) -> Path:
        """An empty directory of that name in work/; what was there goes."""
        path = self.work_directory / name
        files.remove_tree(path)
        files.make_directory(path)
        return path

    def drop_work(self, path: Path) -> None:
        """Remove a directory of work/, if it is still there."""
        files.remove_tree(path)

    def commit_version(self, work: Path, decoded: str) -> None:
        """Give a decoded directory its name for good; raises ArtifactError(digest_mismatch) when it is another's.

        A version that exists already is left alone: same name, same bytes.
        """
        if self.has_version(decoded):
            files.remove_tree(work)
            return
        found = digest_of(files.read_bounded(work / VERSION_FILE, VERSION_LIMIT_BYTES))
        if found != decoded:
            raise ArtifactError(
                Code.DIGEST_MISMATCH, f"the decoder made version {found[:12]}… instead of {decoded[:12]}…; report this"
            )
        files.commit_directory(work, self.version_path(decoded))

    def prune(self, keep: frozenset[str]) -> tuple[str, ...]:
        """Remove all versions but `keep` and what serves; the digests removed."""
        keep = keep | {entry.decoded for entry in self.serving().models}
        surplus = sorted(self.versions() - keep)
        for decoded in surplus:
            # Out of versions/ first, so that a crash half-way leaves no half version under a good name.
            condemned = self.work_directory / f"condemned-{decoded}"
            files.remove_tree(condemned)
            files.move_directory(self.version_path(decoded), condemned)
            files.remove_tree(condemned)
        return tuple(surplus)

    def free_bytes(self) -> int:
        """What can still be written here."""
        return files.free_bytes(self.root)

    # staging

    def pack_path(self, artifact: str) -> Path:
        """The preallocated file that frames are written into."""
        return self.staging_directory / f"{artifact}.pack"

    def manifest_path(self, artifact: str) -> Path:
        """The artifact's manifest beside its pack."""
        return self.staging_directory / f"{artifact}.manifest.json"

    def stage_manifest(self, artifact: str, document: bytes) -> None:
        """Keep the verified manifest, so that fetch and decode resume without the broker."""
        files.write_atomically(self.manifest_path(artifact), document)

    def staged_manifest(self, artifact: str) -> Manifest:
        """The manifest kept by stage_manifest; raises ArtifactError when its digest is not its name."""
        try:
            document = files.read_bounded(self.manifest_path(artifact), DOCUMENT_LIMIT_BYTES)
        except FileNotFoundError as error:
            raise StoreError(
                Code.CORRUPT, f"the staged manifest of {artifact[:12]}… is gone; order it again"
            ) from error
        if digest_of(document) != artifact:
            raise StoreError(Code.CORRUPT, f"the staged manifest of {artifact[:12]}… is damaged; check the disk")
        return parse_document(Manifest, document, code=Code.BAD_MANIFEST)

    def has_pack(self, artifact: str, size_bytes: int) -> bool:
        """True when the staging file exists in its full size, so that a bitmap can stand for it."""
        path = self.pack_path(artifact)
        return path.is_file() and path.stat().st_size == size_bytes

    def drop_staging(self, artifact: str) -> None:
        """Remove pack and manifest; the journal's row goes before."""
        files.remove_file(self.pack_path(artifact))
        files.remove_file(self.manifest_path(artifact))

    # serving.json

    def serving(self) -> Serving:
        """What serves; empty before the first release. Raises StoreError(corrupt)."""
        try:
            data = files.read_bounded(self.serving_path, SERVING_LIMIT_BYTES)
        except FileNotFoundError:
            return Serving()
        try:
            return parse_document(Serving, data, limit_bytes=SERVING_LIMIT_BYTES)
        except ArtifactError as error:
            raise StoreError(
                Code.CORRUPT, f"{self.serving_path} cannot be read ({error.message}); remove it and order again"
            ) from error

    def served(self, model: str) -> ServingModel | None:
        """The entry of `model`."""
        return next((entry for entry in self.serving().models if entry.model == model), None)

    def serve(self, model: str, entry: ServingModel | None) -> None:
        """Make `entry` what serves for `model`, or nothing; atomic, and a no-op when it is so already."""
        if entry is not None and not self.has_version(entry.decoded):
            raise StoreError(Code.CORRUPT, f"version {entry.decoded[:12]}… is not on this node; order it again")
        before = self.serving()
        others = tuple(kept for kept in before.models if kept.model != model)
        models = (*others, entry) if entry else others
        after = Serving(models=tuple(sorted(models, key=lambda kept: kept.model)))
        if after != before:
            files.write_atomically(self.serving_path, encode_document(after))

    def _is_whole(self, path: Path) -> bool:
        """Name, version.json and the sizes of all files agree; the bytes were verified before the rename."""
        if not _is_digest(path.name) or path.is_symlink() or not path.is_dir():
            return False
        try:
            document = files.read_bounded(path / VERSION_FILE, VERSION_LIMIT_BYTES)
            if digest_of(document) != path.name:
                return False
            version = parse_document(VersionDocument, document, limit_bytes=VERSION_LIMIT_BYTES)
            sizes = {entry.name: entry.stat().st_size for entry in os.scandir(path)}
        except (AmperageError, OSError):
            return False
        return all(sizes.get(entry.path) == entry.size_bytes for entry in version.files)

    def _remove(self, path: Path) -> str:
        files.remove_tree(path)
        return str(path.relative_to(self.root))


def _is_digest(name: str) -> bool:
    return len(name) == 64 and set(name) <= _DIGEST_LETTERS
