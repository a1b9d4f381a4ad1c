"""Timeouts and requests for tests of the outgoing client."""

import asyncio
import time
from contextlib import suppress

SHORT = 0.2  # seconds; for tests that wait for a timeout
AMPLE = 10.0  # seconds; for tests that must not reach a timeout
GRACE = 0.2  # seconds that an attempt may last beyond its timeout


async def send(client, url, body=b"{}", **headers):
    return await client.send(url, {"content-type": "application/json", **headers}, body)


class Stopwatch:
    """Measures the time of its block, without time in which other processes had the CPU."""

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
        """Seconds since the start of the block."""
        return self._taken + self._since()

    async def _tick(self):
        while True:
            await asyncio.sleep(self.TICK)
            self._taken += self._since()
            self._started()

    def _started(self):
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def _since(self):
        """Return the time since the last tick: at most one tick plus this process's own CPU time."""
        wall, cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu
        return min(wall, self.TICK + cpu)
