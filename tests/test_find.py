"""Lists by the time of receipt: exactly those, in their own order, without reading the rest."""

import pytest
from stores import make_event
from support import FakeClock

from relay.store import Acceptance
from relay.store.find import SPAN_SQL, list_sql
from relay.store.sqlite import SqliteStore

TIMES = (100, 300, 200, 400)
"""When events came in, in the order in which they were stored: the clock was put back once."""


@pytest.fixture
async def store(tmp_path):
    clock = FakeClock()
    store = SqliteStore(tmp_path / "relay.db", clock)
    store.route = lambda event: ()
    await store.open()
    for at in TIMES:
        event = make_event(clock, received_at=at)
        await store.append(Acceptance(source=event.source, event=event))
    yield store
    await store.close()


@pytest.mark.parametrize(
    ("filters", "found"),
    [
        ({}, [400, 200, 300, 100]),
        ({"since": 200}, [400, 200, 300]),
        ({"until": 300}, [200, 100]),
        ({"since": 300, "until": 301}, [300]),
        ({"since": 500}, []),
        ({"since": 101, "before": 4}, [200, 300]),
    ],
)
async def test_since_is_within_and_until_is_not(store, filters, found):
    assert [row["received_at"] for row in await store.find("events", **filters)] == found


async def plan(store, sql, values):
    rows = await store._reader.execute_fetchall(f"EXPLAIN QUERY PLAN {sql}", values)
    return [row[3] for row in rows]


async def test_a_time_is_looked_up_in_its_index(store):
    assert await plan(store, SPAN_SQL, (1, 2)) == [
        "SEARCH events USING COVERING INDEX events_received (received_at>? AND received_at<?)"
    ]


@pytest.mark.parametrize(
    ("filters", "index"),
    [
        ([], "INTEGER PRIMARY KEY (rowid>? AND rowid<?)"),
        (["e.source = ?"], "INDEX events_source (source=? AND id>? AND id<?)"),
        (["e.type = ?"], "INDEX events_type (type=? AND id>? AND id<?)"),
        (["e.subject = ?"], "INDEX events_subject (subject=? AND id>? AND id<?)"),
    ],
)
async def test_a_list_of_a_time_reads_only_its_span_and_sorts_nothing(store, filters, index):
    times = ["e.id BETWEEN ? AND ?", "+e.received_at >= ?", "+e.received_at < ?"]
    sql = list_sql("events", [*times, *filters])
    assert await plan(store, sql, (1,) * sql.count("?")) == [f"SEARCH e USING {index}"]
