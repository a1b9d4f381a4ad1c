"""Stores for tests, and builders of events, acceptances and outcomes."""

import asyncio
import hashlib
import os
import sqlite3
import weakref
from contextlib import asynccontextmanager, closing, contextmanager
from functools import cache

import asyncpg
import pytest

from relay.base.ids import EVENT, new_id
from relay.model import Attempt, Outcome, StoredEvent, Target
from relay.store import Acceptance, opening
from relay.store.sqlite import connection as sqlite_connection
from relay.store.sqlite.schema import MIGRATIONS

KINDS = tuple(os.environ.get("RELAY_TEST_STORES", "sqlite").split(","))
"""Engines that the tests of the store's contract run against."""


def only_sqlite(reason):
    """Return the mark of tests about SQLite itself; a run on another engine skips and counts them."""
    return pytest.mark.skipif(KINDS[0] != "sqlite", reason=f"SQLite's own: {reason}")


_HOOKS = weakref.WeakKeyDictionary()


class Hooks:
    """The functions that a test's store calls. A test may change them at any time, unlike the daemon."""

    def __init__(self):
        self.route = opening.no_route
        self.resolve = opening.no_options
        self.rules = opening.default_rules
        self.listener = lambda _news: None

    def call_route(self, event):
        return self.route(event)

    def call_resolve(self, destination, event):
        return self.resolve(destination, event)

    def call_rules(self, source, worker_id):
        return self.rules(source, worker_id)

    def call_listener(self, news):
        self.listener(news)


def make_store(path, clock, *, kind=KINDS[0], on_fatal=lambda _why: None, **options):
    """Make a store of an engine; `hooks(store)` are the functions that it calls."""
    called = Hooks()
    store = opening.make_store(
        _url(kind, path, clock),
        path.parent,
        clock,
        route=called.call_route,
        resolve=called.call_resolve,
        rules=called.call_rules,
        listeners=[called.call_listener],
        on_fatal=on_fatal,
        **options,
    )
    _HOOKS[store] = called
    return store


def hooks(store):
    """Return the functions that a store of `make_store` calls."""
    return _HOOKS[store]


def _url(kind, path, clock):
    if kind != "postgres":
        return f"{kind}:{path.name}"
    from postgres_stores import url_of  # noqa: PLC0415 - needs asyncpg

    return url_of(path, clock)


def is_postgres(store):
    """Return whether a store is in PostgreSQL."""
    return hasattr(store.database, "address")


def create_from_template():
    """Let stores begin new SQLite files as copies of one that has all tables, which costs a tenth."""
    create = sqlite_connection._create

    def create_or_copy(path):
        is_new = not path.exists()
        create(path)
        if is_new:
            try:
                path.write_bytes(template())
            except OSError:  # a test fills the disk
                os.truncate(path, 0)

    sqlite_connection._create = create_or_copy


@cache
def template():
    """Return a database file as the relay creates it."""
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as database:
        database.execute("PRAGMA auto_vacuum = INCREMENTAL")
        database.executescript(f"{''.join(MIGRATIONS)} PRAGMA user_version = {len(MIGRATIONS)};")
        return database.serialize()


async def rows(store, sql, values=()):
    """Read rows behind the store's back, by SQL for SQLite's tables."""
    if is_postgres(store):
        from postgres_stores import run  # noqa: PLC0415 - needs asyncpg

        return await run(store.database.address.hosts[0].dsn, sql, values)
    return [tuple(row) for row in await store.database.reader.execute_fetchall(sql, values)]


def rows_of(config, sql):
    """Read rows of the daemon with a config.toml, which may be running; SQL as for `rows`."""
    if KINDS[0] == "postgres":
        from postgres_stores import read  # noqa: PLC0415 - needs asyncpg

        return read(config.parent, sql)
    reader = sqlite3.connect(f"file:{config.parent / 'state' / 'relay.db'}?mode=ro", uri=True)
    try:
        return reader.execute(sql).fetchall()
    finally:
        reader.close()


def faults_of(config, *, quick=False):
    """Check the data of the daemon with a config.toml; returns what is wrong. `quick`: not its indexes."""
    if KINDS[0] == "postgres":
        from postgres_stores import FAULTS_SQL  # noqa: PLC0415 - needs asyncpg

        return rows_of(config, FAULTS_SQL)
    check = "quick_check" if quick else "integrity_check"
    return [text for (text,) in rows_of(config, f"PRAGMA {check}") if text != "ok"]


async def change_rows(store, sql, values=()):
    """Change rows behind the store's back."""
    if is_postgres(store):
        from postgres_stores import run  # noqa: PLC0415 - needs asyncpg

        await run(store.database.address.hosts[0].dsn, sql, values, path="public")
    else:
        await store.database.connection.execute(sql, values)


async def set_pragma(store, text):
    """Set a PRAGMA on the connection of an SQLite store's writer."""
    await store.database.connection.execute(f"PRAGMA {text}")


async def watch_statements(store):
    """Return a list that gets each statement of the store from now on."""
    statements = []
    if is_postgres(store):
        for connection in (store.database.writer.connection, *store.database._idle):
            connection._raw.add_query_logger(lambda record: statements.append(record.query))
    else:
        for connection in (store.database.connection, store.database.reader):
            await connection.set_trace_callback(statements.append)
    return statements


async def refuse_writes(store, *, now):
    """Let the engine refuse the store's writes, as on a full disk, or accept them again."""
    if not is_postgres(store):
        await set_pragma(store, f"max_page_count = {1 if now else 1_000_000}")
        return
    if store.database.address.is_pooled:
        from postgres_stores import refuse_writes_through_pooler  # noqa: PLC0415 - needs asyncpg

        refuse_writes_through_pooler(store.database.address.hosts[0].dsn, now=now)
        return
    setting = f"SET default_transaction_read_only = {'on' if now else 'off'}"
    for _ in range(1000):  # a probe may be under way
        try:
            await store.database.writer.connection.execute(setting)
            break
        except asyncpg.InterfaceError:
            await asyncio.sleep(0.01)


@contextmanager
def locked_database(config):
    """Prevent daemons from opening the existing database of a config.toml."""
    if KINDS[0] == "postgres":
        from postgres_stores import closed  # noqa: PLC0415 - needs asyncpg

        with closed(config.parent):
            yield
        return
    with closing(sqlite3.connect(config.parent / "state" / "relay.db", isolation_level=None)) as other:
        other.execute("PRAGMA locking_mode = EXCLUSIVE")
        other.execute("BEGIN EXCLUSIVE")
        yield


def break_disk(store, patch):
    """Let each transaction fail as on a broken disk, until the patches are undone."""
    if is_postgres(store):
        connection = store.database.writer.connection

        async def broken(*_, **__):
            raise asyncpg.PostgresIOError("could not write to file")

        patch.setattr(connection, "fetch", broken)
        patch.setattr(connection, "execute", broken)
        return
    error = sqlite3.OperationalError("disk I/O error")
    error.sqlite_errorcode = sqlite3.SQLITE_IOERR

    async def fail(_statements):
        raise error

    async def fail_probe(sql, *_):
        if sql.startswith("BEGIN"):
            raise error

    patch.setattr(store.database.connection, "run", fail)
    patch.setattr(store.database.connection, "execute", fail_probe)


async def close_connections(store):
    """Close the connections of a store whose writer has failed."""
    if is_postgres(store):
        await store.database.writer.connection.close()
        await store.database.close()
        return
    for connection in (store.database.counter, store.database.reader, store.database.connection):
        await connection.close()


async def call_writer(store, function):
    """Run a function on the writer's connection, in turn with the store's transactions."""
    return await store.database.writer.call(function)


def queued(store):
    """Return the number of requests that wait for a commit."""
    return len(store.database.writer._jobs)


def fail_writes(store, why):
    """Let the store act as if writes failed for a reason; None: they work again."""
    store.database.writer._set_failure(why)


@asynccontextmanager
async def opened(path, clock):
    """Open a store with two destinations; at the end, check its ledger and its foreign keys."""
    store = make_store(path, clock)
    hooks(store).route = lambda event: () if event.source == "relay" else (Target("crm"), Target("erp"))
    store.fresh, store.news = [], []

    def listen(news):
        store.news.append(news)
        store.fresh.extend(news.deliveries)

    hooks(store).listener = listen
    await store.open()
    yield store
    for name, books in (await store.ledger.audit()).items():
        assert books.unaccounted == 0, name
    await check_rows(store)
    await store.close()


async def check_rows(store):
    """Check that every reference between stored rows is valid."""
    if is_postgres(store):
        from postgres_stores import FAULTS_SQL, run  # noqa: PLC0415 - needs asyncpg

        assert await run(store.database.address.hosts[0].dsn, FAULTS_SQL, path="public") == []
    else:
        assert await rows(store, "PRAGMA foreign_key_check") == []


def make_event(clock=None, body=b'{"n": 1}', **fields):
    """Build an event; without a clock, its id and time are fixed."""
    public_id, now = "evt_018bcfe5-6800-7000-8000-000000000001", 1_700_000_000_123_456
    if clock is not None:
        public_id, now = new_id(EVENT, clock.wall()), clock.wall()
    full_type = fields.get("type", "shop.order")
    return StoredEvent(
        **{
            "id": 0,
            "public_id": public_id,
            "source": full_type.partition(".")[0],
            "type": full_type,
            "subject": "a",
            "received_at": now,
            "data": body,
            "context": b"{}",
            "body": body,
            "content_type": "application/json",
            "sha256": hashlib.sha256(body).digest(),
            **fields,
        }
    )


def accept(clock, body=b'{"n": 1}', *, key=None, change=None, **fields):
    """Build the acceptance of one event."""
    event = make_event(clock, body, **fields)
    return Acceptance(source=event.source, event=event, key=key, change=change)


async def send(store, clock, *, key=None, **fields):
    """Append one event and return the stored event."""
    accepted = accept(clock, key=key, **fields)
    await store.events.append(accepted)
    event = accepted.event
    stored = (each for news in reversed(store.news) for each in news.events)
    return next((each for each in stored if each.public_id == event.public_id), event)


async def end(store, event, state="delivered", destination=None):
    """End the deliveries of an event, or only the one to `destination`."""
    for delivery in store.fresh:
        if delivery.event_id == event.id and destination in (None, delivery.destination):
            attempt = Attempt(started_at=event.received_at, duration_ms=1.0, result="ok", status=200)
            await store.deliveries.settle(Outcome(delivery=delivery, attempt=attempt, state=state))


async def ids(store, table="events"):
    """Return the row ids of all events, or of another table."""
    return [row[0] for row in await rows(store, f"SELECT id FROM {table} ORDER BY id")]


async def numbers(store, table="events"):
    """Return the number of each row, from 1, by its row id: engines give different ids in the same order."""
    return {id_: number for number, id_ in enumerate(await ids(store, table), 1)}


async def count_rows(store, table):
    [(count,)] = await rows(store, f"SELECT count(*) FROM {table}")
    return count
