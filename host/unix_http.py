"""HTTP/1.1 over a Unix socket with the standard library, and one bounded request on it.

Nothing is kept between calls: a connection per request, so a restarted server is no special case.
"""

import http.client
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from wire.errors import Code, TransferError

ANSWER_LIMIT_BYTES = 16 * 1024 * 1024


class UnixConnection(http.client.HTTPConnection):
    """An HTTPConnection whose address is a path."""

    def __init__(self, path: Path, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        """Connect; raises OSError."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


@dataclass(frozen=True, slots=True)
class Answer:
    """Status and body of one answer."""

    status: int
    body: bytes


def request(
    path: Path, method: str, target: str, body: bytes | BinaryIO | None = None, *, timeout_s: float = 30.0
) -> Answer:
    """One request to the server on the socket `path`; a body given as a file is streamed.

    Raises TransferError(runtime_unreachable) when nobody answers or the answer exceeds ANSWER_LIMIT_BYTES.
    """
    connection = UnixConnection(path, timeout_s)
    try:
        connection.request(method, target, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        data = response.read(ANSWER_LIMIT_BYTES + 1)
    except (OSError, http.client.HTTPException) as error:
        raise TransferError(
            Code.RUNTIME_UNREACHABLE, f"nobody answers on {path} ({error}); is the service running?"
        ) from error
    finally:
        connection.close()
    if len(data) > ANSWER_LIMIT_BYTES:
        raise TransferError(Code.RUNTIME_UNREACHABLE, f"the answer on {path} is over {ANSWER_LIMIT_BYTES} bytes")
    return Answer(response.status, data)
