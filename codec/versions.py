"""Version directories as the codec sees them: their document, and the bytes of their streams.

Nothing here writes.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from codec.planes import Bytes
from wire.documents import DOCUMENT_LIMIT_BYTES, encode_document, parse_document
from wire.errors import ArtifactError, Code
from wire.manifest import Stream, VersionDocument, streams_of

VERSION_FILE = "version.json"


def read_version(directory: Path) -> VersionDocument:
    """The version document of a directory; ArtifactError(corrupt) when it is not the canonical one."""
    try:
        with (directory / VERSION_FILE).open("rb") as source:
            data = source.read(DOCUMENT_LIMIT_BYTES + 1)
    except OSError as error:
        raise ArtifactError(
            Code.CORRUPT, f"{directory} holds no readable {VERSION_FILE}: {error.strerror}; build or fetch it again"
        ) from error
    version = parse_document(VersionDocument, data)
    if encode_document(version) != data:
        raise ArtifactError(Code.CORRUPT, f"{directory / VERSION_FILE} is not in canonical form; build it again")
    return version


def check_version(version: VersionDocument, directory: Path) -> None:
    """Raise ArtifactError unless the files have the sizes and digests that `version` states, and nothing but zeros
    outside their tensors: what a decoder could not restore must not be packed."""
    for entry in version.files:
        path = directory / entry.path
        try:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError as error:
            raise ArtifactError(Code.CORRUPT, f"{path} is missing; build the version again") from error
        if digest != entry.sha256:
            raise ArtifactError(Code.DIGEST_MISMATCH, f"{path} was changed after it was built; build the version again")
    _check_gaps(version, directory)


def _check_gaps(version: VersionDocument, directory: Path) -> None:
    ends = [0] * len(version.files)
    gaps = []
    for stream in streams_of(version):
        gaps.append((stream.file, ends[stream.file], stream.offset))
        ends[stream.file] = stream.offset + stream.size_bytes
    gaps += [(file, end, version.files[file].size_bytes) for file, end in enumerate(ends)]
    for file, start, end in gaps:
        path = directory / version.files[file].path
        if start < end and np.fromfile(path, np.uint8, end - start, offset=start).any():
            raise ArtifactError(
                Code.UNSUPPORTED, f"{path} has bytes other than zero outside its tensors; build the version again"
            )


def stream_bytes(directory: Path, stream: Stream) -> Bytes:
    """The bytes of `stream` in a version directory, mapped: uint8 [stream.size_bytes]."""
    if stream.size_bytes == 0:
        return np.zeros(0, np.uint8)
    return np.memmap(directory / stream.path, np.uint8, "r", offset=stream.offset, shape=(stream.size_bytes,))


@dataclass(frozen=True, slots=True)
class Partner:
    """The base's stream of the same file and name. Only one `alike` (size, type, layout) is copied or subtracted."""

    stream: Stream
    alike: bool


def find_partners(streams: Sequence[Stream], base: Sequence[Stream]) -> list[Partner | None]:
    """For each stream its partner in the base, None where the base has no stream of that file and name."""
    by_name = {(stream.path, stream.name): stream for stream in base}
    partners: list[Partner | None] = []
    for stream in streams:
        found = by_name.get((stream.path, stream.name))
        if found is None:
            partners.append(None)
            continue
        ours = (stream.size_bytes, stream.dtype, stream.layout)
        partners.append(Partner(found, ours == (found.size_bytes, found.dtype, found.layout)))
    return partners
