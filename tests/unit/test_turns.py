"""`relay.base.turns`: other tasks run during long work in the event loop."""

import asyncio
from time import perf_counter

from relay.base import turns
from relay.base.turns import Turns


async def test_other_tasks_run_during_long_work():
    longest = latest = 0.0

    async def other():
        nonlocal longest, latest
        while True:
            longest, latest = max(longest, perf_counter() - latest if latest else 0.0), perf_counter()
            await asyncio.sleep(0)

    task, given, until = asyncio.create_task(other()), Turns(), perf_counter() + 0.1
    while perf_counter() < until:
        step = perf_counter() + turns.SLICE / 5
        while perf_counter() < step:
            pass
        await given.give()
    task.cancel()
    assert 0 < longest < 0.1


async def test_short_work_is_not_interrupted():
    ran = []
    given = Turns()
    await given.give()
    asyncio.get_running_loop().call_soon(ran.append, True)
    given._until = perf_counter() + 60
    await given.give()
    assert ran == []
    given._until = 0.0
    await given.give()
    assert ran == [True]
