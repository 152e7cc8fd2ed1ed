"""Where everything of a pack belongs: the work list that manifest and index imply.

A stream is cut into chunks of at most SECTION_LIMIT_BYTES per plane; a chunk is one section per plane, in plane order,
all of one raw size, so it is decoded without looking at any other. Invariant: a plan exists only when the chunks fill
every stream exactly and in order; what is decoded by a plan cannot be written outside its stream. Pure.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from codec.planes import ITEM_BYTES, PLANE_NAMES, item_count
from wire.errors import ArtifactError, Code
from wire.index import Index, Section
from wire.manifest import SECTION_LIMIT_BYTES, Manifest, Stream, streams_of


@dataclass(frozen=True, slots=True)
class Chunk:
    """Bytes [start, end) of stream number `row`, and what gives them: its sections, or for a copy the base alone."""

    row: int
    stream: Stream
    operation: str
    start: int
    end: int
    position: int
    """Where the first section lies in the pack; the others follow."""
    sections: tuple[Section, ...]


def cut(stream: Stream) -> Iterator[tuple[int, int]]:
    """Byte ranges [start, end) of the stream's chunks, as the encoder cuts them."""
    item_count(stream.layout, stream.size_bytes)
    step = SECTION_LIMIT_BYTES * ITEM_BYTES[stream.layout]
    for start in range(0, stream.size_bytes, step):
        yield start, min(start + step, stream.size_bytes)


def plan_chunks(manifest: Manifest, index: Index) -> tuple[Chunk, ...]:
    """All chunks in pack order. Raises ArtifactError(bad_index) when the section table does not fit the streams."""
    chunks: list[Chunk] = []
    row, position = 0, manifest.index_size_bytes
    for number, (stream, operation) in enumerate(zip(streams_of(manifest.version), manifest.operations, strict=True)):
        if operation == "c":
            chunks.extend(Chunk(number, stream, operation, start, end, 0, ()) for start, end in cut(stream))
            continue
        for start, end, sections in _group(number, stream, index.sections, row):
            chunks.append(Chunk(number, stream, operation, start, end, position, sections))
            position += sum(section.coded_size for section in sections)
            row += len(sections)
    if row != len(index.sections):
        raise _bad("it has sections that belong to no stream")
    return tuple(chunks)


def _group(
    number: int, stream: Stream, table: Sequence[Section], row: int
) -> Iterator[tuple[int, int, tuple[Section, ...]]]:
    item, planes = ITEM_BYTES[stream.layout], len(PLANE_NAMES[stream.layout])
    items, done = item_count(stream.layout, stream.size_bytes), 0
    while done < items:
        sections = tuple(table[row : row + planes])
        raw_size = sections[0].raw_size if sections else 0
        wanted = [(number, plane, raw_size) for plane in range(planes)]
        if [(s.stream, s.plane, s.raw_size) for s in sections] != wanted or done + raw_size > items:
            raise _bad(f"sections of stream {stream.name or stream.path} do not cover it")
        yield done * item, (done + raw_size) * item, sections
        done += raw_size
        row += planes


def _bad(why: str) -> ArtifactError:
    return ArtifactError(Code.BAD_INDEX, f"pack index refused: {why}; publish the artifact again")
