"""Retention drops whole days of PostgreSQL partitions, and keeps the events that must stay."""

import asyncio
import os
import random

import asyncpg
import pytest
from postgres import needs_postgres, server
from postgres_stores import FAULTS_SQL, run

from relay.base.clock import SECOND
from relay.config.schema import Retention, SourceRetention
from relay.errors import StorageError
from relay.store import pruning
from relay.store.opening import make_store
from relay.store.postgres import partitions, prune
from relay.store.postgres.connection import CALL_TIMEOUT, connect
from relay.store.postgres.partitions import make_partitions
from relay.store.postgres.prune import PostgresRetention
from relay.store.postgres.rows import first_id
from relay.store.retention_policy import Policy

pytestmark = needs_postgres

DAY = 86_400 * SECOND
RULES = {
    "wa": SourceRetention(events=7 * 86_400.0, types={"qr_*": 3600.0, "audit": 30 * 86_400.0}),
    "bank": SourceRetention(events=20 * 86_400.0),
}
POLICY = Policy(Retention(), RULES)
TYPES = ("shop.order", "shop.x", "wa.qr_ready", "wa.message", "wa.audit", "bank.paid")


@pytest.fixture
async def store(tmp_path, clock, monkeypatch):
    monkeypatch.setattr(pruning, "LONGEST_PAUSE", 0)
    clock.now -= clock.now % DAY
    name = f"retention_{os.getpid()}"
    server().run(f"CREATE DATABASE {name}")
    store = make_store(server().url(name), tmp_path, clock)
    await store.open()
    yield store
    await store.close()
    server().run(f"DROP DATABASE {name} WITH (FORCE)")


async def add(connection, number, at, kind, state, *, finished, later, early):
    """Write an event with one delivery, and return its row id."""
    event, delivery = first_id(at) + number * 256, first_id(at + later) + number * 256
    await connection.execute(
        "INSERT INTO events VALUES"
        " ($1, gen_random_uuid(), $2, $3, NULL, $4, '', NULL, '', 1, '', 0, 1, NULL, 'x')",
        event, kind.partition(".")[0], kind, at + early,
    )  # fmt: skip
    await connection.execute(
        "INSERT INTO deliveries (id, public_id, event_id, destination, created_at)"
        " VALUES ($1, gen_random_uuid(), $2, 'crm', $3)",
        delivery, event, at,
    )  # fmt: skip
    if state == "pending":
        await connection.execute(
            "INSERT INTO owed (id, public_id, event_id, destination, created_at, size)"
            " VALUES ($1, gen_random_uuid(), $2, 'crm', $3, 1)",
            delivery, event, at,
        )  # fmt: skip
    else:
        await connection.execute(
            "INSERT INTO ends VALUES ($1, $2, 'crm', $3, NULL, 1, $4, NULL, NULL)",
            delivery, event, state, finished,
        )  # fmt: skip
        await connection.execute(
            "INSERT INTO attempts VALUES ($1, $2, $3, 1, 'ok', 200, NULL, false, NULL, NULL, 'x')",
            first_id(finished + 5000) + number * 256, delivery, at,
        )  # fmt: skip
    if number % 5 == 0:
        await connection.execute("INSERT INTO repetitions VALUES ($1, 1)", event)
    return event


@pytest.mark.parametrize("is_big", [True, False])
async def test_only_events_that_are_old_enough_and_finished_disappear(store, clock, monkeypatch, is_big):
    monkeypatch.setattr(prune, "BIG", 0 if is_big else 2**60)
    url, begun, chance, stored = store.database.address.hosts[0].dsn, clock.now, random.Random(1), []
    connection = await connect(store.database.address, writes=True)
    await make_partitions(connection, begun, 23)
    for number in range(150):
        at = begun + number // 10 * DAY + chance.randrange(DAY)
        kind = chance.choice(TYPES)
        state = chance.choices(["delivered", "pending", "dead"], [8, 1, 1])[0]
        finished = at + chance.choice([1000, DAY // 3, 2 * DAY])
        later, early = chance.choice([0, 0, DAY // 2, 5 * DAY]), chance.choice([*[0] * 20, 3 * DAY, -3 * DAY])
        event = await add(connection, number, at, kind, state, finished=finished, later=later, early=early)
        stored.append((event, kind, at + early, state, finished))
    await connection.close()
    dropped = 0
    for day in (9, 16, 22, 36):
        clock.now = begun + day * DAY + DAY // 3
        await store.database.writer.call(store.make_partitions)
        pruned = await store.upkeep.prune(POLICY)
        left = {id_ for (id_,) in await run(url, "SELECT id FROM events", path="public")}
        needed = set()
        for event, kind, at, state, finished in stored:
            keep = POLICY.of(kind.partition(".")[0], kind)
            is_young = state == "dead" and finished > clock.now - keep.dead
            if at > clock.now - keep.events or state == "pending" or is_young:
                needed.add(event)
        due = clock.now - POLICY.default.events
        assert needed <= left, day
        assert all(event >= first_id(due - due % DAY) for event in left - needed), day  # of the day itself
        assert is_big or left == needed, day
        assert await run(url, FAULTS_SQL, path="public") == []
        orphans = "SELECT 1 FROM repetitions WHERE event_id NOT IN (SELECT id FROM events)"
        assert await run(url, orphans, path="public") == []
        assert await run(url, prune.LEFT_SQL, path="public") == []
        dropped += pruned.events
    assert dropped == len(stored) - len(left)


async def test_a_dump_that_reads_the_tables_delays_the_drop_of_a_day_and_no_sender(store, clock, monkeypatch):
    """Every statement would wait behind the lock that waits for the dump."""
    monkeypatch.setattr(prune, "BIG", 0)
    monkeypatch.setattr(partitions, "LOOKS_APART", 0.01)
    url, begun = store.database.address.hosts[0].dsn, clock.now
    connection = await connect(store.database.address, writes=True)
    await make_partitions(connection, begun, 1)
    for number in range(5):
        await add(connection, number, begun, "shop.x", "delivered", finished=begun, later=0, early=0)
    await connection.close()
    clock.now += 36 * DAY
    await store.database.writer.call(store.make_partitions)
    await run(url, "CREATE TABLE events_20200101_old (id bigint)", path="public")  # a pass was cut off
    dump = await asyncpg.connect(url)
    await dump.execute("BEGIN; SELECT 1 FROM events, attempts, events_20200101_old")
    async with asyncio.timeout(CALL_TIMEOUT / 2):
        pruned = await store.upkeep.prune(POLICY)
    assert (pruned.events, pruned.attempts, pruned.done) == (0, 0, True)
    assert len(await run(url, "SELECT id FROM events", path="public")) == 5
    assert store.failure is None
    await dump.close()
    assert (await store.upkeep.prune(POLICY)).events == 5
    assert await run(url, prune.LEFT_SQL, path="public") == []


async def test_a_node_that_was_suspended_in_a_pass_does_not_drop_rows_that_another_pass_keeps(
    store, clock, monkeypatch
):
    """It continues after the other pass has created its tables, and before that pass has copied rows."""
    monkeypatch.setattr(prune, "BIG", 0)
    url, begun = store.database.address.hosts[0].dsn, clock.now
    connection = await connect(store.database.address, writes=True)
    await make_partitions(connection, begun, 1)
    for number in range(20):
        state = "pending" if number < 5 else "delivered"
        await add(connection, number, begun, "shop.x", state, finished=begun, later=0, early=0)
    await connection.close()
    clock.now += 36 * DAY
    await store.database.writer.call(store.make_partitions)
    # A pass of the previous version was cut off.
    await run(url, "CREATE TABLE events_20200101_kept (id bigint)", path="public")
    frozen, other = (PostgresRetention(store.database, clock) for _ in range(2))
    paced, reached, made, ended = prune.paced, asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def step(writer, function):
        is_frozen, name = asyncio.current_task() is first, function.func.__name__
        if is_frozen and name == "_swap":
            reached.set()
            await made.wait()
        result = await paced(writer, function)
        if not is_frozen and name == "_make":
            made.set()
            await ended.wait()
        return result

    monkeypatch.setattr(prune, "paced", step)
    first = asyncio.create_task(frozen.prune(POLICY))
    await reached.wait()
    second = asyncio.create_task(other.prune(POLICY))
    with pytest.raises(StorageError, match="another node has taken over this pass"):
        await first
    assert store.failure is None  # senders are not refused
    ended.set()
    assert (await second).events == 15
    assert len(await run(url, "SELECT id FROM events", path="public")) == 5
    assert await run(url, "SELECT to_regclass('events_20200101_kept') IS NULL", path="public") == [(True,)]
    assert await run(url, FAULTS_SQL, path="public") == []
    assert await run(url, prune.LEFT_SQL, path="public") == []
