"""Attempts at a receiver by the outgoing client, and how long they take."""

import asyncio
import time
from contextlib import suppress

SHORT = 0.2  # seconds, for what only a timeout ends
AMPLE = 10.0  # seconds, for what must end by itself
GRACE = 0.2  # seconds that an attempt may last beyond its timeout


async def send(client, url, body=b"{}", **headers):
    return await client.send(url, {"content-type": "application/json", **headers}, body)


class Stopwatch:
    """Measures how long its block takes, without the time in which other processes have the CPU."""

    TICK = 0.005  # seconds

    async def __aenter__(self):
        self._taken = 0.0
        self._started()
        self._ticking = asyncio.create_task(self._tick())
        return self

    async def __aexit__(self, *_):
        self._ticking.cancel()
        with suppress(asyncio.CancelledError):
            await self._ticking

    @property
    def seconds(self):
        """The time since the start."""
        return self._taken + self._since()

    async def _tick(self):
        while True:
            await asyncio.sleep(self.TICK)
            self._taken += self._since()
            self._started()

    def _started(self):
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def _since(self):
        """Return the time since the last tick: at most a tick, and what this process computed itself."""
        wall, cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu
        return min(wall, self.TICK + cpu)
