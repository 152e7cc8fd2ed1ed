"""One section: the smallest of the codecs, and back.

A section holds at most SECTION_LIMIT_BYTES of one plane. Its CRC-32 covers the decoded plane bytes. What vouches for
them is the SHA-256 of their file; the CRC says which section it was when a file came out wrong, and is looked at only
then, since it would cost a seventh of the time of decoding.
"""

import zlib
from dataclasses import dataclass

from codec.ans import STEP_BYTES, ans_cost, decode_ans_into, encode_ans
from codec.entropy import byte_histogram
from codec.huffman import (
    decode_dictionary_into,
    decode_huffman_into,
    encode_dictionary,
    encode_huffman,
)
from codec.planes import Bytes
from codec.rice import decode_rice_into, encode_rice
from wire.errors import ArtifactError, Code
from wire.index import Section, SectionCodec

ANS_SHARE = 0.98
"""ANS decodes several times slower than the others: it must save 2 % of the section, and STEP_BYTES for every step. In
effect it is taken where a symbol costs less than about 1.5 bit, so that Huffman's whole bits are dear."""

_COST = {
    SectionCodec.RAW: 0, SectionCodec.HUFFMAN: 1, SectionCodec.DICTIONARY: 2, SectionCodec.RICE: 3,
}  # fmt: skip
"""Order of the others by what decoding costs: it decides between candidates of one size."""


@dataclass(frozen=True, slots=True)
class CodedSection:
    """A section's coded bytes with what the index says of it."""

    codec: SectionCodec
    raw_size: int
    crc32: int
    coded: bytes

    def row(self, stream: int, plane: int) -> Section:
        """Its row in the section table."""
        return Section(stream, plane, self.codec, self.raw_size, len(self.coded), self.crc32)


def encode_section(
    plane: Bytes, *, sparse_symbol_bits: int | None = None, dictionary: bytes | None = None
) -> CodedSection:
    """Code `plane` (uint8 [n]) with whichever codec is smallest; ties go to the cheaper one to decode.

    `sparse_symbol_bits` (4 or 8) marks a difference, where most symbols of that width are zero: Rice is tried too.
    `dictionary` is what the base holds in the place of the whole stream.
    """
    raw = plane.tobytes()
    if not raw:
        return CodedSection(SectionCodec.RAW, 0, zlib.crc32(b""), b"")
    candidates = [(SectionCodec.RAW, raw)]
    sparse = None if sparse_symbol_bits is None else encode_rice(plane, sparse_symbol_bits)
    if sparse is not None:
        candidates.append((SectionCodec.RICE, sparse))
    prefixed = None if dictionary is None else encode_dictionary(raw, dictionary)
    if prefixed is not None:
        candidates.append((SectionCodec.DICTIONARY, prefixed))
    ans_bytes, ans_steps = ans_cost(byte_histogram(plane))
    beat_bytes = min(
        max(ans_bytes / ANS_SHARE, ans_bytes + STEP_BYTES * ans_steps), *(len(coded) for _, coded in candidates)
    )
    candidates.append((SectionCodec.HUFFMAN, encode_huffman(raw, beat_bytes)))
    codec, coded = min(candidates, key=lambda candidate: (len(candidate[1]), _COST[candidate[0]]))
    worth = min(len(coded) * ANS_SHARE, len(coded) - STEP_BYTES * ans_steps)
    if ans_bytes < worth:
        candidate = encode_ans(plane)
        if len(candidate) < worth:
            codec, coded = SectionCodec.ANS, candidate
    return CodedSection(codec, len(raw), zlib.crc32(raw), coded)


def decode_section_into(section: Section, coded: bytes, out: Bytes, dictionary: bytes | None = None) -> None:
    """Decode into `out` (uint8 [section.raw_size], contiguous); ArtifactError(bad_section) on anything else."""
    if len(coded) != section.coded_size or out.size != section.raw_size:
        raise ArtifactError(Code.BAD_SECTION, "section is cut short; fetch the artifact again")
    match section.codec:
        case SectionCodec.RAW:
            if len(coded) != out.size:
                raise ArtifactError(Code.BAD_SECTION, "raw section has two sizes; publish the artifact again")
            out.data[:] = coded
        case SectionCodec.HUFFMAN:
            decode_huffman_into(coded, out)
        case SectionCodec.ANS:
            decode_ans_into(coded, out)
        case SectionCodec.RICE:
            decode_rice_into(coded, out)
        case SectionCodec.DICTIONARY:
            if dictionary is None:
                raise ArtifactError(Code.BAD_SECTION, "section needs a base that has no such stream; publish it again")
            decode_dictionary_into(coded, out, dictionary)


def check_section(section: Section, decoded: Bytes, stream: str) -> None:
    """ArtifactError(bad_section) unless `decoded` (uint8 [section.raw_size]), of the named stream, has its CRC-32."""
    if zlib.crc32(decoded.data) != section.crc32:
        raise ArtifactError(
            Code.BAD_SECTION,
            f"a section of {stream}, plane {section.plane}, decodes to other bytes than were packed; fetch it again",
        )
