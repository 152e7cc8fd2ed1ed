"""Packs and documents of everything that was published, by digest, on the control plane's disk.

A pack enters whole: it is streamed to a temporary name, every frame is checked against the manifest and the index, and
only then it gets its name. A crash leaves a temporary name, which the next upload replaces.
"""

import hashlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

from host.files import make_directory, move_file, read_bounded, sync_data, write_atomically
from wire.digest import verify_digest
from wire.documents import DOCUMENT_LIMIT_BYTES, parse_document
from wire.errors import ArtifactError, Code
from wire.index import parse_index
from wire.manifest import Manifest


class Library:
    """Content-addressed files below `directory`."""

    def __init__(self, directory: Path) -> None:
        self._documents = directory / "documents"
        self._packs = directory / "packs"
        for folder in (self._documents, self._packs):
            make_directory(folder)

    def document(self, digest: str) -> bytes | None:
        """A document, or None."""
        try:
            return read_bounded(self._documents / digest, 2 * DOCUMENT_LIMIT_BYTES)
        except FileNotFoundError:
            return None

    def put_document(self, digest: str, data: bytes) -> None:
        """Keep a document. Raises ArtifactError(digest_mismatch)."""
        verify_digest(data, digest, "document")
        write_atomically(self._documents / digest, data)

    def manifest(self, digest: str) -> Manifest:
        """The manifest `digest`. Raises ArtifactError(bad_manifest) when it is not here."""
        data = self.document(digest)
        if data is None:
            raise ArtifactError(Code.BAD_MANIFEST, f"manifest {digest[:12]}… is not here; upload it before its pack")
        return parse_document(Manifest, data, code=Code.BAD_MANIFEST)

    def pack_path(self, artifact: str) -> Path | None:
        """The pack of an artifact, or None."""
        path = self._packs / artifact
        return path if path.exists() else None

    async def put_pack(self, artifact: str, parts: AsyncIterator[bytes]) -> None:
        """Keep a pack that arrives in parts. Raises ArtifactError when it is not what its manifest signs."""
        manifest = self.manifest(artifact)
        temporary = self._packs / f".{artifact}.uploading"
        size = 0
        with temporary.open("wb") as sink:
            async for part in parts:
                size += len(part)
                if size > manifest.pack_size_bytes:
                    raise ArtifactError(
                        Code.DIGEST_MISMATCH, "the pack is longer than its manifest says; pack it again"
                    )
                sink.write(part)
            sink.flush()
            sync_data(sink.fileno())
        verify_pack(manifest, temporary)
        move_file(temporary, self._packs / artifact)


def verify_pack(manifest: Manifest, path: Path) -> None:
    """Check size, index and every frame. Raises ArtifactError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if os.fstat(descriptor).st_size != manifest.pack_size_bytes:
            raise ArtifactError(Code.DIGEST_MISMATCH, "the pack has another size than its manifest says; pack it again")
        index_data = os.pread(descriptor, manifest.index_size_bytes, 0)
        hashes = [bytes.fromhex(digest) for digest in manifest.index_frames]
        index = parse_index(index_data, manifest.pack_size_bytes - manifest.index_size_bytes)
        for frame, expected in enumerate((*hashes, *index.frame_hashes)):
            if hashlib.sha256(read_frame(descriptor, manifest, frame)).digest() != expected:
                raise ArtifactError(Code.FRAME_MISMATCH, f"frame {frame} of the pack is damaged; pack it again")
    finally:
        os.close(descriptor)


def read_frame(descriptor: int, manifest: Manifest, frame: int) -> bytes:
    """The bytes of one frame of an open pack."""
    start, end = manifest.frame_range(frame)
    return os.pread(descriptor, end - start, start)
