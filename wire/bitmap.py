"""Bitmaps of frames: bit i of byte i // 8 (least significant first) stands for frame i."""

from collections.abc import Iterator

from wire.errors import ArtifactError, Code


class Bitmap:
    """A fixed number of bits, all clear at first; the one mutable value of this package."""

    __slots__ = ("_bits", "length")

    def __init__(self, length: int, data: bytes | None = None) -> None:
        """`data`, when given, is the packed form; raises ArtifactError(bad_document) when it does not fit `length`."""
        size = (length + 7) // 8
        if data is not None and len(data) != size:
            raise ArtifactError(Code.BAD_DOCUMENT, f"bitmap of {len(data)} bytes cannot hold {length} frames exactly")
        if data and length % 8 and data[-1] >> (length % 8):
            raise ArtifactError(Code.BAD_DOCUMENT, "bitmap has bits past its last frame")
        self.length = length
        self._bits = bytearray(data) if data is not None else bytearray(size)

    @classmethod
    def full(cls, length: int) -> "Bitmap":
        """A bitmap with every bit set."""
        bitmap = cls(length)
        for i in range(length):
            bitmap.set(i)
        return bitmap

    def __contains__(self, i: object) -> bool:
        return isinstance(i, int) and 0 <= i < self.length and bool(self._bits[i >> 3] >> (i & 7) & 1)

    def __iter__(self) -> Iterator[int]:
        """Indices of the set bits, ascending."""
        return (i for i in range(self.length) if self._bits[i >> 3] >> (i & 7) & 1)

    def __len__(self) -> int:
        """How many bits are set."""
        return int.from_bytes(self._bits, "little").bit_count()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Bitmap) and self.length == other.length and self._bits == other._bits

    __hash__ = None  # type: ignore[assignment]  # mutable

    def set(self, i: int) -> None:
        """Set bit `i`; IndexError outside the bitmap."""
        self._check(i)
        self._bits[i >> 3] |= 1 << (i & 7)

    def clear(self, i: int) -> None:
        """Clear bit `i`; IndexError outside the bitmap."""
        self._check(i)
        self._bits[i >> 3] &= ~(1 << (i & 7)) & 0xFF

    def complement(self) -> "Bitmap":
        """The bits that are clear here: missing from verified, and the other way round."""
        mask = (1 << self.length) - 1
        value = int.from_bytes(self._bits, "little") ^ mask
        return Bitmap(self.length, value.to_bytes(len(self._bits), "little"))

    def pack(self) -> bytes:
        """The packed bytes."""
        return bytes(self._bits)

    def _check(self, i: int) -> None:
        if not 0 <= i < self.length:
            raise IndexError(f"frame {i} is outside 0..{self.length - 1}")
