"""Periodic jobs, run by APScheduler: short, idempotent, one run at a time, late rather than dropped.

APScheduler uses the machine's clock, which may step. After a step back by an hour, no job would run for an
hour; after a step ahead by a century, its interval trigger would count every missed run. Therefore the next
run is scheduled relative to now, and all jobs run at once when the wall and steady clocks diverge.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta

import msgspec
from apscheduler.schedulers.asyncio import AsyncIOScheduler
from apscheduler.triggers.base import BaseTrigger

from relay.base.clock import SECOND, Clock
from relay.config.problems import guess, shown
from relay.errors import RelayError, StorageUnavailableError, UnknownError
from relay.metrics import Metrics
from relay.process.logs import in_one_line

log = logging.getLogger("relay.jobs")

CHECK_EVERY = 1.0  # seconds between comparisons of the clocks
STEP = 5 * SECOND
"""A larger difference means that the wall clock stepped; an NTP client slews smaller ones."""

Work = Callable[[], Awaitable[None]]


class _Every(BaseTrigger):  # type: ignore[misc] # APScheduler 3 ships no types
    """Fires a fixed time from now, regardless of the last run."""

    def __init__(self, seconds: float) -> None:
        self._pause = timedelta(seconds=seconds)

    def get_next_fire_time(self, _previous: datetime | None, now: datetime) -> datetime:
        return now + self._pause


class Past(msgspec.Struct, kw_only=True):
    """The history of a job's runs since the daemon started."""

    name: str
    every: float  # seconds from one run to the next
    running: bool = False
    runs: int = 0  # ended runs
    failures: int = 0
    started_at: int | None = None  # the latest run; wall clock
    succeeded_at: int | None = None  # the latest that succeeded
    seconds: float | None = None  # duration of the latest run
    error: str | None = None  # error of the latest run


class _Job(msgspec.Struct, frozen=True):
    past: Past
    work: Work
    cluster: bool  # runs on one node of a cluster
    led: bool  # one node of a cluster leads it, and may be the only one that runs it
    lock: asyncio.Lock  # held during a run, so that runs do not overlap


class Jobs:
    """The daemon's periodic jobs, by name."""

    def __init__(
        self, clock: Clock, metrics: Metrics | None = None, lead: Callable[[str], bool] = lambda _name: True
    ) -> None:
        """Take `lead`, which returns whether a job of the cluster runs on this node."""
        self._clock = clock
        self._lead = lead
        self._metrics = metrics or Metrics()
        self._scheduler = AsyncIOScheduler(
            timezone=UTC,
            job_defaults={"misfire_grace_time": None, "coalesce": True, "max_instances": 1},
        )
        self._jobs: dict[str, _Job] = {}
        self._clock_difference = self._difference()
        self._clock_check: asyncio.TimerHandle | None = None

    def add(self, name: str, seconds: float, work: Work, *, cluster: bool = False, led: bool = False) -> None:
        """Run `work` every `seconds`; an exception is logged and does not stop later runs.

        With `cluster`, it runs on one of the nodes that share the data. With `led`, it runs on each, but one
        of them does the part of the work that concerns all.
        """
        self._metrics.add_job(name)
        self._metrics.job_every.labels(name).set(seconds)
        job = self._jobs[name] = _Job(
            Past(name=name, every=seconds), work, cluster, cluster or led, asyncio.Lock()
        )

        async def run() -> None:
            if cluster and not self._lead(name):
                job.past.error = None  # the other node reports its own errors
                return
            try:
                await self._run(job)
            except asyncio.CancelledError:
                if self._scheduler.running:  # else the daemon stops, which is no failure
                    log.exception("job %s was cancelled", name)

        self._scheduler.add_job(run, _Every(seconds), id=name, name=name)

    def change(self, name: str, seconds: float) -> None:
        """Change the interval of a job."""
        self._jobs[name].past.every = seconds
        self._metrics.job_every.labels(name).set(seconds)
        self._scheduler.reschedule_job(name, trigger=_Every(seconds))

    def all(self) -> list[Past]:
        """Return the history of every job, sorted by name."""
        return [self._jobs[name].past for name in sorted(self._jobs)]

    @property
    def of_cluster(self) -> list[str]:
        """The names of the jobs that one node of a cluster leads."""
        return [name for name, job in self._jobs.items() if job.led]

    def next_run(self, name: str) -> datetime | None:
        """Return the time of a job's next run; None: the jobs are not running."""
        moment: datetime | None = getattr(self._scheduler.get_job(name), "next_run_time", None)
        return moment

    async def run(self, name: str) -> Past:
        """Run a job now, or after its current run, and return its history.

        Raises:
            UnknownError: the job does not exist.
            RelayError: another node of the cluster runs it.
        """
        job = self._find(name)
        if job.cluster and not self._lead(name):
            raise RelayError(f"job {name} runs on another node", hint="`relay nodes` lists the nodes")
        return await self._run(job)

    def is_led_elsewhere(self, name: str) -> bool:
        """Return whether another node of the cluster leads a job.

        Raises:
            UnknownError: the job does not exist.
        """
        return self._find(name).led and not self._lead(name)

    def _find(self, name: str) -> _Job:
        if name not in self._jobs:
            known = ", ".join(sorted(self._jobs))
            raise UnknownError(f"unknown job {shown(name)}{guess(name, self._jobs)}", hint=f"jobs: {known}")
        return self._jobs[name]

    async def _run(self, job: _Job) -> Past:
        """Run a job once, after its current run; an exception is recorded and logged."""
        async with job.lock:
            past, name, began = job.past, job.past.name, self._clock.steady()
            before = past.error
            outcome, past.running, past.error = "failed", True, None
            past.started_at = self._clock.wall()
            try:
                await job.work()
                outcome, past.succeeded_at = "ok", self._clock.wall()
                self._metrics.job_success.labels(name).set(past.succeeded_at / SECOND)
            except RelayError as error:
                past.error = in_one_line(error)
                # While the storage fails, jobs fail every second: log only the first failure as error.
                is_repeated = isinstance(error, StorageUnavailableError) and before == past.error
                level = logging.DEBUG if is_repeated else logging.ERROR
                log.log(level, "job %s failed: %s", name, past.error)
            except asyncio.CancelledError:
                past.error = "cancelled"
                raise
            except GeneratorExit:  # the loop is closed, and the coroutine with it
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
        """Start the jobs."""
        self._scheduler.start()
        self._clock_difference = self._difference()  # a cluster's clock was set meanwhile
        self._check_clocks()

    def stop(self) -> None:
        """Start no further run, and cancel current ones."""
        if self._clock_check is not None:
            self._clock_check.cancel()
        if self._scheduler.running:
            self._scheduler.shutdown(wait=False)

    def _check_clocks(self) -> None:
        """Run every job if the machine's clock has stepped. Timers of the event loop do not step."""
        difference = self._difference()
        if abs(step := difference - self._clock_difference) > STEP:
            log.warning("the machine's clock stepped by %+d s", step // SECOND)
            self._clock_difference = difference
            for job in self._scheduler.get_jobs():
                job.modify(next_run_time=datetime.now(UTC))
        self._clock_check = asyncio.get_running_loop().call_later(CHECK_EVERY, self._check_clocks)

    def _difference(self) -> int:
        """Return how far the clock of APScheduler is ahead of the steady clock, in microseconds."""
        return int(datetime.now(UTC).timestamp() * SECOND) - self._clock.steady()
