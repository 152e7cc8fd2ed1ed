"""Groups of cores: a replica of a model for each, whose threads and memory stay there.

One wide engine stops gaining at about 48 cores and reaches over the border of a NUMA node for its weights; several
narrow ones do not (Ampere's own tables: 10 processes of 8 threads give twice the tokens of one of 80). Threads inherit
the cores of the thread that makes them and memory lies where it is written first, so that loading a replica on a thread
that is confined to a group is all that it takes.
"""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from runtime.cpu import allowed_threads
from wire.errors import ConfigError

Cores = frozenset[int]

NUMA = "numa"
_LIST_LIMIT_BYTES = 64 * 1024
_RANGE = re.compile(r"(\d{1,5})(?:-(\d{1,5}))?")


def parse_cores(text: str) -> Cores:
    """Cores of a list as the kernel writes it, `0-3,8` (cpuset(7)). Raises ConfigError."""
    cores: set[int] = set()
    for part in filter(None, (part.strip() for part in text.split(","))):
        found = _RANGE.fullmatch(part)
        if found is None:
            raise ConfigError(f'core_groups: {text[:80]!r} is no list of cores; write it like "0-3,8"')
        first = int(found[1])
        cores |= set(range(first, int(found[2] or first) + 1))
    return frozenset(cores)


def core_groups(setting: str | Sequence[str], allowed: Cores, root: Path = Path("/")) -> list[Cores]:
    """The groups that `setting` makes of the `allowed` cores: all of them when it is empty, a group per NUMA node for
    NUMA, else one per list.

    Raises ConfigError for a list without an allowed core and for one that shares cores with another.
    """
    if setting == NUMA:
        lists = [path.read_text() for path in sorted((root / "sys/devices/system/node").glob("node*/cpulist"))]
        return [group for text in lists if (group := parse_cores(text) & allowed)] or [allowed]
    if isinstance(setting, str):
        raise ConfigError(f"core_groups: {setting[:80]!r} is unknown; write {NUMA!r} or lists of cores")
    groups: list[Cores] = []
    for text in setting:
        group = parse_cores(text) & allowed
        if not group:
            raise ConfigError(f"core_groups: this process may use none of the cores {text[:80]!r}")
        if any(group & other for other in groups):
            raise ConfigError(f"core_groups: {text[:80]!r} shares cores with another group; each core belongs to one")
        groups.append(group)
    return groups or [allowed]


def own_cores() -> Cores:
    """Cores that the calling thread may use."""
    return frozenset(os.sched_getaffinity(0))


def group_threads(setting: int, group: Cores, groups: int) -> int:
    """Threads of the replica in `group`: its share of what affinity, quota and `setting` allow, at most its cores."""
    return max(1, min(len(group), allowed_threads(setting) // groups)) if groups > 1 else allowed_threads(setting)


def cores_text(cores: Cores) -> str:
    """`cores` as parse_cores reads them."""
    return ",".join(map(str, sorted(cores)))


@contextmanager
def confined(cores: Cores) -> Iterator[None]:
    """Keep the calling thread, and for ever the threads that it makes meanwhile, on `cores`."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
