"""An artifact of some of the files of another: what the decoder is given when not everything is wanted.

So one file is decoded by the same code, within the same bounds and against the same digests as a whole version, and
nothing else is. Owns the pack that it writes; a crash leaves a part of it, which no manifest names.
"""

import errno
import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO

from codec.inspection import OpenPack
from codec.plan import Chunk
from wire.digest import digest_of
from wire.errors import Code, StoreError
from wire.index import Index, encode_index, index_size
from wire.manifest import FRAME_BYTES, Manifest, TensorColumns, VersionDocument, streams_of


def write_excerpt(whole: OpenPack, names: frozenset[str], pack: Path) -> Manifest:
    """Write to `pack` the sections of the files `names`, which the version must have; returns the manifest that fits.

    It is for decoding at once: nobody signed it, and its golden vectors may be missing.
    Raises ArtifactError, StoreError.
    """
    manifest = whole.manifest
    version = _version_of(manifest.version, names)
    rows = [row for row, stream in enumerate(streams_of(manifest.version)) if stream.path in names]
    numbers = {row: number for number, row in enumerate(rows)}
    chunks = [chunk for chunk in whole.chunks if chunk.row in numbers]
    sections = [replace(s, stream=numbers[chunk.row]) for chunk in chunks for s in chunk.sections]
    data_bytes = sum(section.coded_size for section in sections)
    head_bytes = index_size(-(-data_bytes // FRAME_BYTES), len(sections))
    try:
        with pack.open("w+b") as file:
            _copy_sections(whole, chunks, file, head_bytes)
            index = encode_index(Index(_frame_hashes(file, head_bytes), tuple(sections)))
            file.seek(0)
            file.write(index)
    except OSError as error:
        code = Code.NO_SPACE if error.errno in (errno.ENOSPC, errno.EDQUOT) else Code.IO_ERROR
        raise StoreError(code, f"{pack} cannot be written ({error.strerror}); make room or check the disk") from error
    frames = tuple(digest_of(index[i : i + FRAME_BYTES]) for i in range(0, len(index), FRAME_BYTES))
    update = {
        "decoded": version.decoded_digest(), "version": version, "index_size_bytes": len(index), "index_frames": frames,
        "operations": "".join(manifest.operations[row] for row in rows), "pack_size_bytes": len(index) + data_bytes,
    }  # fmt: skip
    return manifest.model_copy(update=update)


def _version_of(version: VersionDocument, names: frozenset[str]) -> VersionDocument:
    """The version without its other files and their tensors."""
    kept = [file for file, entry in enumerate(version.files) if entry.path in names]
    columns = version.tensors
    rows = [row for row, file in enumerate(columns.file) if file in kept]
    tensors = TensorColumns(
        name=tuple(columns.name[row] for row in rows),
        file=tuple(kept.index(columns.file[row]) for row in rows),
        dtype=tuple(columns.dtype[row] for row in rows),
        shape=tuple(columns.shape[row] for row in rows),
        offset=tuple(columns.offset[row] for row in rows),
        layout=tuple(columns.layout[row] for row in rows),
    )
    files = tuple(version.files[file] for file in kept)
    return version.model_copy(update={"files": files, "tensors": tensors})


def _copy_sections(whole: OpenPack, chunks: Sequence[Chunk], file: IO[bytes], start: int) -> None:
    file.seek(start)
    for chunk in chunks:
        size_bytes = sum(section.coded_size for section in chunk.sections)
        file.write(whole.read(chunk.position, chunk.position + size_bytes))


def _frame_hashes(file: IO[bytes], start: int) -> tuple[bytes, ...]:
    file.seek(start)
    return tuple(hashlib.sha256(frame).digest() for frame in iter(lambda: file.read(FRAME_BYTES), b""))
