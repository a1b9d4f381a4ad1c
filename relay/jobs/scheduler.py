"""Periodic work, by APScheduler: short, idempotent, one at a time, and late rather than dropped.

APScheduler goes by the machine's clock, which may step: back by an hour, and no job would run for an
hour; ahead by a century, and its interval trigger would count every run that it missed. So a job's
next run is so long after now, and when wall and steady clock part, all jobs run and count anew.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta

import msgspec
from apscheduler.schedulers.asyncio import AsyncIOScheduler
from apscheduler.triggers.base import BaseTrigger

from relay.base.clock import SECOND, Clock
from relay.config.problems import guess
from relay.errors import RelayError, StorageUnavailableError, UnknownError
from relay.metrics import Metrics
from relay.process.logs import in_one_line

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


class Past(msgspec.Struct, kw_only=True):
    """What is known of a job's runs since the relay started."""

    name: str
    every: float  # seconds from one run to the next
    running: bool = False
    runs: int = 0  # that have ended
    failures: int = 0
    started_at: int | None = None  # the latest run; wall clock
    succeeded_at: int | None = None  # the latest that succeeded
    seconds: float | None = None  # that the latest one took
    error: str | None = None  # what it failed of


class _Job(msgspec.Struct, frozen=True):
    past: Past
    work: Work
    one: asyncio.Lock  # held by its run: there is one at a time, whoever asked for it


class Jobs:
    """The daemon's periodic jobs, each by its name."""

    def __init__(self, clock: Clock, metrics: Metrics | None = None) -> None:
        self._clock = clock
        self._metrics = metrics or Metrics()
        self._scheduler = AsyncIOScheduler(
            timezone=UTC,
            job_defaults={"misfire_grace_time": None, "coalesce": True, "max_instances": 1},
        )
        self._jobs: dict[str, _Job] = {}
        self._apart = self._difference()
        self._look: asyncio.TimerHandle | None = None

    def add(self, name: str, seconds: float, work: Work) -> None:
        """Run `work` every so many seconds; what it raises is logged and the next run comes all the same."""
        self._metrics.add_job(name)
        job = self._jobs[name] = _Job(Past(name=name, every=seconds), work, asyncio.Lock())

        async def run() -> None:
            try:
                await self._run(job)
            except asyncio.CancelledError:
                if self._scheduler.running:  # else our own stop, which APScheduler would log as a failure
                    log.exception("job %s was cancelled", name)

        self._scheduler.add_job(run, _Every(seconds), id=name, name=name)

    def change(self, name: str, seconds: float) -> None:
        """Run a job every so many seconds from now on."""
        self._jobs[name].past.every = seconds
        self._scheduler.reschedule_job(name, trigger=_Every(seconds))

    def all(self) -> list[Past]:
        """Return what is known of every job, in the order of their names."""
        return [self._jobs[name].past for name in sorted(self._jobs)]

    def next_run(self, name: str) -> datetime | None:
        """Return when a job runs next; None: nobody knows, as the jobs do not run."""
        moment: datetime | None = getattr(self._scheduler.get_job(name), "next_run_time", None)
        return moment

    async def run(self, name: str) -> Past:
        """Run a job now, or after the run under way, and return what came of it.

        Raises:
            UnknownError: there is no such job.
        """
        if name not in self._jobs:
            known = ", ".join(sorted(self._jobs))
            raise UnknownError(f"no job {name!r}{guess(name, self._jobs)}", hint=f"there are {known}")
        return await self._run(self._jobs[name])

    async def _run(self, job: _Job) -> Past:
        """Run a job once, after the run under way; what its work raises is noted and logged."""
        async with job.one:
            past, name, began = job.past, job.past.name, self._clock.steady()
            before = past.error
            outcome, past.running, past.error = "failed", True, None
            past.started_at = self._clock.wall()
            try:
                await job.work()
                outcome, past.succeeded_at = "ok", self._clock.wall()
                self._metrics.job_success.labels(name).set(past.succeeded_at / SECOND)
            except RelayError as error:
                said, past.error = before, in_one_line(error)
                # While nothing can be written, jobs fail each second: the first time says it.
                again = isinstance(error, StorageUnavailableError) and said == past.error
                level = logging.DEBUG if again else logging.ERROR
                log.log(level, "job %s failed: %s", name, past.error)
            except asyncio.CancelledError:
                past.error = "it was cancelled"
                raise
            except GeneratorExit:  # the loop is gone, and the coroutine with it
                raise
            except BaseException as error:  # a plugin's SystemExit would end the daemon
                log.exception("job %s failed", name)
                past.error = f"{type(error).__name__}: {error}"
            finally:
                past.running, past.seconds = False, (self._clock.steady() - began) / SECOND
                past.runs += 1
                past.failures += outcome != "ok"
                self._metrics.job_runs.labels(name, outcome).inc()
                self._metrics.job_seconds.labels(name).observe(past.seconds)
            return msgspec.structs.replace(past)

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
