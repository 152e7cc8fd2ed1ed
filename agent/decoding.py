"""The agent's side of the decoder child: start it, wait for it, kill it at the deadline or when nobody wants it.

Invariant: when `decode` returns or raises, the child is gone.
"""

import json
import os
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from wire.errors import AmperageError, ArtifactError, Code, DeployError, StoreError

ANSWER_LIMIT_BYTES = 64 * 1024
_STORE_CODES = frozenset({Code.NO_SPACE, Code.IO_ERROR, Code.CORRUPT})


@dataclass(frozen=True, slots=True)
class DecodeOrder:
    """Paths of one decoding; `into` is an empty directory, `base` the version that a delta needs."""

    manifest: Path
    pack: Path
    into: Path
    base: Path | None
    deadline_s: float


class Decoder(Protocol):
    """Turns a pack into a version directory."""

    def decode(self, order: DecodeOrder) -> None:
        """Block until it is done; raises AmperageError."""
        ...

    def cancel(self) -> None:
        """Make a running `decode` end soon, with an error; callable from any thread."""
        ...


class ChildDecoder:
    """Decodes in a child process (agent/decoder.py)."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._late = False

    def decode(self, order: DecodeOrder) -> None:
        """See Decoder.decode; a child that dies is decoder_crashed, one that is late deadline_passed."""
        with subprocess.Popen(_command(order), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as child:
            with self._lock:
                self._child, self._late = child, False
            timer = threading.Timer(order.deadline_s, self._kill_late)
            timer.name = "decode-deadline"
            timer.daemon = True
            timer.start()
            try:
                answer = child.stdout.read(ANSWER_LIMIT_BYTES) if child.stdout else b""
                status = child.wait()
            finally:
                timer.cancel()
                with self._lock:
                    self._child = None
        if self._late:
            raise DeployError(Code.DEADLINE_PASSED, f"decoding took longer than {order.deadline_s:g} s and was killed")
        if status != 0:
            raise _failure(status, answer)

    def cancel(self) -> None:
        """See Decoder.cancel."""
        with self._lock:
            if self._child is not None:
                self._child.kill()

    def _kill_late(self) -> None:
        self._late = True
        self.cancel()


def _command(order: DecodeOrder) -> list[str]:
    command = [
        sys.executable, "-P", "-m", "agent.decoder", "--parent", str(os.getpid()), "--manifest", str(order.manifest),
        "--pack", str(order.pack), "--into", str(order.into),
    ]  # fmt: skip
    return [*command, "--base", str(order.base)] if order.base else command


def _failure(status: int, answer: bytes) -> AmperageError:
    try:
        body = json.loads(answer.splitlines()[-1])
        code, message = Code(body["code"]), str(body["message"])
    except (ValueError, KeyError, IndexError, TypeError):
        how = f"signal {-status}" if status < 0 else f"exit status {status}"
        return DeployError(Code.DECODER_CRASHED, f"the decoder ended with {how}; see the agent's log for its traceback")
    return StoreError(code, message) if code in _STORE_CODES else ArtifactError(code, message)
