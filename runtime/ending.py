"""Waiting on the event loop for the end of work that a thread does for a request.

Invariant: whatever way the waiting ends (done, failed, client gone, time over), the work is cancelled once, which is no
fault when it has ended.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from starlette.requests import ClientDisconnect, Request

from runtime.http import watch_client
from runtime.stats import Stats
from wire.errors import Code, InferenceError


@dataclass(slots=True)
class Ending:
    """How the work ends. `end` is its sink, called on the event loop; `cancel` is set by whoever began the work."""

    end: Callable[[InferenceError | ClientDisconnect | None], None]
    cancel: Callable[[], object] | None = None


@asynccontextmanager
async def until_ended(request: Request, stats: Stats, remedy: str) -> AsyncIterator[Ending]:
    """Begin work in the block; leaving it waits for the end.

    Raises what the work ended with, InferenceError(deadline_passed, 504) with `remedy` when the time of a request is
    over, ClientDisconnect when nobody waits any more.
    """
    timeout_s: float = request.app.state.settings.request_timeout_s
    ended: asyncio.Future[InferenceError | ClientDisconnect | None] = asyncio.get_running_loop().create_future()

    def end(error: InferenceError | ClientDisconnect | None) -> None:
        if not ended.done():
            ended.set_result(error)

    ending = Ending(end)
    yield ending
    try:
        async with watch_client(request.receive, lambda: end(ClientDisconnect())), asyncio.timeout(timeout_s):
            error = await ended
    except TimeoutError as late:
        stats.failed()
        raise InferenceError(Code.DEADLINE_PASSED, f"no answer within {timeout_s:g} s; {remedy}", 504) from late
    finally:
        if ending.cancel is not None:
            ending.cancel()
    if error is not None:
        raise error
