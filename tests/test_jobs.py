"""Periodic work: it comes again whatever it does, one run at a time, and ends with the daemon."""

import asyncio
import logging

import pytest
from support import until

from relay.jobs import Jobs


@pytest.fixture
async def jobs():
    jobs = Jobs()
    jobs.start()
    yield jobs
    jobs.stop()


async def test_a_job_runs_again_and_again(jobs):
    runs = []

    async def work():
        runs.append(1)

    jobs.add("count", 0.01, work)
    await until(lambda: len(runs) >= 3)


async def test_a_job_that_fails_is_logged_and_runs_again(jobs, caplog):
    async def work():
        raise KeyError("nothing")

    jobs.add("shop.fail", 0.01, work)
    await until(lambda: len(caplog.records) >= 2)
    record = caplog.records[0]
    assert (record.name, record.getMessage()) == ("relay.jobs", "job shop.fail failed")
    assert record.exc_info[0] is KeyError


async def test_a_job_that_cancels_itself_is_logged_too(jobs, caplog):
    async def work():
        raise asyncio.CancelledError

    jobs.add("shop.cancel", 0.01, work)
    await until(lambda: "job shop.cancel was cancelled" in caplog.messages)


async def test_a_slow_job_does_not_overlap_itself_and_holds_up_no_other(jobs):
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


async def test_a_job_under_way_is_cancelled_with_the_daemon_without_a_word(caplog):
    jobs = Jobs()
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
