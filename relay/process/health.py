"""Health of the process: whether the daemon is ready, and how late its event loop runs."""

import asyncio
from collections.abc import Callable

Reason = Callable[[], str | None]

LAG_EVERY = 1.0  # seconds between measurements of the event loop


class Health:
    """Collects the reasons why the daemon is not ready."""

    def __init__(self) -> None:
        self.phase: str | None = "starting"  # "draining" during the shutdown; None: serving
        self._reasons: list[Reason] = []

    def watch(self, reason: Reason) -> None:
        """Add a check that returns a sentence if something is wrong, else None."""
        self._reasons.append(reason)

    def reasons(self) -> list[str]:
        """Return all current reasons; an empty list means ready."""
        found = [self.phase] if self.phase else []
        return found + [text for reason in self._reasons if (text := reason())]


class LoopLag:
    """Measures how late a timer runs: a blocked event loop delays all requests and deliveries."""

    def __init__(self, observe: Callable[[float], object]) -> None:
        """Call `observe` once a second with the delay in seconds, from `start` to `stop`."""
        self._observe = observe
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Start measuring."""
        loop = asyncio.get_running_loop()
        due = loop.time() + LAG_EVERY
        self._timer = loop.call_at(due, self._measure, due)

    def stop(self) -> None:
        """Stop measuring."""
        if self._timer is not None:
            self._timer.cancel()

    def _measure(self, due: float) -> None:
        self._observe(max(0.0, asyncio.get_running_loop().time() - due))
        self.start()
