"""Unix sockets of servers: inherited from systemd, or bound here with the modes that make them private.

Invariants: the mode is right from the socket's first instant (umask, not chmod afterwards); nothing but a socket that
nobody answers on is ever removed. A crash leaves the socket's file, which the next start removes.
"""

import errno
import os
import socket
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from wire.errors import ConfigError

PUBLIC_MODE = 0o660
ADMIN_MODE = 0o600
BACKLOG = 128
PATH_LIMIT_BYTES = 107
"""sun_path of unix(7), without its terminating zero."""


@dataclass(slots=True)
class Listener:
    """A listening socket; `inode` is None when systemd owns its file."""

    path: Path
    socket: socket.socket
    inode: int | None = None

    def remove(self) -> None:
        """Remove the socket's file when it is still the one that was bound here."""
        if self.inode is not None and self.path.exists() and self.path.stat().st_ino == self.inode:
            self.path.unlink()


def open_listener(path: Path, mode: int, inherited: Iterable[socket.socket]) -> Listener:
    """The inherited socket that is bound to `path`, or a new one; raises ConfigError."""
    for candidate in inherited:
        if candidate.family == socket.AF_UNIX and candidate.getsockname() == str(path):
            candidate.setblocking(False)
            return Listener(path, candidate)
    return _bind(path, mode)


def _bind(path: Path, mode: int) -> Listener:
    if len(os.fsencode(path)) > PATH_LIMIT_BYTES:
        raise ConfigError(f"{path} is longer than {PATH_LIMIT_BYTES} bytes, which no socket's path may be; shorten it")
    _remove_stale(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    umask = os.umask(0o777 & ~mode)
    try:
        listener.bind(str(path))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on {path}: {error.strerror}; its directory must exist and be ours") from error
    finally:
        os.umask(umask)
    listener.setblocking(False)
    return Listener(path, listener, path.stat().st_ino)


def _remove_stale(path: Path) -> None:
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; choose another path for the socket") from error
    if not stat.S_ISSOCK(found.st_mode):
        raise ConfigError(f"{path} exists and is no socket; remove it, or choose another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        answer = probe.connect_ex(str(path))
    if answer != errno.ECONNREFUSED:
        raise ConfigError(f"another process listens on {path}; stop it first")
    path.unlink(missing_ok=True)
