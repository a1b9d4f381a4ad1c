"""Periodic work, by APScheduler: short, idempotent, one at a time, and late rather than dropped."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from datetime import UTC

from apscheduler.schedulers.asyncio import AsyncIOScheduler

log = logging.getLogger("relay.jobs")

Work = Callable[[], Awaitable[None]]


class Jobs:
    """The daemon's periodic jobs, each by its name."""

    def __init__(self) -> None:
        self._scheduler = AsyncIOScheduler(
            timezone=UTC,
            job_defaults={"misfire_grace_time": None, "coalesce": True, "max_instances": 1},
        )

    def add(self, name: str, seconds: float, work: Work) -> None:
        """Run `work` every so many seconds; what it raises is logged and the next run comes all the same."""

        async def run() -> None:
            try:
                await work()
            except Exception:
                log.exception("job %s failed", name)
            except asyncio.CancelledError:
                if self._scheduler.running:  # else it is our stop, which APScheduler would log as a failure
                    log.exception("job %s was cancelled", name)

        self._scheduler.add_job(run, "interval", seconds=seconds, id=name, name=name)

    def start(self) -> None:
        """Begin."""
        self._scheduler.start()

    def stop(self) -> None:
        """Begin no further run, and cancel those that are under way."""
        if self._scheduler.running:
            self._scheduler.shutdown(wait=False)
