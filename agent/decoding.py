"""The agent's side of the decoder child: start it, tell it of frames, wait for it, kill it when nobody wants it.

Invariant: when `wait` returns or raises, or `cancel` returns, the child is gone. Telling it of frames never blocks:
what its pipe does not take is kept and told later.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from wire.errors import AmperageError, ArtifactError, Code, DeployError, StoreError

ANSWER_LIMIT_BYTES = 64 * 1024
REAP_TIMEOUT_S = 1.0
_STORE_CODES = frozenset({Code.NO_SPACE, Code.IO_ERROR, Code.CORRUPT})


@dataclass(frozen=True, slots=True)
class DecodeOrder:
    """Paths of one decoding; `into` is an empty directory, `base` the version that a delta needs. The pack has its full
    size and its index; frames of its data may still be arriving."""

    manifest: Path
    pack: Path
    into: Path
    base: Path | None


class Decode(Protocol):
    """A decoding that runs."""

    def add(self, frames: Sequence[int]) -> None:
        """These frames are in the pack, each right. Never blocks."""
        ...

    def wait(self, deadline_s: float) -> None:
        """Block until it is done; all frames were added. Raises AmperageError, also after `deadline_s` from now."""
        ...

    def cancel(self) -> None:
        """End it, with whatever it has; from any thread. A `wait` of another thread raises."""
        ...


class Decoder(Protocol):
    """Turns packs into version directories."""

    def begin(self, order: DecodeOrder) -> Decode:
        """Start; frames are added from then on."""
        ...


class ChildDecoder:
    """Decodes in a child process (agent/decoder.py) per pack."""

    def begin(self, order: DecodeOrder) -> "ChildDecode":
        """See Decoder.begin."""
        return ChildDecode(_command(order))


class ChildDecode:
    """One child; one thread at a time adds and waits."""

    def __init__(self, command: Sequence[str]) -> None:
        self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        self._untold = bytearray()
        self._late = self._waited_for = False
        if self._child.stdin is not None:
            os.set_blocking(self._child.stdin.fileno(), False)

    def add(self, frames: Sequence[int]) -> None:
        """See Decode.add."""
        for first, last in _runs(frames):
            self._untold += f"{first} {last}\n".encode()
        self._tell()

    def wait(self, deadline_s: float) -> None:
        """See Decode.wait; a child that dies is decoder_crashed, one that is late deadline_passed."""
        self._waited_for = True
        timer = threading.Timer(deadline_s, self._kill_late)
        timer.name = "decode-deadline"
        timer.daemon = True
        timer.start()
        try:
            answer = self._hear_out()
            status = self._child.wait()
        finally:
            timer.cancel()
        if self._late:
            raise DeployError(Code.DEADLINE_PASSED, f"decoding took longer than {deadline_s:g} s and was killed")
        if status != 0:
            raise _failure(status, answer)

    def cancel(self) -> None:
        """See Decode.cancel."""
        self._child.kill()
        try:
            self._child.wait(REAP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return  # it hangs in the kernel, and ends when that lets go of it
        if not self._waited_for:  # else whoever waits closes what he reads from
            self._close()

    def _tell(self) -> None:
        """Write what the pipe takes. A child that ended reads no more; `wait` says why."""
        pipe = self._child.stdin
        if pipe is None or pipe.closed:
            return
        try:
            while self._untold and (taken := pipe.write(self._untold)):
                del self._untold[:taken]
        except BrokenPipeError:
            self._untold.clear()

    def _hear_out(self) -> bytes:
        """Tell the rest, blocking now, close the pipe, and read the answer."""
        try:
            if self._child.stdin is not None:
                os.set_blocking(self._child.stdin.fileno(), True)
                self._tell()
                self._child.stdin.close()
            return self._child.stdout.read(ANSWER_LIMIT_BYTES) if self._child.stdout else b""
        finally:
            self._close()

    def _close(self) -> None:
        for pipe in (self._child.stdin, self._child.stdout):
            if pipe is not None:
                pipe.close()

    def _kill_late(self) -> None:
        self._late = True
        self._child.kill()


def _runs(frames: Sequence[int]) -> list[tuple[int, int]]:
    """Ascending frames as (first, last) of every run."""
    runs: list[tuple[int, int]] = []
    for frame in frames:
        if runs and runs[-1][1] + 1 == frame:
            runs[-1] = (runs[-1][0], frame)
        else:
            runs.append((frame, frame))
    return runs


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
