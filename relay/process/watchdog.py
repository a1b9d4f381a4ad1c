"""Feeds systemd's watchdog, from within the event loop and only while the relay gets on with its work.

A loop that has stopped turning cannot feed it; a writer or a lane that is stuck speaks against it.
"""

import asyncio
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from relay.process.systemd import Notifier

log = logging.getLogger("relay.systemd")

SHARE = 4  # feedings per deadline: three may come late
EVERY = 10.0  # seconds between requests for more time while migrations and checks run, or deliveries end
MORE = 30.0  # seconds asked for each time


class Watchdog:
    """Speaks to the service manager at a steady pace, from `start` to `stop`."""

    def __init__(
        self, notifier: Notifier, *, stuck: Callable[[], list[str]], status: Callable[[], str]
    ) -> None:
        self._notifier = notifier
        self._stuck = stuck
        self._status = status
        self._said = ""
        self._starting = True
        self._stopping = False
        self._fed = True
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Begin, and ask for more time to start for as long as it takes."""
        self._beat()

    def started(self) -> None:
        """Say that start-up is through: from now on it is the work that counts."""
        self._starting = False
        self._said = self._status()
        self._notifier.ready(self._said)

    @contextmanager
    def reloading(self) -> Iterator[None]:
        """Say that a reload begins and, however it ends, that the relay serves."""
        self._notifier.reloading()
        try:
            yield
        finally:
            self._said = self._status()
            self._notifier.ready(self._said)

    def stopping(self) -> None:
        """Say that the end has begun; what drains is fed, and given time, until `stop`."""
        self._stopping = True
        self._said = self._status()
        self._notifier.stopping(self._said)

    def stop(self) -> None:
        """End."""
        if self._timer is not None:
            self._timer.cancel()

    def _beat(self) -> None:
        if not self._starting and (status := self._status()) != self._said:
            self._said = status
            self._notifier.status(status)
        stuck = [] if self._starting else self._stuck()
        if not stuck:
            self._notifier.alive()
            if self._starting or self._stopping:
                self._notifier.extend(MORE)
        elif self._fed:
            log.critical("the watchdog is not fed any more: %s", "; ".join(stuck))
        self._fed = not stuck
        deadline = self._notifier.watchdog
        pace = EVERY if deadline is None else min(deadline / SHARE, EVERY)
        self._timer = asyncio.get_running_loop().call_later(pace, self._beat)
