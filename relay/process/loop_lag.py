"""Measures how late the event loop runs: a blocked loop delays all requests and deliveries."""

import asyncio

from relay.metrics import Metrics

EVERY = 1.0  # seconds between measurements


class Lag:
    """Exports the delay of a timer."""

    def __init__(self, metrics: Metrics) -> None:
        self._gauge = metrics.lag
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Start measuring."""
        loop = asyncio.get_running_loop()
        due = loop.time() + EVERY
        self._timer = loop.call_at(due, self._ring, due)

    def stop(self) -> None:
        """Stop measuring."""
        if self._timer is not None:
            self._timer.cancel()

    def _ring(self, due: float) -> None:
        self._gauge.set(max(0.0, asyncio.get_running_loop().time() - due))
        self.start()
