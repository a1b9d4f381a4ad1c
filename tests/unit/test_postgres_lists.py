"""Lists over PostgreSQL return exactly the matching rows in order, page by page."""

import itertools
import os

import msgspec
import pytest
from postgres import needs_postgres, server
from test_lists import expected, whole

from bench.filling import fill
from bench.lists import filter_sets
from relay.store.opening import move_of, offline_store
from relay.store.postgres import connection
from relay.store.postgres.connection import Database
from relay.store.queries import page as pages
from relay.store.queries import plan

pytestmark = needs_postgres

ROWS_SQL = """
    SELECT e.id, 'evt_' || e.public_id, e.source, e.type, e.subject, e.received_at, d.id,
           'dlv_' || d.public_id, d.destination, coalesce(x.state, 'pending')
      FROM events AS e JOIN deliveries AS d ON d.event_id = e.id LEFT JOIN ends AS x ON x.delivery_id = d.id
     ORDER BY e.id, d.id
"""


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """Fill an SQLite file, and move its data to a database."""
    import asyncio  # noqa: PLC0415 - a fixture of the module has no loop

    path, name = tmp_path_factory.mktemp("filled") / "relay.db", f"lists_{os.getpid()}"
    server().run(f"CREATE DATABASE {name}")
    url = server().url(name)

    async def make():
        await fill(path, 400)
        async for _ in move_of(f"sqlite:{path}", url, path.parent).run():
            pass

    asyncio.run(make())
    yield url
    server().run(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.mark.parametrize("kind", ["events", "deliveries"])
@pytest.mark.parametrize("small", [False, True])
async def test_queries_return_all_matching_rows_in_order(url, tmp_path, kind, small, monkeypatch):
    if small:  # pages end at their budget, and plans cannot sort in memory
        for name, value in {"MOST_CANDIDATES": 700, "STEP": 300}.items():
            monkeypatch.setattr(pages, name, value)
        few = {"PROBED": 20, "MOST_LISTED": 10, "MOST_TERMS": 6, "TYPES_AT_ONCE": 3, "TYPES_SECONDS": 60}
        for name, value in few.items():
            monkeypatch.setattr(plan, name, value)
    async with offline_store(url, tmp_path).read() as store:
        rows = await store.queries._reader._database.fetch(ROWS_SQL)
        for filters in itertools.islice(filter_sets(kind), small, None, 5):
            found = await whole(store, kind, filters, limit=37 if small else 500)
            assert found == expected(kind, filters, rows), filters


SMALL_TABLES = {"ledger"}  # a row per node and destination
PAGES = (
    ("events", {"state": "dead"}),
    ("events", {"state": "pending"}),
    ("events", {"destination": "crm", "state": "pending"}),
    ("events", {"subject": "busy", "destination": "crm"}),
    ("deliveries", {"state": "expired"}),
    ("deliveries", {"type": "*.t3", "state": "pending"}),
    ("deliveries", {"source": "shop", "state": "dead"}),
    ("attempts", {"result": "5xx"}),
    ("attempts", {"destination": "late"}),
)


def slow_steps(step):
    """Yield the steps of a plan that read a whole table, or look for each of several rows in a partition."""
    if step.get("Subplan Name") == "CTE late":  # along an index that is usually empty
        return
    if step["Node Type"] == "Seq Scan" and step["Relation Name"] not in SMALL_TABLES:
        yield step
    if "= ANY" in step.get("Index Cond", "") and not step["Index Name"].startswith("owed"):
        yield step
    for part in step.get("Plans", ()):
        yield from slow_steps(part)


async def test_no_list_reads_a_table_or_looks_for_each_row_in_every_partition(url, tmp_path, monkeypatch):
    fetch, found = Database.fetch, []

    async def explained(self, sql, *values):
        [(plan,)] = await fetch(self, f"EXPLAIN (FORMAT JSON) {sql}", *values)
        found.extend((sql, step) for step in slow_steps(msgspec.json.decode(plan)[0]["Plan"]))
        return await fetch(self, sql, *values)

    monkeypatch.setattr(Database, "fetch", explained)
    monkeypatch.setitem(connection.QUICK, "enable_seqscan", "off")  # as if all tables were large
    monkeypatch.setattr(plan, "MOST_LISTED", 10)
    async with offline_store(url, tmp_path).read() as store:
        for kind, filters in PAGES:
            await store.queries.page(kind, limit=50, **filters)
    assert found == []
