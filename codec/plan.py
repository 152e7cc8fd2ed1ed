"""Where everything of a pack belongs: the work list that manifest and index imply.

A stream is cut into chunks of at most SECTION_LIMIT_BYTES per plane; a chunk is one section per plane, in plane order,
so it is decoded without looking at any other. All are of one raw size, the number of items; in a sparse stream
(operation `s`) the mask tells of eight items a byte and the others hold no more than those. Invariant: a plan exists
only when the chunks fill every stream exactly and in order; what is decoded by a plan cannot be written outside its
stream. Pure.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from codec.planes import ITEM_BYTES, MASK_ITEMS, item_count, plane_names
from wire.errors import ArtifactError, Code
from wire.index import Index, Section
from wire.manifest import SECTION_LIMIT_BYTES, Manifest, Stream, streams_of

_CHUNK_ITEMS = SECTION_LIMIT_BYTES
"""One byte per item and plane; a mask could tell of more, and would decode to more memory than a section may."""


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

    @property
    def items(self) -> int:
        """How many items it holds."""
        return (self.end - self.start) // ITEM_BYTES[self.stream.layout]

    @property
    def offset(self) -> int:
        """Where its bytes begin in the file."""
        return self.stream.offset + self.start


def cut(stream: Stream) -> Iterator[tuple[int, int]]:
    """Byte ranges [start, end) of the stream's chunks, as the encoder cuts them."""
    item_count(stream.layout, stream.size_bytes)
    step = _CHUNK_ITEMS * ITEM_BYTES[stream.layout]
    for start in range(0, stream.size_bytes, step):
        yield start, min(start + step, stream.size_bytes)


def plan_chunks(manifest: Manifest, index: Index) -> tuple[Chunk, ...]:
    """All chunks in pack order. Raises ArtifactError(bad_index) when the section table does not fit the streams."""
    chunks: list[Chunk] = []
    table, position = iter(index.sections), manifest.index_size_bytes
    for number, (stream, operation) in enumerate(zip(streams_of(manifest.version), manifest.operations, strict=True)):
        if operation == "c":
            chunks.extend(Chunk(number, stream, operation, start, end, 0, ()) for start, end in cut(stream))
            continue
        for start, end, sections in _group(number, stream, operation, table):
            chunks.append(Chunk(number, stream, operation, start, end, position, sections))
            position += sum(section.coded_size for section in sections)
    if next(table, None) is not None:
        raise _bad("it has sections that belong to no stream")
    return tuple(chunks)


def _group(
    number: int, stream: Stream, operation: str, table: Iterator[Section]
) -> Iterator[tuple[int, int, tuple[Section, ...]]]:
    item, planes = ITEM_BYTES[stream.layout], len(plane_names(stream.layout, operation))
    left, done = item_count(stream.layout, stream.size_bytes), 0
    while left:
        sections = tuple(islice(table, planes))
        first = sections[0].raw_size if sections else 0
        items = min(first * MASK_ITEMS, left) if operation == "s" else first
        places = [(section.stream, section.plane) for section in sections]
        if places != [(number, plane) for plane in range(planes)] or not 0 < items <= left or items > _CHUNK_ITEMS:
            raise _bad(f"sections of stream {stream.name or stream.path} do not cover it")
        if operation == "s":
            fits = first == -(-items // MASK_ITEMS) and all(section.raw_size <= items for section in sections[1:])
        else:
            fits = all(section.raw_size == items for section in sections)
        if not fits:
            raise _bad(f"planes of stream {stream.name or stream.path} have other sizes")
        yield done * item, (done + items) * item, sections
        done, left = done + items, left - items


def _bad(why: str) -> ArtifactError:
    return ArtifactError(Code.BAD_INDEX, f"pack index refused: {why}; publish the artifact again")
