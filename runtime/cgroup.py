"""The cgroups that hold this process: where its limits of CPU and memory are written.

Both hierarchies are read, because containers still meet both; a file that is not there says nothing. `root` is for
tests.
"""

from collections.abc import Iterator
from pathlib import Path

from host.files import read_bounded
from wire.errors import StoreError

_FILE_LIMIT_BYTES = 4 << 20


def groups_of(controller: str, root: Path) -> Iterator[tuple[int, Path]]:
    """(hierarchy, directory), 2 or 1, of the group that holds this process and of every group above it."""
    for line in read_text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if not controllers:
            mounts, version = ["sys/fs/cgroup"], 2
        elif controller in controllers.split(","):
            mounts, version = sorted({f"sys/fs/cgroup/{controllers}", f"sys/fs/cgroup/{controller}"}), 1
        else:
            continue
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for mount in mounts:
            yield from ((version, (root / mount).joinpath(*parts[:depth])) for depth in range(len(parts) + 1))


def read_text(path: Path) -> str:
    """A file of /proc or /sys, '' when it is not there or refuses."""
    try:
        return read_bounded(path, _FILE_LIMIT_BYTES).decode(errors="replace")
    except (FileNotFoundError, StoreError):
        return ""
