"""A coroutine that begins at once continues like any task."""

import asyncio

import pytest

from relay.ingest.connection import begin


async def test_a_coroutine_that_never_waits_finishes_without_a_task():
    steps = []

    async def record():
        steps.append(asyncio.current_task())

    here = asyncio.all_tasks()
    assert begin(record()) is None
    assert steps == [asyncio.current_task()]  # the task that began it
    assert asyncio.all_tasks() == here


@pytest.mark.parametrize("is_done", [False, True], ids=["later", "meanwhile"])
async def test_a_coroutine_that_waits_continues_in_a_task(is_done):
    first, second, steps = asyncio.Event(), asyncio.Event(), []

    async def wait():
        steps.append("began")
        await first.wait()
        async with asyncio.timeout(30):  # which asks for the task that it is in
            await second.wait()
        steps.append(asyncio.current_task())

    task = begin(wait())
    assert steps == ["began"]
    first.set()
    if not is_done:
        await asyncio.sleep(0)
    second.set()
    await task
    assert steps == ["began", task]


async def test_a_failure_after_a_wait_is_raised_by_the_task():
    async def fail():
        await asyncio.sleep(0)
        raise LookupError("broken")

    task = begin(fail())
    with pytest.raises(LookupError, match="broken"):
        await task


async def test_a_failure_before_the_first_wait_is_raised_in_the_caller():
    async def fail():
        raise LookupError("broken")

    with pytest.raises(LookupError, match="broken"):
        begin(fail())


async def test_a_cancellation_is_raised_at_the_wait_and_may_be_suppressed():
    steps = []

    async def clean_up():
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            await asyncio.sleep(0)
            steps.append("cleaned up")
            raise

    task = begin(clean_up())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert steps == ["cleaned up"]


async def test_a_cancellation_before_the_first_step_of_the_task_is_raised_too():
    steps = []

    async def wait():
        try:
            await asyncio.Event().wait()
        finally:
            steps.append("ended")

    task = begin(wait())
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert steps == ["ended"]
