"""What this process holds in memory, and keeping the C heap small: memory of a dropped model goes back to the machine.

The calls of malloc are glibc's; another C library that has none of them loses nothing but tightness.
"""

import ctypes
import re
from pathlib import Path

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
"""malloc.h of glibc."""
ARENAS = 2
MAPPED_BYTES = 4 << 20
"""Blocks of this size are mappings of their own, which go back to the machine when they are freed. Left to itself,
glibc raises the size to that of the largest block that was ever freed, and the holes that large matrices leave between
small ones stay: 20 to 30 MB more after 100 loads of a 135 M model, none with this. Steps mostly take smaller ones."""
KEPT_BYTES = 64 << 20
"""What may stay at the heap's end between steps, so that they do not ask the kernel for the same pages again."""


def tighten_heap() -> None:
    """mallopt(3), before threads begin. Every thread that loads a model would otherwise grow an arena of its own, too:
    25 MB each for a 4 MB model, up to eight per core."""
    option = getattr(ctypes.CDLL(None), "mallopt", None)
    if option is not None:
        for name, value in (
            (_M_ARENA_MAX, ARENAS), (_M_MMAP_THRESHOLD, MAPPED_BYTES), (_M_TRIM_THRESHOLD, KEPT_BYTES),
        ):  # fmt: skip
            option(name, value)


def trim_heap() -> None:
    """malloc_trim(3). Without it nine loads of a 38 MB model grow the process by 40 MB."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def anonymous_bytes() -> int:
    """Memory of this process that is no page of a file (proc(5), smaps_rollup); 0 where the kernel does not tell."""
    try:
        text = Path("/proc/self/smaps_rollup").read_text()
    except OSError:
        return 0
    found = re.search(r"^Anonymous:\s+(\d+) kB", text, re.MULTILINE)
    return 1024 * int(found[1]) if found else 0


def mapped_bytes(directory: Path, smaps: Path = Path("/proc/self/smaps")) -> tuple[int, int]:
    """What is mapped of files in `directory`, and what of that is in memory (proc(5))."""
    mapped = resident = 0
    inside = False
    for line in smaps.read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = f" {directory}/" in line
        elif inside and line.startswith("Size:"):
            mapped += 1024 * int(line.split()[1])
        elif inside and line.startswith("Rss:"):
            resident += 1024 * int(line.split()[1])
    return mapped, resident


def resident_share(directory: Path, smaps: Path = Path("/proc/self/smaps")) -> float:
    """Of what is mapped of files in `directory`, the share that is in memory; 0 when nothing is mapped."""
    mapped, resident = mapped_bytes(directory, smaps)
    return resident / mapped if mapped else 0.0
