"""How late the event loop is: what blocks it delays every sender and every delivery at once."""

import asyncio

from relay.metrics import Metrics

EVERY = 1.0  # seconds between two looks


class Lag:
    """Exports by how much a timer rang too late."""

    def __init__(self, metrics: Metrics) -> None:
        self._gauge = metrics.lag
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Begin."""
        loop = asyncio.get_running_loop()
        due = loop.time() + EVERY
        self._timer = loop.call_at(due, self._ring, due)

    def stop(self) -> None:
        """End."""
        if self._timer is not None:
            self._timer.cancel()

    def _ring(self, due: float) -> None:
        self._gauge.set(max(0.0, asyncio.get_running_loop().time() - due))
        self.start()
