"""Periodic work, by APScheduler: short, idempotent, one at a time, and late rather than dropped.

APScheduler goes by the machine's clock, which may step: back by an hour, and no job would run for an
hour; ahead by a century, and its interval trigger would count every run that it missed. So a job's
next run is so long after now, and when wall and steady clock part, all jobs run and count anew.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta

from apscheduler.schedulers.asyncio import AsyncIOScheduler
from apscheduler.triggers.base import BaseTrigger

from relay.clock import SECOND, Clock
from relay.metrics import Metrics

log = logging.getLogger("relay.jobs")

LOOK_EVERY = 1.0  # seconds between looks at both clocks
STEP = 5 * SECOND
"""Clocks that part by more than this have stepped; an NTP client slews away anything less."""

Work = Callable[[], Awaitable[None]]


class _Every(BaseTrigger):  # type: ignore[misc] # APScheduler 3 ships no types
    """Fires so long after now, whenever the last time was."""

    def __init__(self, seconds: float) -> None:
        self._pause = timedelta(seconds=seconds)

    def get_next_fire_time(self, _previous: datetime | None, now: datetime) -> datetime:
        return now + self._pause


class Jobs:
    """The daemon's periodic jobs, each by its name."""

    def __init__(self, clock: Clock, metrics: Metrics | None = None) -> None:
        self._clock = clock
        self._metrics = metrics or Metrics()
        self._scheduler = AsyncIOScheduler(
            timezone=UTC,
            job_defaults={"misfire_grace_time": None, "coalesce": True, "max_instances": 1},
        )
        self._apart = self._difference()
        self._look: asyncio.TimerHandle | None = None

    def add(self, name: str, seconds: float, work: Work) -> None:
        """Run `work` every so many seconds; what it raises is logged and the next run comes all the same."""
        metrics = self._metrics
        metrics.add_job(name)

        async def run() -> None:
            outcome, began = "failed", self._clock.steady()
            try:
                await work()
                outcome = "ok"
                metrics.job_success.labels(name).set(self._clock.wall() / SECOND)
            except Exception:
                log.exception("job %s failed", name)
            except asyncio.CancelledError:
                if self._scheduler.running:  # else it is our stop, which APScheduler would log as a failure
                    log.exception("job %s was cancelled", name)
            metrics.job_runs.labels(name, outcome).inc()
            metrics.job_seconds.labels(name).observe((self._clock.steady() - began) / SECOND)

        self._scheduler.add_job(run, _Every(seconds), id=name, name=name)

    def change(self, name: str, seconds: float) -> None:
        """Run a job every so many seconds from now on."""
        self._scheduler.reschedule_job(name, trigger=_Every(seconds))

    def start(self) -> None:
        """Begin."""
        self._scheduler.start()
        self._look_at_clocks()

    def stop(self) -> None:
        """Begin no further run, and cancel those that are under way."""
        if self._look is not None:
            self._look.cancel()
        if self._scheduler.running:
            self._scheduler.shutdown(wait=False)

    def _look_at_clocks(self) -> None:
        """Run every job when the machine's clock has stepped, and go on from there; timers do not step."""
        apart = self._difference()
        if abs(apart - self._apart) > STEP:
            log.warning("the machine's clock stepped by %+d s", (apart - self._apart) // SECOND)
            self._apart = apart
            for job in self._scheduler.get_jobs():
                job.modify(next_run_time=datetime.now(UTC))
        self._look = asyncio.get_running_loop().call_later(LOOK_EVERY, self._look_at_clocks)

    def _difference(self) -> int:
        return self._clock.wall() - self._clock.steady()
