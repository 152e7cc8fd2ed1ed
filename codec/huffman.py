"""Zstandard frames as the Huffman coder (RFC 8878): its literal stage is Huffman with four streams.

Planes of symbols have no repetitions, only a skewed histogram. Each match that zstd finds in them is a coincidence that
costs more than its literals and slows the decoder down, so the first candidate hardly looks for matches (LITERALS).
Measured on bf16 exponents of 2.55 bit: 2.60 bit that way at 400 MB/s, against 2.89 at level 1, 3.36 at level 3, and
2.60 at level 19 and 1 MB/s. The second looks for long ones as fast as it can (REPEATS); where it finds some, as in
text, graphs, padding or the rows of an embedding that nobody trained, level 19 is worth its time.

A section that changed with its file, such as JSON, may also reach into what the base holds in its place (`dictionary`).

Decoding trusts no header: a frame of 13 bytes can claim a terabyte, and python-zstandard allocates what the header
says (python-zstandard issue 332). So the header is read first and must repeat the size from the signed index, and the
blocks are walked to see that the frame ends where the section does.
"""

import threading

import numpy as np
import zstandard
from zstandard import ZstdError

from codec.entropy import byte_histogram, entropy_bytes
from codec.planes import Bytes
from wire.errors import ArtifactError, Code
from wire.manifest import SECTION_LIMIT_BYTES

WINDOW_LIMIT_BYTES = 8 * 1024 * 1024
"""What RFC 8878 section 3.1.1.1.2 asks decoders to support at least."""

BEST_LEVEL = 19

REPEATS_GAIN = 0.999
"""Level 19 takes seconds for a MiB where the others take milliseconds: repetitions must have saved 0.1 % first."""

FLOORED = 1.15
"""Where literals take so much more than their entropy, symbols cost less than Huffman's one bit; level 19 makes matches
of the commonest runs then (90 % pruned int4: 1.21 times the entropy, where literals take 1.44)."""

REPEATS_SHARE, FLOORED_SHARE = 0.5, 0.75
"""Less than level 19 was ever seen to leave, of repetitions and of such runs."""

LITERALS = zstandard.ZstdCompressionParameters(
    strategy=zstandard.STRATEGY_FAST, window_log=20, hash_log=6, min_match=7, write_checksum=False
)
"""Remembers 64 places and takes no match below seven bytes: what is left are literals, in blocks of 128 KiB."""

REPEATS = zstandard.ZstdCompressionParameters(
    strategy=zstandard.STRATEGY_GREEDY, window_log=20, hash_log=20, chain_log=20, search_log=3, min_match=7,
    write_checksum=False,
)  # fmt: skip
"""Remembers all places of a section."""

_BLOCK_HEADER_BYTES = 3

DICTIONARY_LEAST_BYTES = 8
"""zstd refuses shorter ones."""

_local = threading.local()


def encode_huffman(plane: bytes | memoryview, beat_bytes: float = float("inf")) -> bytes:
    """The smallest frame that was tried, the first of equals; deterministic for one zstd version.

    `beat_bytes` is what the plane takes otherwise: level 19 is not tried where it has no chance against that.
    """
    literals, repeats = (_compressor(kind).compress(plane) for kind in ("literals", "repeats"))
    least = min(literals, repeats, key=len)
    entropy = entropy_bytes(byte_histogram(np.frombuffer(plane, np.uint8)))
    repeating = len(repeats) < len(literals) * REPEATS_GAIN and len(repeats) * REPEATS_SHARE < beat_bytes
    floored = len(literals) > entropy * FLOORED and len(literals) * FLOORED_SHARE < beat_bytes
    if repeating or floored:
        return min(least, _compressor("best").compress(plane), key=len)
    return least


def decode_huffman_into(coded: bytes, out: Bytes) -> None:
    """Decode the one frame in `coded` into `out` (uint8 [n]), filled exactly, or raise ArtifactError(bad_section)."""
    _decode_frame_into(coded, out, _decompressor())


def encode_dictionary(plane: bytes | memoryview, dictionary: bytes) -> bytes | None:
    """A frame whose matches may reach into `dictionary`; None where that is too short or too long to be one."""
    if not DICTIONARY_LEAST_BYTES <= len(dictionary) <= SECTION_LIMIT_BYTES:
        return None
    compressor = zstandard.ZstdCompressor(level=BEST_LEVEL, dict_data=_raw_content(dictionary), write_checksum=False)
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
        if _frame_end(coded) != len(coded):
            raise _bad("it does not end where its section does")
        # With all input and room for all output at hand zstd decodes in place, without a window of its own.
        filled = decompressor.stream_reader(coded).readinto(out.data)
    except ZstdError as error:
        raise _bad(str(error)) from error
    if filled != out.size:
        raise _bad("it decodes to another size than the index says")


def _frame_end(coded: bytes) -> int:
    """Where the frame that begins `coded` ends, by its block headers (RFC 8878 section 3.1.1.2); it has no checksum."""
    position = zstandard.frame_header_size(coded)
    while position + _BLOCK_HEADER_BYTES <= len(coded):
        block = int.from_bytes(coded[position : position + _BLOCK_HEADER_BYTES], "little")
        run_length = (block >> 1) & 3 == 1
        position += _BLOCK_HEADER_BYTES + (1 if run_length else block >> 3)
        if block & 1:
            return position
    raise _bad("its blocks are cut")


def _raw_content(dictionary: bytes) -> zstandard.ZstdCompressionDict:
    return zstandard.ZstdCompressionDict(dictionary, dict_type=zstandard.DICT_TYPE_RAWCONTENT)


def _compressor(kind: str) -> zstandard.ZstdCompressor:
    """One per thread and kind: they are not safe to share (python-zstandard issue 166)."""
    made = _local.__dict__.setdefault("compressors", {})
    if not made:
        made["literals"] = zstandard.ZstdCompressor(compression_params=LITERALS)
        made["repeats"] = zstandard.ZstdCompressor(compression_params=REPEATS)
        made["best"] = zstandard.ZstdCompressor(level=BEST_LEVEL, write_checksum=False, write_content_size=True)
    compressor: zstandard.ZstdCompressor = made[kind]
    return compressor


def _decompressor() -> zstandard.ZstdDecompressor:
    """One decompressor per thread, for the same reason."""
    if "decompressor" not in _local.__dict__:
        _local.decompressor = zstandard.ZstdDecompressor(max_window_size=WINDOW_LIMIT_BYTES)
    decompressor: zstandard.ZstdDecompressor = _local.decompressor
    return decompressor


def _bad(why: str) -> ArtifactError:
    return ArtifactError(Code.BAD_SECTION, f"zstd section refused: {why}; fetch the artifact again")
