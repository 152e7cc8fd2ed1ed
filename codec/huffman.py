"""Zstandard frames as the Huffman coder (RFC 8878): its literal stage is Huffman with four streams.

Levels 1 and 19 are tried and the smaller result kept; the default level 3 finds spurious matches on symbol planes and
is both larger and slower to decode (measured: bf16 exponents 3.36 bit at level 3, 2.94 at 1, 2.70 at 19).

A section that changed with its file, such as JSON, may also reach into what the base holds in its place (`dictionary`).

Decoding trusts no header: a frame of 13 bytes can claim a terabyte, and python-zstandard allocates what the header
says (python-zstandard issue 332). So the header is read first and must repeat the size from the signed index.
"""

import threading

import zstandard
from zstandard import ZstdError

from codec.planes import Bytes
from wire.errors import ArtifactError, Code
from wire.manifest import SECTION_LIMIT_BYTES

WINDOW_LIMIT_BYTES = 8 * 1024 * 1024
"""What RFC 8878 section 3.1.1.1.2 asks decoders to support at least."""

LEVELS = (1, 19)

DICTIONARY_LEAST_BYTES = 8
"""zstd refuses shorter ones."""

_local = threading.local()


def encode_huffman(plane: bytes | memoryview, levels: tuple[int, ...] = LEVELS) -> bytes:
    """The smallest frame over the levels, the first of equals; deterministic for one zstd version."""
    return min((_compressor(level).compress(plane) for level in levels), key=len)


def decode_huffman_into(coded: bytes, out: Bytes) -> None:
    """Decode the one frame in `coded` into `out` (uint8 [n]), filled exactly, or raise ArtifactError(bad_section)."""
    _decode_frame_into(coded, out, _decompressor())


def encode_dictionary(plane: bytes | memoryview, dictionary: bytes) -> bytes | None:
    """A frame whose matches may reach into `dictionary`; None where that is too short or too long to be one."""
    if not DICTIONARY_LEAST_BYTES <= len(dictionary) <= SECTION_LIMIT_BYTES:
        return None
    compressor = zstandard.ZstdCompressor(level=max(LEVELS), dict_data=_raw_content(dictionary), write_checksum=False)
    return compressor.compress(plane)


def decode_dictionary_into(coded: bytes, out: Bytes, dictionary: bytes) -> None:
    """The inverse of encode_dictionary, as strict as decode_huffman_into."""
    if not DICTIONARY_LEAST_BYTES <= len(dictionary) <= SECTION_LIMIT_BYTES:
        raise _bad("the base's stream cannot be a dictionary")
    decompressor = zstandard.ZstdDecompressor(dict_data=_raw_content(dictionary), max_window_size=WINDOW_LIMIT_BYTES)
    _decode_frame_into(coded, out, decompressor)


def _decode_frame_into(coded: bytes, out: Bytes, decompressor: zstandard.ZstdDecompressor) -> None:
    try:
        header = zstandard.get_frame_parameters(coded)
        if header.content_size != out.size:
            raise _bad("its header contradicts the index")
        if header.window_size > WINDOW_LIMIT_BYTES or header.dict_id or header.has_checksum:
            raise _bad("its window, dictionary or checksum is not allowed")
        decoded = decompressor.decompress(coded, max_output_size=out.size, allow_extra_data=False)
    except ZstdError as error:
        raise _bad(str(error)) from error
    if len(decoded) != out.size:
        raise _bad("it decodes to another size than the index says")
    out.data[:] = decoded


def _raw_content(dictionary: bytes) -> zstandard.ZstdCompressionDict:
    return zstandard.ZstdCompressionDict(dictionary, dict_type=zstandard.DICT_TYPE_RAWCONTENT)


def _compressor(level: int) -> zstandard.ZstdCompressor:
    """One compressor per thread and level: they are not safe to share (python-zstandard issue 166)."""
    made = _local.__dict__.setdefault("compressors", {})
    if level not in made:
        made[level] = zstandard.ZstdCompressor(level=level, write_checksum=False, write_content_size=True)
    compressor: zstandard.ZstdCompressor = made[level]
    return compressor


def _decompressor() -> zstandard.ZstdDecompressor:
    """One decompressor per thread, for the same reason."""
    if "decompressor" not in _local.__dict__:
        _local.decompressor = zstandard.ZstdDecompressor(max_window_size=WINDOW_LIMIT_BYTES)
    decompressor: zstandard.ZstdDecompressor = _local.decompressor
    return decompressor


def _bad(why: str) -> ArtifactError:
    return ArtifactError(Code.BAD_SECTION, f"zstd section refused: {why}; fetch the artifact again")
