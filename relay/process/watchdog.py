"""Sends keep-alives to systemd's watchdog from the event loop, while the relay makes progress.

A blocked loop cannot send them. While the writer or a lane is stuck, they are not sent, so systemd restarts
the daemon.
"""

import asyncio
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from relay.process.systemd import Notifier

log = logging.getLogger("relay.systemd")

SHARE = 4  # keep-alives per watchdog interval; three may be late
EVERY = 10.0  # seconds between requests for more time during the start and the shutdown
MORE = 30.0  # seconds per request


class Watchdog:
    """Reports to the service manager at regular intervals, from `start` to `stop`."""

    def __init__(
        self, notifier: Notifier, *, stuck: Callable[[], list[str]], status: Callable[[], str]
    ) -> None:
        self._notifier = notifier
        self._stuck = stuck
        self._status = status
        self._last_status = ""
        self._starting = True
        self._stopping = False
        self._alive = True  # whether the latest keep-alive was sent
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Start, and request more start-up time until `started`."""
        self._beat()

    def started(self) -> None:
        """Report the end of the start-up; from now on, keep-alives depend on progress."""
        self._starting = False
        self._last_status = self._status()
        self._notifier.ready(self._last_status)

    @contextmanager
    def reloading(self) -> Iterator[None]:
        """Report the start of a reload, and its end whether it succeeds or not."""
        self._notifier.reloading()
        try:
            yield
        finally:
            self._last_status = self._status()
            self._notifier.ready(self._last_status)

    def stopping(self) -> None:
        """Report the start of the shutdown; keep-alives and requests for time continue until `stop`."""
        self._stopping = True
        self._last_status = self._status()
        self._notifier.stopping(self._last_status)

    def stop(self) -> None:
        """Stop reporting."""
        if self._timer is not None:
            self._timer.cancel()

    def _beat(self) -> None:
        if not self._starting and (status := self._status()) != self._last_status:
            self._last_status = status
            self._notifier.status(status)
        stuck = [] if self._starting else self._stuck()
        if not stuck:
            self._notifier.alive()
            if self._starting or self._stopping:
                self._notifier.extend(MORE)
        elif self._alive:
            log.critical("stuck, so the watchdog gets no more keep-alives: %s", "; ".join(stuck))
        self._alive = not stuck
        deadline = self._notifier.watchdog
        pace = EVERY if deadline is None else min(deadline / SHARE, EVERY)
        self._timer = asyncio.get_running_loop().call_later(pace, self._beat)
