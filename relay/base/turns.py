"""Turns: long work in the event loop, divided so that other tasks run meanwhile."""

import asyncio
from time import perf_counter

SLICE = 0.0005
"""Seconds of work after which other tasks get a turn."""


class Turns:
    """Gives other tasks a turn between the steps of long work."""

    __slots__ = ("_until",)

    def __init__(self) -> None:
        self._until = 0.0  # the first call gives a turn, because the time of earlier work is unknown

    async def give(self) -> None:
        """Let other tasks run if they have waited for longer than `SLICE`; call it after each short step."""
        if perf_counter() >= self._until:
            await asyncio.sleep(0)
            self._until = perf_counter() + SLICE
