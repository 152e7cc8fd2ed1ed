"""Packs and manifests of everything that was published, by digest, on the control plane's disk.

Invariant: what has its final name is whole and verified. A pack is checked while it streams in, frame by frame, against
the manifest and its index; nothing that a hostile uploader says is held in memory beyond the index. A crash leaves
`.uploading` names, which the next start removes, and `.fetching` names, which a gateway takes up again.
"""

import hashlib
import os
import secrets
from pathlib import Path

from fleet.partial import Partial
from host.files import (
    make_directory,
    move_file,
    preallocate,
    read_bounded,
    remove_file,
    sync_data,
    write_at,
    write_atomically,
)
from wire.digest import verify_digest
from wire.documents import DOCUMENT_LIMIT_BYTES, parse_document
from wire.errors import ArtifactError, Code, StoreError
from wire.index import parse_index
from wire.manifest import Manifest

UPLOADING = ".uploading"
FETCHING = ".fetching"


class Library:
    """Content-addressed files below `directory`."""

    def __init__(self, directory: Path) -> None:
        self._documents = directory / "documents"
        self._packs = directory / "packs"
        for folder in (self._documents, self._packs):
            make_directory(folder)
        for leftover in self._packs.glob(f".*{UPLOADING}"):
            remove_file(leftover)

    def document(self, digest: str) -> bytes | None:
        """A manifest document, or None."""
        try:
            return read_bounded(self._documents / digest, DOCUMENT_LIMIT_BYTES)
        except FileNotFoundError:
            return None

    def put_manifest(self, digest: str, data: bytes) -> None:
        """Keep a manifest. Raises ArtifactError (digest_mismatch, bad_manifest)."""
        verify_digest(data, digest, "manifest")
        parse_document(Manifest, data, code=Code.BAD_MANIFEST)
        write_atomically(self._documents / digest, data)

    def manifest(self, digest: str) -> Manifest:
        """The manifest `digest`. Raises ArtifactError(document_missing) when it is not here."""
        data = self.document(digest)
        if data is None:
            raise ArtifactError(
                Code.DOCUMENT_MISSING, f"manifest {digest[:12]}… is not here; upload it before its pack"
            )
        return parse_document(Manifest, data, code=Code.BAD_MANIFEST)

    def pack_path(self, artifact: str) -> Path | None:
        """The pack of an artifact, or None."""
        path = self.path_of(artifact)
        return path if path.exists() else None

    def path_of(self, artifact: str) -> Path:
        """Where the pack of an artifact is when it is here."""
        return self._packs / artifact

    def open_partial(self, artifact: str, manifest: Manifest) -> Partial:
        """A pack that is fetched from elsewhere, as far as it is here. Raises StoreError (no_space, io_error)."""
        return Partial(manifest, self._packs / f".{artifact}{FETCHING}")

    def begin_upload(self, artifact: str) -> "PackUpload":
        """Make room for a pack. Raises ArtifactError (document_missing), StoreError (no_space)."""
        manifest = self.manifest(artifact)
        temporary = self._packs / f".{artifact}.{secrets.token_hex(4)}{UPLOADING}"
        preallocate(temporary, manifest.pack_size_bytes)
        return PackUpload(manifest, temporary, self.path_of(artifact))


class PackUpload:
    """A pack that arrives in parts of any size: `feed` all of it, then `commit`; `discard` in any case."""

    def __init__(self, manifest: Manifest, temporary: Path, final: Path) -> None:
        self._manifest = manifest
        self._temporary = temporary
        self._final = final
        self._descriptor = os.open(temporary, os.O_WRONLY | os.O_CLOEXEC)
        self._expected = [bytes.fromhex(digest) for digest in manifest.index_frames]
        self._index = bytearray()
        self._waiting = bytearray()
        self._frame = 0

    def feed(self, part: bytes) -> None:
        """Take the next bytes; raises ArtifactError (frame_mismatch, bad_index, digest_mismatch when too long)."""
        self._waiting += part
        while self._frame < self._manifest.frame_count:
            start, end = self._manifest.frame_range(self._frame)
            if len(self._waiting) < end - start:
                return
            self._take(bytes(self._waiting[: end - start]), start)
            del self._waiting[: end - start]
        if self._waiting:
            raise ArtifactError(Code.DIGEST_MISMATCH, "the pack is longer than its manifest says; pack it again")

    def commit(self) -> None:
        """Give the pack its name; raises ArtifactError(digest_mismatch) when it is incomplete."""
        if self._frame < self._manifest.frame_count:
            raise ArtifactError(
                Code.DIGEST_MISMATCH,
                f"the pack ended after {self._frame} of {self._manifest.frame_count} frames; upload it again",
            )
        sync_data(self._descriptor)
        move_file(self._temporary, self._final)

    def discard(self) -> None:
        """Release what is held; removes the temporary file unless it was committed."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
            remove_file(self._temporary)

    def _take(self, data: bytes, start: int) -> None:
        if hashlib.sha256(data).digest() != self._expected[self._frame]:
            raise ArtifactError(
                Code.FRAME_MISMATCH, f"frame {self._frame} of the pack is not what its manifest signs; pack it again"
            )
        write_at(self._descriptor, data, start)
        self._frame += 1
        if self._frame <= len(self._manifest.index_frames):
            self._index += data
        if self._frame == len(self._manifest.index_frames):
            data_bytes = self._manifest.pack_size_bytes - self._manifest.index_size_bytes
            self._expected += parse_index(bytes(self._index), data_bytes).frame_hashes
            self._index.clear()


def read_frame(descriptor: int, manifest: Manifest, frame: int) -> bytes:
    """The bytes of one frame of an open pack. Raises StoreError (io_error, corrupt when the file was cut)."""
    start, end = manifest.frame_range(frame)
    try:
        data = os.pread(descriptor, end - start, start)
    except OSError as error:
        raise StoreError(Code.IO_ERROR, f"a pack cannot be read ({error}); check the control plane's disk") from error
    if len(data) != end - start:
        raise StoreError(Code.CORRUPT, "a pack was cut short on the control plane's disk; publish the release again")
    return data
