"""How the other threads reach the engine: a mailbox of two ports, and threads for calls that block.

Commands never queue behind frames: the engine empties the control port before it takes a few frames. Both ports are
bounded; a full frame port stops the bulk connection from reading, a full control port stops the one that writes to it.
"""

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from wire.errors import AmperageError

CONTROL_MESSAGES = 512
FRAME_MESSAGES = 64
"""7.5 MiB: what the bulk connection reads ahead while the engine waits for the disk; a smaller port kept it waiting."""
FRAMES_PER_TURN = 16


class Port(queue.Queue[Any]):
    """A bounded queue that rings the engine's bell."""

    def __init__(self, bell: threading.Event, maxsize: int) -> None:
        super().__init__(maxsize)
        self._bell = bell

    def _put(self, item: object) -> None:
        super()._put(item)
        self._bell.set()


class Mailbox:
    """The engine's two ports; the engine alone takes from them."""

    def __init__(self) -> None:
        self._bell = threading.Event()
        self.control = Port(self._bell, CONTROL_MESSAGES)
        self.frames = Port(self._bell, FRAME_MESSAGES)

    def new_frames_port(self) -> Port:
        """A fresh port for a new bulk connection: what an older one still delivers reaches nobody."""
        self.frames = Port(self._bell, FRAME_MESSAGES)
        return self.frames

    def wait(self, timeout_s: float) -> None:
        """Until something arrives or time is up."""
        self._bell.wait(timeout_s)
        self._bell.clear()

    def take_control(self) -> Iterator[object]:
        """What lies in the control port now."""
        yield from _take(self.control, CONTROL_MESSAGES)

    def take_frames(self) -> Iterator[object]:
        """Some of what lies in the frame port; rings again when more is left."""
        yield from _take(self.frames, FRAMES_PER_TURN)
        if not self.frames.empty():
            self._bell.set()


@dataclass(frozen=True, slots=True)
class WorkDone:
    """A blocking call ended; `token` tells whether anybody still waits for it."""

    token: int
    result: object = None
    error: AmperageError | None = None


@dataclass(frozen=True, slots=True)
class Crashed:
    """A thread met a defect: the engine raises it, the process ends, the journal resumes."""

    error: BaseException


class Workshop:
    """Runs blocking calls (decode, probe, load, stats) on threads of their own and posts their ends."""

    def __init__(self, control: Port) -> None:
        self._control = control
        self._last_token = 0

    def start(self, name: str, call: Callable[[], object]) -> int:
        """Run `call` on a thread `work-<name>`; returns the token of its WorkDone."""
        self._last_token += 1
        token = self._last_token
        threading.Thread(target=self._run, args=(token, call), name=f"work-{name}", daemon=True).start()
        return token

    def _run(self, token: int, call: Callable[[], object]) -> None:
        try:
            self._control.put(WorkDone(token, result=call()))
        except AmperageError as error:
            self._control.put(WorkDone(token, error=error))
        except BaseException as error:  # noqa: BLE001  a defect must reach the engine, not die in a thread
            self._control.put(Crashed(error))


def _take(port: Port, most: int) -> Iterator[object]:
    for _ in range(most):
        try:
            yield port.get_nowait()
        except queue.Empty:
            return
