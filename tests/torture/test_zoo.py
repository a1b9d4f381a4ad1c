"""Dozens of misbehaving receivers as destinations of one dispatcher, beside a healthy one."""

import asyncio
import tracemalloc
from collections import defaultdict

import pytest
from lanes import destination, dispatcher_for, send
from zoo import zoo

from relay.config.schema import RetryConfig

TIMEOUT = 2.0  # seconds: a busy machine stands still for one now and then
GRACE = 0.2  # seconds that an attempt may last beyond its timeout
EVENTS = 3  # for each animal
HEALTHY = 300
MOST_MEMORY = 32 * 2**20  # bytes, those of the receivers in the same process included


@pytest.fixture
async def animals(tmp_path):
    async with zoo(tmp_path) as animals:
        yield animals


@pytest.fixture
async def lags():
    """Collect the delays of the loop: receivers do not cause the machine's own delays."""
    lags, loop = [0.0], asyncio.get_running_loop()

    async def tick():
        while True:
            due = loop.time() + 0.01
            await asyncio.sleep(0.01)
            lags.append(loop.time() - due)

    ticking = asyncio.create_task(tick())
    yield lags
    ticking.cancel()


def cage(name, animal):
    return destination(
        name, animal.url, events=("shop.feed",), allow_private=not animal.guarded, concurrency=EVENTS,
        timeout=TIMEOUT, connect_timeout=TIMEOUT, retry=RetryConfig(schedule=(0.05,)),
    )  # fmt: skip


async def settled(store, dispatcher):
    """Wait until every destination has all its deliveries or is held, and return the ledger."""
    async with asyncio.timeout(60):
        while True:
            counts = await store.ledger.audit()
            lanes = dispatcher.lanes.values()
            if all(not lane.in_flight and (lane.held or not counts[lane.name].pending) for lane in lanes):
                return counts
            await asyncio.sleep(0.02)  # the store has no event to await


async def attempts(store):
    """Return (result, seconds) of every attempt, by destination."""
    found = defaultdict(list)
    names = {row["id"]: row["destination"] for row in await store.queries.find("deliveries", limit=10_000)}
    for row in await store.queries.find("attempts", limit=10_000):
        found[names[row["delivery_id"]]].append((row["result"], row["duration_ms"] / 1000))
    return found


async def test_beside_broken_receivers_every_attempt_ends_in_time_and_the_healthy_one_gets_everything(
    store, receiver, animals, lags, caplog
):
    assert len(animals) >= 30
    complaints = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    crm = destination("crm", receiver.url, events=("shop.order",))
    cages = [cage(name, animal) for name, animal in animals.items()]
    async with dispatcher_for(store, crm, *cages) as dispatcher:
        tracemalloc.start()
        try:
            before, _ = tracemalloc.get_traced_memory()
            for _ in range(EVENTS):
                await send(store, type_="shop.feed")
            sent = [await send(store) for _ in range(HEALTHY)]
            counts = await settled(store, dispatcher)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        held = {name for name, lane in dispatcher.lanes.items() if lane.held}
    assert sorted(receiver.ids) == sorted(sent)
    assert peak - before < MOST_MEMORY
    made = await attempts(store)
    late = sum(sorted(lags)[-5:])  # one attempt can meet several
    for name, animal in animals.items():
        assert {result for result, _ in made[name]} <= animal.results, name
        longest = max(seconds for _, seconds in made[name])
        assert longest < TIMEOUT + GRACE + late, name
        assert counts[name].created == EVENTS
        assert counts[name].unaccounted == 0
    assert held == {"is gone", "asks for centuries", "a private address", "loopback in IPv6"}
    assert complaints == [record for record in caplog.records if record.exc_info] == []
