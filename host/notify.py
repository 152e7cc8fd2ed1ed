"""What a service says to systemd and takes from it: sd_notify(3) messages and inherited sockets, no dependency.

Invariant: without systemd every call does nothing; a notification never fails the service.
"""

import os
import socket
from contextlib import suppress

FIRST_SOCKET = 3
"""SD_LISTEN_FDS_START of sd_listen_fds(3)."""


def notify_ready(status: str = "") -> None:
    """The service does its work from now on."""
    _send(f"READY=1\nSTATUS={status}" if status else "READY=1")


def notify_watchdog() -> None:
    """The main loop is alive; to be sent from that loop, never from a thread beside it."""
    _send("WATCHDOG=1")


def notify_status(status: str) -> None:
    """One line for `systemctl status`."""
    _send(f"STATUS={status}")


def notify_stopping() -> None:
    """The service is about to end on purpose."""
    _send("STOPPING=1")


def watchdog_interval_s() -> float | None:
    """Seconds between notifications that the watchdog expects (half its time-out), None when there is none."""
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    timeout_us = os.environ.get("WATCHDOG_USEC", "")
    return int(timeout_us) / 2e6 if timeout_us.isdigit() and int(timeout_us) > 0 else None


def listen_fds() -> dict[str, socket.socket]:
    """Sockets that systemd passed to this process, by their FileDescriptorName; empty when it passed none."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return {}
    count = int(os.environ.get("LISTEN_FDS", "0"))
    names = os.environ.get("LISTEN_FDNAMES", "").split(":")
    sockets: dict[str, socket.socket] = {}
    for i in range(count):
        descriptor = FIRST_SOCKET + i
        os.set_inheritable(descriptor, False)
        name = names[i] if i < len(names) and names[i] else str(i)
        sockets[name] = socket.socket(fileno=descriptor)
    return sockets


def _send(message: str) -> None:
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address[:1] not in ("/", "@"):
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
        channel.settimeout(1.0)
        channel.connect(address)
        channel.sendall(message.encode())
