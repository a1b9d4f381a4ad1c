"""Counts of events per source, type and hour."""

import asyncio

import pytest
from stores import accept, make_store, only_sqlite, rows
from support import FakeClock

from relay.base.clock import SECOND
from relay.errors import RelayError
from relay.model import Selection, Stat
from relay.store import HOUR
from relay.store.queries import selection
from relay.store.sqlite.queries import STATS_SQL


@pytest.fixture
def clock():
    clock = FakeClock()
    clock.now -= clock.now % HOUR  # a full hour
    return clock


@pytest.fixture
async def store(tmp_path, clock):
    store = make_store(tmp_path / "relay.db", clock)
    await store.open()
    yield store
    await store.close()


async def read(store, **fields):
    return [stat async for page in store.queries.stats(Selection(**fields)) for stat in page]


async def test_events_of_one_hour_share_a_row_that_later_batches_add_to(store, clock):
    begun = clock.wall()
    await asyncio.gather(*(store.events.append(accept(clock, body=b"12345")) for _ in range(300)))
    clock.advance(3599)
    await store.events.append(accept(clock, body=b"1"))
    clock.advance(1)
    await store.events.append(accept(clock, body=b"12"))
    assert await read(store) == [
        Stat(begun + HOUR, "shop", "shop.order", 1, 0, 2),
        Stat(begun, "shop", "shop.order", 301, 0, 1501),
    ]


async def test_a_duplicate_is_counted_as_one_and_adds_no_bytes(store, clock):
    for _ in range(3):
        await store.events.append(accept(clock, body=b"123", key="k"))
    [stat] = await read(store)
    assert (stat.events, stat.duplicates, stat.bytes) == (1, 2, 3)


async def test_an_event_that_could_not_be_stored_is_not_counted(store, clock):
    bad = accept(clock, content_type=None)
    results = await asyncio.gather(
        *(store.events.append(each) for each in (accept(clock), bad, accept(clock))), return_exceptions=True
    )
    assert [type(result).__name__ for result in results] == ["Receipt", "StorageError", "Receipt"]
    [stat] = await read(store)
    assert stat.events == 2


@pytest.mark.parametrize(
    ("fields", "types"),
    [
        ({}, ["till.paid", "shop.order", "shop.refund", "shop.order"]),
        ({"source": "till"}, ["till.paid"]),
        ({"type": "shop.order"}, ["shop.order", "shop.order"]),
        ({"type": "*.re*"}, ["shop.refund"]),
        ({"since": 2 * HOUR - 1}, ["till.paid", "shop.order"]),
        ({"since": HOUR + 5}, ["till.paid", "shop.order"]),
        ({"since": 2 * HOUR}, ["till.paid"]),
        ({"until": HOUR}, ["shop.refund", "shop.order"]),
    ],
)
async def test_the_latest_hour_comes_first_and_filters_apply(store, clock, monkeypatch, fields, types):
    monkeypatch.setattr(selection, "PAGE", 2)
    begun = clock.wall()
    for hour, type_ in ((0, "shop.order"), (0, "shop.refund"), (1, "shop.order"), (2, "till.paid")):
        clock.now = begun + hour * HOUR + 7 * SECOND
        await store.events.append(accept(clock, type=type_))
    times = {key: fields[key] + begun for key in ("since", "until") if key in fields}
    assert [stat.type for stat in await read(store, **fields | times)] == types


async def test_filters_other_than_source_type_and_time_are_refused(store):
    with pytest.raises(RelayError, match="counts exist per source, type and hour only"):
        await read(store, subject="a")


@only_sqlite("plans of its statements")
async def test_a_page_of_counts_scans_no_table(store):
    values = {"since": 0, "hour": 1, "source": "", "type": "", "page": 1}
    plan = await rows(store, f"EXPLAIN QUERY PLAN {STATS_SQL}", values)
    [step] = [row[3] for row in plan]
    assert step.startswith("SEARCH stats USING PRIMARY KEY (hour>?"), step
