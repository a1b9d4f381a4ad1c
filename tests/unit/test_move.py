"""All data moves from SQLite to PostgreSQL and back, unchanged; an interrupted move continues."""

import os
import sqlite3
import sys
from contextlib import closing

import pytest
from postgres import needs_postgres, server
from postgres_stores import run
from stores import accept, hooks, make_event, make_store, send

from relay.base.clock import SECOND
from relay.errors import RelayError, StorageError, StorageUnavailableError
from relay.model import (
    Attempt,
    Command,
    DestinationState,
    Grouping,
    Heartbeat,
    Outcome,
    Register,
    Selection,
    Target,
)
from relay.store import Acceptance, moving
from relay.store.opening import make_store as open_url
from relay.store.opening import move_of
from relay.store.postgres.moving import PostgresTarget

pytestmark = needs_postgres

TABLES = (*moving.LARGE, *moving.SMALL, "event_times")


def route(event):
    if event.source == "relay":
        return ()
    return (
        Target("crm", order_key=event.subject, ttl=3600 * SECOND),
        Target("erp", on_dead="crm"),
        Target("chat", grouping=Grouping("g", 60 * SECOND, 10)),
    )


async def fill(store, clock):
    """Store something in every table."""
    hooks(store).route = route
    store.news, fresh = [], []
    hooks(store).listener = lambda news: (store.news.append(news), fresh.extend(news.deliveries))
    await store.open()
    for number in range(12):
        clock.advance(1)
        await send(store, clock, key=f"k{number}", body=b"%d" % number, data=b"{}", subject=f"s{number % 2}")
    await store.events.append(accept(clock, key="k1", body=b"1", data=b"{}", subject="s1"))  # a repetition
    for number, delivery in enumerate(fresh):
        state = ("delivered", "dead", "pending", "expired")[number % 4]
        attempt = Attempt(
            started_at=clock.wall(), duration_ms=1.5, result="5xx", status=500, answer=b"\x00\xff"
        )
        due = clock.steady() + SECOND if state == "pending" else None
        reason = None if state in {"delivered", "pending"} else "ttl"
        await store.deliveries.settle(
            Outcome(delivery=delivery, attempt=attempt, state=state, next_attempt_at=due, reason=reason)
        )
    [event] = (await store.events.load([1])).values()
    await store.deliveries.repeat([(event, Target("erp"))])
    old = make_event(clock, received_at=clock.wall() - 86_400 * SECOND, subject="a\0b", traceparent="00-1")
    await store.events.restore([old])
    await store.deliveries.set_destination(
        DestinationState(name="erp", paused=True, failing_since=clock.steady())
    )
    await store.events.pause_source("till", paused=True)
    await store.deliveries.expire_held({"erp"}, 3600 * SECOND)
    for change in (Register(worker_id="w1", endpoint="http://w1"), Heartbeat(worker_id="w1", cpu=0.5)):
        await store.events.append(Acceptance(source="wa", change=change))
    command = Command(
        public_id="cmd_1", source="wa", worker_id="w1", body={"type": "restart"}, created_at=clock.wall(),
        expires_at=clock.steady() + 60 * SECOND,
    )  # fmt: skip
    await store.workers.change(lambda fleet: fleet.queue(command))
    await store.close()


@pytest.fixture
async def file(tmp_path, clock):
    path = tmp_path / "a" / "relay.db"
    path.parent.mkdir()
    await fill(make_store(path, clock, kind="sqlite"), clock)
    with closing(sqlite3.connect(path)) as database, database:
        sql = "INSERT INTO refused VALUES (NULL, ?, 5, 'shop', 'no_token', 9, NULL, NULL, x'7b7d', ?)"
        database.executemany(sql, [("ref_1", b"\x00"), ("ref_2", None)])
        sql = "INSERT INTO audit VALUES (NULL, 5, ?, 'token', '', 'POST', '/api', '', ?, 'req_1', 'a')"
        database.executemany(sql, [("olga", 200), ("on-call", None)])
    return path


@pytest.fixture
def url():
    name = f"moved_{os.getpid()}"
    server().run(f"CREATE DATABASE {name}")
    yield server().url(name)
    server().run(f"DROP DATABASE {name} WITH (FORCE)")


def dump(path):
    """Return all rows of each table."""
    with closing(sqlite3.connect(path)) as database:
        return {table: sorted(map(repr, database.execute(f"SELECT * FROM {table}"))) for table in TABLES}


async def move(source, target, folder):
    return [moved async for moved in move_of(source, target, folder).run()]


async def test_everything_arrives_and_comes_back_unchanged(file, url, tmp_path):
    steps = await move(f"sqlite:{file}", url, tmp_path)
    assert {step.table for step in steps} == {*moving.LARGE, *moving.SMALL}
    assert all(dump(file).values()), "every table has rows"
    with closing(sqlite3.connect(file)) as database:
        tables = {name for (name,) in database.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")}
    tables = {name for name in tables if not name.startswith("sqlite_")}
    assert tables - set(TABLES) == {"meta", "logins"}, "the others stay behind"
    (tmp_path / "b").mkdir()
    await move(url, "sqlite:b/relay.db", tmp_path)
    expected = {
        table: [row.replace("a\\x00b", "a\\\\u0000b") for row in found] for table, found in dump(file).items()
    }
    assert dump(tmp_path / "b" / "relay.db") == expected
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["relay.db", "relay.lock"]


async def test_a_cancellation_during_an_attempt_moves(file, url, tmp_path):
    await move(f"sqlite:{file}", url, tmp_path)
    await run(url, "UPDATE owed SET expires_at = 0", path="public")
    (tmp_path / "b").mkdir()
    await move(url, "sqlite:b/relay.db", tmp_path)
    with closing(sqlite3.connect(tmp_path / "b" / "relay.db")) as database:
        sql = "SELECT DISTINCT expires_at FROM deliveries WHERE state = 'pending'"
        assert database.execute(sql).fetchall() == [(0,)]


async def test_a_move_may_wait_for_a_slow_source(file, url, tmp_path, monkeypatch):
    write_all, limits = PostgresTarget.write_all, set()

    async def watch(target, table, rows, position):
        async def watched():
            limits.add(await target._connection.value("SHOW idle_in_transaction_session_timeout"))
            async for some in rows:
                yield some

        await write_all(target, table, watched(), position)

    monkeypatch.setattr(PostgresTarget, "write_all", watch)
    await move(f"sqlite:{file}", url, tmp_path)
    assert limits == {"0"}


async def claims(store):
    """Return the public ids of the deliveries that lanes would get now, with their groups."""
    found = {}
    for name in ("crm", "erp", "chat"):
        for retries in (False, True):
            claim = await store.deliveries.claim(name, 50, retries=retries, together=10)
            found[name, retries] = [[each.public_id for each in first.members] for first in claim.deliveries]
    assert sum(map(len, found.values())) > 5
    return found


async def test_the_relay_continues_with_the_moved_data(file, url, tmp_path, clock):
    await move(f"sqlite:{file}", url, tmp_path)
    clock.advance(2)
    source = make_store(file, clock, kind="sqlite")
    await source.open()
    expected = await claims(source)
    await source.close()
    store = open_url(url, tmp_path, clock)
    await store.open()
    try:
        before = await store.ledger.audit()
        assert sum(counts.pending for counts in before.values()) > 5
        assert not any(counts.unaccounted for counts in before.values())
        again = await store.events.append(accept(clock, key="k1", body=b"1", data=b"{}", subject="s1"))
        assert again.duplicate
        assert [worker.id for worker in store.workers.all()] == ["w1"]
        assert (await store.queries.destination_states())["erp"].paused
        assert await claims(store) == expected
        await store.events.append(accept(clock, body=b"new", data=b"{}"))
        found = await store.queries.find("events", limit=3)
        assert found[0]["received_at"] == clock.wall()
        imported = await store.queries.find("events", until=clock.wall() - 3600 * SECOND)
        assert [row["subject"] for row in imported] == ["a\\u0000b"]
        span = await store.queries.span(Selection())
        assert len([each async for page in store.queries.select(Selection(), span) for each in page]) == 15
    finally:
        await store.close()


@pytest.mark.parametrize("table", ["deliveries", "attempts", "stats"])
async def test_an_interrupted_move_continues(file, url, tmp_path, monkeypatch, table):
    monkeypatch.setattr(moving, "STEP", 5)
    steps = move_of(f"sqlite:{file}", url, tmp_path).run()
    async for moved in steps:
        if moved.table == table and (moved.rows or table in moving.SMALL):
            break
    await steps.aclose()
    with pytest.raises(StorageError, match="unfinished move"):
        await open_url(url, tmp_path, _clock()).open()
    with pytest.raises(StorageError, match="only a part of the data"):  # nor does it move on from there
        await move(url, "sqlite:c.db", tmp_path)
    mover = move_of(f"sqlite:{file}", url, tmp_path)
    assert [moved async for moved in mover.run()]
    assert mover.is_continued
    (tmp_path / "b").mkdir()
    steps = move_of(url, "sqlite:b/relay.db", tmp_path).run()
    async for moved in steps:
        if moved.table == table and (moved.rows or table in moving.SMALL):
            break
    await steps.aclose()
    with pytest.raises(StorageError, match="unfinished move") as caught:  # not an empty file of its own
        await open_url("sqlite:relay.db", tmp_path / "b", _clock()).open()
    assert "run the same `relay db move` again" in caught.value.hint
    assert not (tmp_path / "b" / "relay.db").exists()
    await move(url, "sqlite:b/relay.db", tmp_path)
    store = open_url("sqlite:relay.db", tmp_path / "b", _clock())
    await store.open()
    await store.close()
    assert [len(rows) for rows in dump(tmp_path / "b" / "relay.db").values()] == [
        len(rows) for rows in dump(file).values()
    ]


def _clock():
    from support import FakeClock  # noqa: PLC0415 - only here

    return FakeClock()


async def test_a_source_that_changed_since_is_not_mixed_with_the_moved_part(file, url, tmp_path, monkeypatch):
    monkeypatch.setattr(moving, "STEP", 5)
    steps = move_of(f"sqlite:{file}", url, tmp_path).run()
    async for moved in steps:
        if moved.rows:
            break
    await steps.aclose()
    with closing(sqlite3.connect(file)) as database, database:
        database.execute("DELETE FROM worker_metrics")
    with pytest.raises(StorageError, match="an earlier state of"):
        await move(f"sqlite:{file}", url, tmp_path)


async def test_a_target_with_data_is_refused(file, url, tmp_path):
    await move(f"sqlite:{file}", url, tmp_path)
    with pytest.raises(StorageError, match="already contains data"):
        await move(f"sqlite:{file}", url, tmp_path)
    with pytest.raises(StorageError, match="already exists"):
        await move(url, f"sqlite:{file}", tmp_path)


async def test_nothing_moves_while_a_daemon_uses_either_side(file, url, tmp_path, clock):
    store = open_url(url, tmp_path, clock)
    await store.open()
    try:
        with pytest.raises(StorageError, match="a daemon uses"):
            await move(f"sqlite:{file}", url, tmp_path)
        (tmp_path / "b").mkdir()
        with pytest.raises(StorageError, match="a daemon uses"):
            await move(url, "sqlite:b/relay.db", tmp_path)
    finally:
        await store.close()
    from relay.process.state_dir import StateDir  # noqa: PLC0415 - only here

    lock = StateDir(file.parent)
    lock.take()
    try:
        with pytest.raises(RelayError, match="in use by another relay daemon"):
            await move(f"sqlite:{file}", url, tmp_path)
    finally:
        lock.release()


async def test_lost_rows_are_noticed(file, url, tmp_path, monkeypatch):
    copy = moving.Move._small

    async def forgetful(self, table):
        async for rows in copy(self, table):
            yield rows[1:] if table == "dedupe" else rows

    monkeypatch.setattr(moving.Move, "_small", forgetful)
    with pytest.raises(StorageError, match="differs from the source: dedupe: 11 instead of 12"):
        await move(f"sqlite:{file}", url, tmp_path)


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    for name in ("asyncpg", "relay.store.postgres.connection"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "asyncpg", None)
    for urls in (("sqlite:relay.db", "postgresql://db/relay"), ("postgresql://db/relay", "sqlite:relay.db")):
        with pytest.raises(RelayError, match="needs the package asyncpg"):
            move_of(*urls, tmp_path)


async def test_both_sides_must_be_of_different_kinds_and_the_source_must_have_tables(file, url, tmp_path):
    for other in (url, f"sqlite:{file}"):
        with pytest.raises(RelayError, match="of the same kind"):
            await move(other, other, tmp_path)
    with pytest.raises(StorageError, match="nothing to move") as caught:
        await move(url, "sqlite:c.db", tmp_path)
    assert "FROM TO" in caught.value.hint


def test_a_missing_file_is_named(tmp_path):
    import asyncio  # noqa: PLC0415 - only here

    with pytest.raises(StorageError, match="no database at"):
        asyncio.run(move("sqlite:none.db", server().url("postgres"), tmp_path))


@pytest.mark.parametrize("cluster", [None, 30.0])
async def test_an_empty_database_is_not_used_until_the_data_is_moved(file, url, clock, cluster):
    store = open_url(url, file.parent, clock, cluster=cluster)
    for _ in range(2):  # the daemon repeats it
        with pytest.raises(StorageUnavailableError) as refused:
            await store.open()
    assert f"{file} has the events of this relay, with " in refused.value.message
    assert store.failure == refused.value.message
    with pytest.raises(StorageUnavailableError, match="relay db move"):
        await store.queries.find("events", limit=1)
    with pytest.raises(StorageUnavailableError, match="relay db move"):
        await store.events.append(accept(clock))
    await move(f"sqlite:{file}", url, file.parent)
    await store.open()
    assert await store.queries.find("events", limit=1)
    await store.close()


async def test_an_empty_database_is_used_if_the_former_one_is_renamed_or_has_no_events(file, url, clock):
    store = open_url(url, file.parent, clock)
    with pytest.raises(StorageUnavailableError):
        await store.open()
    file.rename(file.with_name("before.db"))
    fresh = make_store(file, clock, kind="sqlite")
    await fresh.open()
    await fresh.close()
    await store.open()
    await store.close()
