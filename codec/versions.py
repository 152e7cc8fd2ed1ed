"""Version directories as the codec sees them: their document, and the bytes of their streams.

Nothing here writes.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from codec.planes import Bytes
from wire.documents import DOCUMENT_LIMIT_BYTES, encode_document, parse_document
from wire.errors import ArtifactError, Code
from wire.manifest import Stream, VersionDocument

VERSION_FILE = "version.json"


def read_version(directory: Path) -> VersionDocument:
    """The version document of a directory; ArtifactError(corrupt) when it is not the canonical one."""
    try:
        with (directory / VERSION_FILE).open("rb") as source:
            data = source.read(DOCUMENT_LIMIT_BYTES + 1)
    except OSError as error:
        raise ArtifactError(Code.CORRUPT, f"{directory} holds no readable {VERSION_FILE}: {error.strerror}") from error
    version = parse_document(VersionDocument, data)
    if encode_document(version) != data:
        raise ArtifactError(Code.CORRUPT, f"{directory / VERSION_FILE} is not in canonical form; build it again")
    return version


def stream_bytes(directory: Path, stream: Stream) -> Bytes:
    """The bytes of `stream` in a version directory, mapped: uint8 [stream.size_bytes]."""
    if stream.size_bytes == 0:
        return np.zeros(0, np.uint8)
    return np.memmap(directory / stream.path, np.uint8, "r", offset=stream.offset, shape=(stream.size_bytes,))


def match_streams(streams: Sequence[Stream], base: Sequence[Stream]) -> list[Stream | None]:
    """For each stream the base's stream of the same file, name, size, type and layout, or None."""
    by_name = {(stream.path, stream.name): stream for stream in base}
    matches: list[Stream | None] = []
    for stream in streams:
        found = by_name.get((stream.path, stream.name))
        same = found is not None and (found.size_bytes, found.dtype, found.layout) == (
            stream.size_bytes, stream.dtype, stream.layout,
        )  # fmt: skip
        matches.append(found if same else None)
    return matches
