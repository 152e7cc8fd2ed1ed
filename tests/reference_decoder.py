"""A second decoder of artifacts, written from docs/artifact-format.md in plain Python: no numpy, no zstandard.

It is slow, trusts the manifest, and ends in AssertionError where something does not fit. The real decoder is held
against it, so that a change of the format cannot hide in an encoder and a decoder that changed together.
"""

import json
import struct
import zlib
from hashlib import sha256
from pathlib import Path
from typing import Any

from tests.fixtures.codec.reference_zstd import decode_frame

FRAME_BYTES = 122_880
BITS = {"u2": 2, "u4": 4, "u8": 8, "i8": 8, "i32": 32, "i64": 64, "f16": 16, "bf16": 16, "f32": 32}
PLANES = {"bytes": 1, "f16": 2, "bf16": 2, "f32-bf16-grid": 2, "f32": 4}
ITEM_BYTES = {"bytes": 1, "f16": 2, "bf16": 2, "f32-bf16-grid": 4, "f32": 4}

Stream = tuple[str, str, int, int, str, str]
"""Path, tensor name, offset, size, dtype, layout."""


def decode(manifest: bytes, pack: bytes, base: Path | None = None) -> dict[str, bytes]:
    """The files of the version, `version.json` among them."""
    document = json.loads(manifest)
    version = document["version"]
    canonical = canonical_json(version)
    assert sha256(canonical).hexdigest() == document["decoded"]
    table = read_table(document, pack)
    files = {entry["path"]: bytearray(entry["size_bytes"]) for entry in version["files"]}
    partners = read_partners(document, base)
    position = document["index_size_bytes"]
    for number, (stream, operation) in enumerate(zip(streams_of(version), document["operations"], strict=True)):
        path, name, offset, size, dtype, layout = stream
        described, old_stream = partners.get((path, name), (None, b""))
        partner = old_stream if described == (size, dtype, layout) else None
        if operation == "c":
            assert partner is not None
            files[path][offset : offset + size] = partner
            continue
        stored = bytearray()
        while len(stored) < size:
            count = PLANES[layout] + (operation == "s")
            rows, table = table[:count], table[count:]
            left = (size - len(stored)) // ITEM_BYTES[layout]
            items = min(8 * rows[0][4], left) if operation == "s" else rows[0][4]
            planes = []
            for plane, row in enumerate(rows):
                assert row[:2] == (number, plane)
                assert row[4] == items or (operation == "s" and row[4] < items)
                planes.append(decode_section(row, pack[position : position + row[5]], old_stream))
                position += row[5]
            if operation == "s":
                bits = [byte >> bit & 1 for byte in planes[0] for bit in range(8)]
                assert not any(bits[items:])
                planes = [expand(bits[:items], plane) for plane in planes[1:]]
            if operation == "d":
                assert partner is not None
                old = split(layout, partner[len(stored) : len(stored) + items * ITEM_BYTES[layout]])
                planes = [add(dtype, p, o) for p, o in zip(planes, old, strict=True)]
            stored += join(layout, planes)
        files[path][offset : offset + size] = stored
    assert not table
    assert position == len(pack)
    for entry in version["files"]:
        assert sha256(files[entry["path"]]).hexdigest() == entry["sha256"]
    return {**{path: bytes(data) for path, data in files.items()}, "version.json": canonical}


def expand(bits: list[int], compact: bytes) -> bytes:
    rest = iter(compact)
    plane = bytes(next(rest) if bit else 0 for bit in bits)
    assert next(rest, None) is None
    return plane


def canonical_json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def streams_of(version: Any) -> list[Stream]:
    columns, found = version["tensors"], []
    for number, entry in enumerate(version["files"]):
        rows = [row for row, file in enumerate(columns["file"]) if file == number]
        if not rows:
            found.append((entry["path"], "", 0, entry["size_bytes"], "u8", "bytes"))
        for row in rows:
            elements = 1
            for extent in columns["shape"][row]:
                elements *= extent
            dtype = columns["dtype"][row]
            size = (elements * BITS[dtype] + 7) // 8
            found.append(
                (entry["path"], columns["name"][row], columns["offset"][row], size, dtype, columns["layout"][row])
            )
    return found


def read_partners(document: Any, base: Path | None) -> dict[tuple[str, str], tuple[tuple[int, str, str], bytes]]:
    if document["base"] is None:
        return {}
    assert base is not None
    raw = (base / "version.json").read_bytes()
    assert sha256(raw).hexdigest() == document["base"]
    found = {}
    for path, name, offset, size, dtype, layout in streams_of(json.loads(raw)):
        found[path, name] = ((size, dtype, layout), (base / path).read_bytes()[offset : offset + size])
    return found


def read_table(document: Any, pack: bytes) -> list[tuple[int, ...]]:
    size = document["index_size_bytes"]
    assert len(pack) == document["pack_size_bytes"]
    index, data = pack[:size], pack[size:]
    assert [sha256(f).hexdigest() for f in frames(index)] == document["index_frames"]
    magic, version, reserved, frame_count, section_count = struct.unpack_from("<4sHHII", index)
    assert (magic, version, reserved) == (b"AMPI", 1, 0)
    assert len(index) == 16 + 32 * frame_count + 20 * section_count
    hashes = [index[16 + 32 * i : 48 + 32 * i] for i in range(frame_count)]
    assert [sha256(f).digest() for f in frames(data)] == hashes
    return list(struct.iter_unpack("<IBBHIII", index[16 + 32 * frame_count :]))


def frames(data: bytes) -> list[bytes]:
    return [data[i : i + FRAME_BYTES] for i in range(0, len(data), FRAME_BYTES)]


def decode_section(row: tuple[int, ...], coded: bytes, old_stream: bytes) -> bytes:
    _, _, codec, reserved, size, _, crc = row
    assert reserved == 0
    if codec == 0:
        plane = coded
    elif codec == 1:
        plane = decode_frame(coded)
    elif codec == 2:
        plane = decode_ans(coded, size)
    elif codec == 3:
        plane = decode_frame(coded, old_stream)
    else:
        assert codec == 4
        plane = decode_rice(coded, size)
    assert len(plane) == size
    assert zlib.crc32(plane) == crc
    return plane


def decode_ans(coded: bytes, size: int) -> bytes:
    lanes = 1 << coded[0]
    values = [v for v in range(256) if coded[4 + v // 8] >> v % 8 & 1]
    position, slots = 36, []
    for value in values:
        frequency, shift = 1, 0
        while True:
            byte = coded[position]
            position += 1
            frequency += (byte & 127) << shift
            shift += 7
            if byte < 128:
                break
        start = len(slots)
        slots += [(value, frequency, start)] * frequency
    assert len(slots) == 16384
    states = list(struct.unpack_from(f"<{lanes}I", coded, position))
    words = iter(struct.unpack(f"<{(len(coded) - position - 4 * lanes) // 2}H", coded[position + 4 * lanes :]))
    out = bytearray()
    for number in range(size - 2 * lanes):
        state = states[number % lanes]
        value, frequency, start = slots[state % 16384]
        out.append(value)
        state = frequency * (state // 16384) + state % 16384 - start
        states[number % lanes] = state * 65536 + next(words) if state < 65536 else state
    assert next(words, None) is None
    return bytes(out) + struct.pack(f"<{lanes}H", *(state - 65536 for state in states))


def decode_rice(coded: bytes, size: int) -> bytes:
    width, parameter, palette_bits, exception_parameter, events, exceptions = struct.unpack_from("<BBBBII", coded)
    position = 12
    palette = coded[position : position + (1 << palette_bits)]
    position += len(palette)

    def fields(count: int, bits: int) -> list[int]:
        nonlocal position
        length = (count * bits + 7) // 8
        packed = int.from_bytes(coded[position : position + length], "little")
        position += length
        return [packed >> i * bits & (1 << bits) - 1 for i in range(count)]

    low, exception_low = fields(events, parameter), fields(exceptions, exception_parameter)
    inside = [palette[i] for i in fields(events - exceptions, palette_bits)]
    odd = coded[position : position + exceptions]
    quotients = read_unary(coded[position + exceptions :])
    assert len(quotients) == events + exceptions
    places = positions(quotients[events:], exception_low, exception_parameter)
    for place, symbol in zip(places, odd, strict=True):
        inside.insert(place, symbol)
    symbols = [0] * (size * 8 // width)
    for place, symbol in zip(positions(quotients[:events], low, parameter), inside, strict=True):
        symbols[place] = symbol
    if width == 8:
        return bytes(symbols)
    return bytes(symbols[i] | symbols[i + 1] << 4 for i in range(0, len(symbols), 2))


def read_unary(data: bytes) -> list[int]:
    found, zeros = [], 0
    for byte in data:
        for bit in range(8):
            if byte >> bit & 1:
                found.append(zeros)
                zeros = 0
            else:
                zeros += 1
    return found


def positions(quotients: list[int], low: list[int], parameter: int) -> list[int]:
    found, place = [], -1
    for quotient, rest in zip(quotients, low, strict=True):
        place += (quotient << parameter | rest) + 1
        found.append(place)
    return found


def add(dtype: str, difference: bytes, old: bytes) -> bytes:
    if dtype == "u4":
        return bytes(
            (d & 15) + (o & 15) & 15 | (d >> 4) + (o >> 4) << 4 & 0xF0 for d, o in zip(difference, old, strict=True)
        )
    return bytes(d + o & 255 for d, o in zip(difference, old, strict=True))


def split(layout: str, stored: bytes) -> list[bytes]:
    if layout == "bytes":
        return [stored]
    if layout == "f16":
        return [stored[1::2], stored[0::2]]
    words = [w for (w,) in struct.iter_unpack("<H" if ITEM_BYTES[layout] == 2 else "<I", stored)]
    brains = words if layout == "bf16" else [w >> 16 for w in words]
    planes = [bytes(w >> 7 & 255 for w in brains), bytes(w >> 8 & 128 | w & 127 for w in brains)]
    if layout == "f32":
        planes += [bytes(w >> 8 & 255 for w in words), bytes(w & 255 for w in words)]
    return planes


def join(layout: str, planes: list[bytes]) -> bytes:
    if layout == "bytes":
        return planes[0]
    if layout == "f16":
        return b"".join(bytes([low, high]) for high, low in zip(*planes, strict=True))
    brains = [e << 7 | (s & 128) << 8 | s & 127 for e, s in zip(planes[0], planes[1], strict=True)]
    if layout == "bf16":
        return b"".join(struct.pack("<H", w) for w in brains)
    if layout == "f32-bf16-grid":
        return b"".join(struct.pack("<I", w << 16) for w in brains)
    return b"".join(struct.pack("<I", w << 16 | m << 8 | n) for w, m, n in zip(brains, *planes[2:], strict=True))
