"""Time of every list of a large store: each filter, and pages at the beginning and near the end."""

import asyncio
import itertools
import re
import sqlite3
import statistics
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import aiosqlite
import asyncpg
import click
import msgspec

from bench.filling import END, fill, fill_served
from bench.postgres import Processes, server
from relay.api.views import list_items, show_delivery, show_event
from relay.model import Selection
from relay.store import StoredData
from relay.store.opening import offline_store
from relay.store.postgres.rows import first_id
from relay.store.sqlite.database import Database
from relay.store.sqlite.read_only import Reading, read_only

TARGET = 0.050
"""Seconds for one page."""

RUNS = 3  # of each query; the median counts
SHOWN = 5  # slowest queries that are printed with their plans

OPTIONS: Mapping[str, Mapping[str, Sequence[str]]] = {
    "events": {
        "source": ("shop", "till", "nobody"),
        "type": ("shop.t0", "till.*", "*.t3", "shop.none"),
        "subject": ("s-7", "busy", "nobody"),
        "since": ("2h", "10d"),
        "until": ("2h", "13d"),
        "destination": ("crm", "late", "nobody"),
        "state": ("delivered", "pending", "dead", "expired"),
    },
    "deliveries": {
        "source": ("shop", "till", "nobody"),
        "type": ("shop.t0", "till.*", "*.t3"),
        "subject": ("s-7", "busy", "nobody"),
        "since": ("2h", "10d"),
        "until": ("2h", "13d"),
        "destination": ("crm", "erp", "late", "nobody"),
        "state": ("delivered", "pending", "dead", "expired"),
    },
    "attempts": {
        "destination": ("crm", "late", "nobody"),
        "result": ("ok", "5xx", "tls"),
        "since": ("2h", "10d"),
        "until": ("2h", "13d"),
    },
}
"""Values of each filter that match many rows, few rows, the oldest rows or no row."""

WHERE = ('{"data.sale": true}', '{"data.total": {"gte": 99}, "data.sale": true}', '{"data.n": -1}')


class Traced:
    """A connection that remembers its statements."""

    def __init__(self, connection: aiosqlite.Connection) -> None:
        self._connection = connection
        self.statements: list[tuple[str, Any]] = []

    async def execute_fetchall(self, sql: str, values: Any = ()) -> Any:
        self.statements.append((sql, values))
        return await self._connection.execute_fetchall(sql, values)

    def execute(self, sql: str, values: Any = ()) -> Any:
        self.statements.append((sql, values))
        return self._connection.execute(sql, values)

    async def plans(self) -> dict[str, list[str]]:
        """Return the query plan of each remembered statement, and forget the statements."""
        statements, self.statements = self.statements, []
        return {
            re.sub(r"\?(, \?)+", "…", " ".join(sql.split())): [
                row[3] for row in await self._connection.execute_fetchall(f"EXPLAIN QUERY PLAN {sql}", values)
            ]
            for sql, values in statements
        }


class TracedStore(Reading):
    """Stored data on a connection that remembers its statements."""

    def __init__(self, traced: Traced) -> None:
        database = Database.reading(Path(), traced)  # type: ignore[arg-type]  # as a part uses it
        super().__init__(database)
        self.traced = traced

    async def list(self, kind: str, cursor: str | None, filters: Mapping[str, str]) -> dict[str, Any]:
        return await _items(self, kind, cursor, filters)


class ServedStore:
    """Stored data in PostgreSQL, on a server with the extension pg_stat_statements."""

    def __init__(self, stored: StoredData, processes: Processes, watching: "asyncpg.Connection[Any]") -> None:
        self.stored, self.processes, self._watching = stored, processes, watching

    async def list(self, kind: str, cursor: str | None, filters: Mapping[str, str]) -> dict[str, Any]:
        return await _items(self.stored, kind, cursor, filters)

    async def buffers(self) -> int:
        """Return how many pages of memory or disk the statements since the last call have read."""
        sql = "SELECT sum(shared_blks_hit + shared_blks_read)::bigint FROM pg_stat_statements"
        found = await self._watching.fetchval(sql)
        await self._watching.execute("SELECT pg_stat_statements_reset()")
        return int(found or 0)


async def _items(
    stored: StoredData, kind: str, cursor: str | None, filters: Mapping[str, str]
) -> dict[str, Any]:
    return await list_items(
        stored,
        kind,
        limit=50,
        cursor=cursor,
        filters=filters,
        now=END,
        sources=["shop", "till", "nobody"],
        destinations=["nobody"],
    )


@asynccontextmanager
async def open_traced(path: Path) -> AsyncIterator[TracedStore]:
    """Open a database file for reading."""
    async with aiosqlite.connect(read_only(path), uri=True) as connection:
        yield TracedStore(Traced(connection))


def filter_sets(kind: str) -> Iterator[dict[str, str]]:
    """Yield no filter, each value, each pair of values, and each set of three or more filters."""
    options = OPTIONS[kind]
    yield {}
    for name, values in options.items():
        yield from ({name: value} for value in values)
    for one, other in itertools.combinations(options, 2):
        for value, second in itertools.product(options[one], options[other]):
            yield {one: value, other: second}
    for count in range(3, len(options) + 1):
        for names in itertools.combinations(options, count):
            yield {name: options[name][0] for name in names}
            yield {name: options[name][-1] for name in names}


def faults(plan: Sequence[str]) -> list[str]:
    """Return the steps of a plan that scan or sort something that grows with the events."""
    few = ("CONSTANT ROW", "event_times", "ledger", "found", "given", "(subquery")
    return [
        step
        for step in plan
        if "TEMP B-TREE" in step or (step.startswith("SCAN ") and not step[5:].startswith(few))
    ]


class Figure(msgspec.Struct, frozen=True):
    """Measurement of one query."""

    seconds: float
    cpu: float  # seconds, of this process and the server
    buffers: int | None  # pages of memory or disk that were read; None: SQLite
    what: str
    rows: int
    more: bool
    plans: dict[str, list[str]]


async def measure(
    store: TracedStore | ServedStore, kind: str, cursor: str | None, filters: Mapping[str, str]
) -> Figure:
    """Run a query several times."""
    taken, used, buffers = [], [], []
    for _ in range(RUNS):
        if isinstance(store, TracedStore):
            store.traced.statements.clear()
        else:
            await store.buffers()
        cpu, began = _cpu(store), time.perf_counter()
        page = await store.list(kind, cursor, filters)
        taken.append(time.perf_counter() - began)
        used.append(_cpu(store) - cpu)
        if isinstance(store, ServedStore):
            buffers.append(await store.buffers())
    described = " ".join(f"{name}={value}" for name, value in filters.items()) or "all"
    what = f"{kind}: {described}{'' if cursor is None else ', deep'}"
    plans = await store.traced.plans() if isinstance(store, TracedStore) else {}
    return Figure(
        statistics.median(taken),
        statistics.median(used),
        max(buffers, default=None),
        what,
        len(page["items"]),
        page["next_cursor"] is not None,
        plans,
    )


def _cpu(store: TracedStore | ServedStore) -> float:
    return time.process_time() + (store.processes.cpu() if isinstance(store, ServedStore) else 0.0)


async def pages(store: TracedStore, kind: str, filters: Mapping[str, str]) -> tuple[int, int, float]:
    """Read a list to its end or for 50 rows; return the numbers of pages and rows, and the seconds."""
    began, count, rows, cursor = time.perf_counter(), 0, 0, None
    while True:
        page = await store.list(kind, cursor, filters)
        count, rows, cursor = count + 1, rows + len(page["items"]), page["next_cursor"]
        if cursor is None or rows >= 50:
            return count, rows, time.perf_counter() - began


def deep(kind: str, events: int) -> str:
    """Return a cursor near the end of a list."""
    return str(END - 13 * 86_400_000_000) if kind == "attempts" else str(events // 50)


async def run(path: Path, events: int) -> bool:
    """Measure every list; return whether all pages met the target."""
    figures: list[Figure] = []
    async with open_traced(path) as store:
        for kind in OPTIONS:
            found = [
                await measure(store, kind, cursor, filters)
                for filters in filter_sets(kind)
                for cursor in (None, deep(kind, events))
            ]
            _print_figures(kind, found)
            figures += found
        wrong = {sql: plan for each in figures for sql, plan in each.plans.items() if faults(plan)}
        for sql, plan in wrong.items():
            print(f"  scans or sorts a table: {sql}\n    {plan}")
        inside: list[Figure] = []
        for where, kind in itertools.product(WHERE, ("events", "deliveries")):
            inside.append(await measure(store, kind, None, {"where": where}))
            _print_figures(f"{kind} where {where}", inside[-1:])
        print("to the end of the list, or 50 rows:")
        unfinished = [each for each in figures if each.more and not each.rows and "deep" not in each.what]
        for each in unfinished[:SHOWN]:
            kind, _, described = each.what.partition(": ")
            filters = dict(part.split("=", 1) for part in described.split())
            count, rows, seconds = await pages(store, kind, filters)
            print(f"  {each.what}: {count} pages, {rows} rows, {seconds:.2f} s")
        await _others(store)
    return not wrong and all(each.seconds <= TARGET for each in figures + inside)


async def run_served(url: str, events: int) -> bool:
    """Fill a PostgreSQL database and measure its lists; return whether all pages met the target."""
    await fill_served(url, events)
    figures: list[Figure] = []
    processes = await Processes.of(url)
    watching = await asyncpg.connect(url)
    await watching.execute("CREATE EXTENSION pg_stat_statements")
    async with offline_store(url, Path()).read() as stored:
        store, early = ServedStore(stored, processes, watching), END - 13 * 86_400_000_000
        for kind in OPTIONS:
            cursors = (None, str(early if kind == "attempts" else first_id(early)))
            found = [
                await measure(store, kind, cursor, filters)
                for filters in filter_sets(kind)
                for cursor in cursors
            ]
            _print_figures(kind, found)
            print("  most pages of memory:")
            for each in sorted(found, key=lambda each: -(each.buffers or 0))[:SHOWN]:
                print(f"  {_described(each)}")
            figures += found
    await watching.close()
    return all(each.seconds <= TARGET for each in figures)


def _print_figures(what: str, figures: list[Figure]) -> None:
    ordered = sorted(figures, key=lambda each: -each.seconds)
    over = sum(each.seconds > TARGET for each in figures)
    middle = statistics.median(each.seconds for each in figures)
    cut = sum(each.more and each.rows < 50 for each in figures)
    times = f"median {middle * 1e3:.1f} ms, maximum {ordered[0].seconds * 1e3:.1f} ms"
    cpu = [each.cpu for each in figures]
    used = f"CPU median {statistics.median(cpu) * 1e3:.1f} ms, maximum {max(cpu) * 1e3:.1f} ms"
    print(f"{what}: {len(figures)} queries, {times}, {over} over {TARGET * 1e3:.0f} ms, {used},", end=" ")
    print(f"{cut} pages cut by their budget", flush=True)
    for each in ordered[: SHOWN if len(figures) > 1 else 0]:
        print(f"  {_described(each)}")
        for sql, plan in each.plans.items():
            print(f"             {sql[:150]}")
            for step in dict.fromkeys(plan):
                print(f"               {step}")


def _described(each: Figure) -> str:
    read = "" if each.buffers is None else f", {each.buffers:,} pages of memory"
    return f"{each.seconds * 1e3:6.1f} ms, CPU {each.cpu * 1e3:5.1f} ms{read}  {each.what}: {each.rows} rows"


async def _others(store: TracedStore) -> None:
    """Measure other queries of operators."""
    [(event, delivery)] = await store.traced.execute_fetchall(
        "SELECT (SELECT public_id FROM events ORDER BY id LIMIT 1),"
        " (SELECT public_id FROM deliveries ORDER BY id LIMIT 1)"
    )

    async def stats() -> Any:
        return [page async for page in store.queries.stats(Selection(since=END - 14 * 86_400_000_000))]

    for what, query in {
        "an event by a short id": lambda: show_event(store, event[:-1]),
        "a delivery by a short id": lambda: show_delivery(store, delivery[:-1]),
        "ledger totals of all destinations": store.ledger.totals,
        "counted pending deliveries (every 15 s)": store.ledger.audit,
        "backlog (every 15 s)": lambda: store.ledger.backlog(END),
        "latest of a destination": lambda: store.queries.find("deliveries", destination="late", limit=1),
        "span of the last two hours": lambda: store.queries.span(Selection(since=END - 7_200_000_000)),
        "stats of 14 days": stats,
    }.items():
        taken = []
        for _ in range(RUNS):
            began = time.perf_counter()
            await query()
            taken.append(time.perf_counter() - began)
        print(f"  {statistics.median(taken) * 1e3:6.1f} ms  {what}")


@click.command()
@click.option("--events", default=1_000_000, show_default=True, help="Events to store.")
@click.option(
    "--file",
    type=click.Path(path_type=Path),
    help="Database file: kept after the run, and used again if it exists.",
)
@click.option("--postgres", is_flag=True, help="Use a PostgreSQL server for this run, instead of SQLite.")
def main(events: int, file: Path | None, *, postgres: bool) -> None:
    """Fill a store and measure its lists."""
    if postgres:
        with server(None, "shared_preload_libraries=pg_stat_statements") as url:
            met = asyncio.run(run_served(url, events))
        print(f"target {TARGET * 1e3:.0f} ms per page: {'met' if met else 'missed'}")
        return
    with TemporaryDirectory(prefix="bench-") as name:
        path = file or Path(name) / "relay.db"
        if not path.exists():
            began = time.perf_counter()
            asyncio.run(fill(path, events))
            size = path.stat().st_size / 2**20
            print(f"filled in {time.perf_counter() - began:.0f} s, {size:,.0f} MiB", flush=True)
        with closing(sqlite3.connect(read_only(path), uri=True)) as database:
            found = [
                database.execute(f"SELECT max(id) FROM {table}").fetchone()[0]
                for table in ("events", "deliveries", "attempts")
            ]
        print("{:,} events, {:,} deliveries, {:,} attempts".format(*found), flush=True)
        met = asyncio.run(run(path, found[0]))
        print(f"target {TARGET * 1e3:.0f} ms per page: {'met' if met else 'missed'}")


if __name__ == "__main__":
    main()
