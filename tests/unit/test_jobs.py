"""Periodic jobs: they run again after any result, one run at a time, until the daemon stops."""

import asyncio
import logging
from datetime import UTC, datetime, timedelta

import pytest
from support import SteppedClock, until

from relay.base.clock import SystemClock
from relay.errors import UnknownError
from relay.jobs.scheduler import Jobs


@pytest.fixture
async def jobs():
    jobs = Jobs(SystemClock())
    jobs.start()
    yield jobs
    jobs.stop()


async def test_a_job_runs_again_and_again(jobs):
    runs = []

    async def work():
        runs.append(1)

    jobs.add("count", 0.01, work)
    await until(lambda: len(runs) >= 3)


@pytest.mark.parametrize("error", [KeyError, SystemExit, KeyboardInterrupt, BaseException])
async def test_a_job_that_fails_is_logged_and_runs_again(jobs, caplog, error):
    async def work():
        raise error("nothing")

    jobs.add("shop.fail", 0.01, work)
    await until(lambda: len(caplog.records) >= 2)
    record = caplog.records[0]
    assert (record.name, record.getMessage()) == ("relay.jobs", "job shop.fail failed")
    assert record.exc_info[0] is error


async def test_a_job_that_cancels_itself_is_logged(jobs, caplog):
    async def work():
        raise asyncio.CancelledError

    jobs.add("shop.cancel", 0.01, work)
    await until(lambda: "job shop.cancel was cancelled" in caplog.messages)


async def test_a_slow_job_neither_overlaps_itself_nor_delays_others(jobs):
    slow, other = [], []
    gate = asyncio.Event()

    async def wait():
        slow.append(1)
        await gate.wait()

    async def count():
        other.append(1)

    jobs.add("wait", 0.01, wait)
    jobs.add("count", 0.01, count)
    await until(lambda: slow and len(other) >= 5)
    assert len(slow) == 1
    gate.set()
    await until(lambda: len(slow) >= 2)


async def test_a_shorter_interval_applies_at_once(jobs):
    runs = []

    async def work():
        runs.append(1)

    jobs.add("rare", 3600, work)
    jobs.change("rare", 0.01)
    await until(lambda: len(runs) >= 3)


async def test_a_running_job_is_cancelled_at_the_stop_without_a_log_line(caplog):
    jobs = Jobs(SystemClock())
    begun, ended = asyncio.Event(), asyncio.Event()

    async def work():
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    jobs.add("endless", 0.01, work)
    jobs.start()
    await asyncio.wait_for(begun.wait(), 10)
    caplog.clear()
    jobs.stop()
    await asyncio.wait_for(ended.wait(), 10)
    await until(lambda: len(asyncio.all_tasks()) == 1)
    assert [record.getMessage() for record in caplog.records if record.levelno > logging.INFO] == []


@pytest.mark.parametrize("days", [1 / 24, -1 / 24, 1, -1, 173 * 365, -50 * 365])
async def test_a_clock_step_neither_stops_a_job_nor_repeats_missed_runs(monkeypatch, caplog, days):
    clock, runs = SteppedClock(monkeypatch), []

    async def work():
        runs.append(1)

    jobs = Jobs(clock)
    jobs.add("count", 0.05, work)
    jobs.start()
    try:
        await until(lambda: runs)
        before = len(runs)
        clock.by = timedelta(days=days)
        began = asyncio.get_running_loop().time()
        await until(lambda: len(runs) >= before + 5, seconds=5)
        went = asyncio.get_running_loop().time() - began
        assert len(runs) - before <= went / 0.05 + 3
    finally:
        jobs.stop()
    assert any(message.startswith("the machine's clock stepped by ") for message in caplog.messages)


async def test_every_job_runs_at_once_after_a_clock_step(monkeypatch):
    clock, runs = SteppedClock(monkeypatch), []

    async def work():
        runs.append(1)

    jobs = Jobs(clock)
    jobs.add("rare", 3600, work)
    jobs.start()
    try:
        clock.by = timedelta(hours=-1)
        await until(lambda: runs)
    finally:
        jobs.stop()
    assert len(runs) == 1


async def test_a_job_can_be_run_on_request_and_returns_its_history(jobs):
    runs = []

    async def work():
        runs.append(1)
        if len(runs) == 2:
            raise KeyError("nothing")

    jobs.add("count", 3600, work)
    assert (jobs.all()[0].runs, jobs.all()[0].started_at) == (0, None)
    past = await jobs.run("count")
    assert (past.runs, past.failures, past.error, past.running) == (1, 0, None, False)
    assert past.succeeded_at is not None
    past = await jobs.run("count")
    assert (past.runs, past.failures, past.error) == (2, 1, "KeyError: 'nothing'")
    assert jobs.next_run("count") - timedelta(seconds=3590) > datetime.now(UTC)


async def test_a_requested_run_waits_for_the_current_run(jobs):
    gate, busy, most = asyncio.Event(), [], []

    async def work():
        busy.append(1)
        most.append(len(busy))
        await gate.wait()
        busy.pop()

    jobs.add("slow", 0.01, work)
    await until(lambda: busy)
    asked = asyncio.create_task(jobs.run("slow"))
    await asyncio.sleep(0)
    assert jobs.all()[0].running
    gate.set()
    assert (await asked).runs >= 2
    assert max(most) == 1


async def test_a_requested_run_that_is_cancelled_counts_as_failed(jobs):
    begun = asyncio.Event()

    async def work():
        begun.set()
        await asyncio.Event().wait()

    jobs.add("slow", 3600, work)
    asked = asyncio.create_task(jobs.run("slow"))
    await begun.wait()
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked
    assert (jobs.all()[0].failures, jobs.all()[0].error) == (1, "cancelled")


async def test_an_unknown_job_is_refused_with_the_known_names(jobs):
    async def work():
        pass

    jobs.add("sweep", 3600, work)
    with pytest.raises(UnknownError) as raised:
        await jobs.run("swep")
    assert raised.value.message == 'unknown job "swep", did you mean "sweep"?'
    assert raised.value.hint == "jobs: sweep"
