"""Deadlines for what senders send, which do not count the time for which the relay itself stood still."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

STANDSTILL = 0.1  # seconds by which a timer is late where the process or its event loop stood still

T = TypeVar("T")


async def in_time(
    seconds: float,
    read: Callable[[], Awaitable[T]],
    unread: Callable[[], bool],
    earned: Callable[[], float] = lambda: 0.0,
) -> T:
    """Return what `read` gives within `seconds`, and what it has `earned` of them meanwhile.

    After a standstill of the process (SIGSTOP, a suspended machine), uvloop rings timers before it reads what
    has come meanwhile. So a deadline that rings late moves, and one that finds bytes `unread` once lets them
    be read first.

    `read` is cancelled and called again where the deadline moves.

    Raises:
        TimeoutError: it took longer.
    """
    loop = asyncio.get_running_loop()
    began, has_waited = loop.time(), False
    at = began + seconds
    while True:
        try:
            async with asyncio.timeout_at(at):
                return await read()
        except TimeoutError:
            now = loop.time()
            late = now - at
            if late >= STANDSTILL:
                began += late
                at = now + min(late, seconds)
            elif (until := began + seconds + earned()) > now:
                at, has_waited = until, False
            elif not has_waited and unread():
                at, has_waited = now, True
            else:
                raise
