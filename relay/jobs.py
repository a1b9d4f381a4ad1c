"""Periodic work, by APScheduler: short, idempotent, one at a time, and late rather than dropped."""

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

        self._scheduler.add_job(run, "interval", seconds=seconds, id=name, name=name)

    def start(self) -> None:
        """Begin."""
        self._scheduler.start()

    def stop(self) -> None:
        """Begin no further run; one that is under way ends by itself."""
        if self._scheduler.running:
            self._scheduler.shutdown(wait=False)
