"""The store in PostgreSQL: behaviour that no other engine has, on a real server."""

import asyncio
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg
import msgspec
import pytest
from postgres import maybe_pooled, name_of, needs_postgres, not_pooled, server
from postgres_stores import emptied, run
from stores import accept, check_rows, fail_writes, hooks, ids, make_store, refuse_writes, rows
from support import until

from relay.base.clock import SECOND
from relay.errors import KeyConflict, StorageError, StorageUnavailableError
from relay.model import Attempt, Outcome, Register, Target
from relay.store import opening
from relay.store.postgres import connection as connection_module
from relay.store.postgres import partitions, schema, transaction
from relay.store.postgres import store as store_module
from relay.store.postgres.connection import connect
from relay.store.postgres.rows import first_id, micros_of
from relay.store.postgres.schema import MIGRATIONS, PARTITIONED

pytestmark = needs_postgres
DAY = 86_400


@pytest.fixture(autouse=True)
def databases():
    with emptied():
        yield


@pytest.fixture
async def store(tmp_path, clock):
    store = make_store(tmp_path / "relay.db", clock, kind="postgres")
    hooks(store).route = lambda event: () if event.source == "relay" else (Target("crm"),)
    store.fresh, store.news = [], []

    def listen(news):
        store.news.append(news)
        store.fresh.extend(news.deliveries)

    hooks(store).listener = listen
    await store.open()
    yield store
    if store.failure is None:
        for name, counts in (await store.ledger.audit()).items():
            assert counts.unaccounted == 0, name
            assert store.ledger.pending().get(name, 0) == counts.pending
        await check_rows(store)
    await store.close()


def ending(delivery, state="delivered", **fields):
    attempt = Attempt(started_at=1, duration_ms=1.0, result="ok", status=200)
    return Outcome(delivery=delivery, attempt=attempt, state=state, **fields)


def dsn_of(store):
    """Return the DSN of a store's database, without a pooler."""
    return server().url(name_of(store.database.address.hosts[0].dsn))


async def change(store, sql, *values):
    await run(dsn_of(store), sql, values, path="public")


def lose(store, monkeypatch, when):
    """Lose the connection at each statement that begins with a text; returns the list of these statements.

    With `when` "before", the server never gets the statement; with "after", only its answer is lost.
    """
    connection, lost = store.database.writer.connection, []
    original = connection._raw.fetch

    async def fetch(sql, *values, **options):
        if not sql.startswith("WITH new_events") and "new_events AS" not in sql:
            return await original(sql, *values, **options)
        lost.append(sql)
        if when == "after":
            await original(sql, *values, **options)
        connection._raw.terminate()
        raise asyncpg.ConnectionDoesNotExistError("the network is gone")

    monkeypatch.setattr(connection, "_raw", _Proxy(connection._raw, fetch))
    return lost


class _Proxy:
    """A connection of asyncpg with another `fetch`; its `execute` must not be used."""

    def __init__(self, raw, fetch):
        self._raw, self.fetch = raw, fetch

    def __getattr__(self, name):
        return getattr(self._raw, name)


# --- a lost connection --------------------------------------------------------------------------------


async def test_a_commit_whose_answer_is_lost_is_found_and_published(store, clock, monkeypatch):
    lost = lose(store, monkeypatch, "after")
    receipts = await asyncio.gather(
        *(store.events.append(accept(clock, b"{}", key=f"{n}")) for n in range(3))
    )
    assert len(lost) == 1
    assert [event.public_id for event in store.news[-1].events] == [r.event_id for r in receipts]
    assert len(await ids(store)) == len(store.fresh) == 3
    assert store.failure is None
    assert await store.deliveries.settle(ending(store.fresh[0])) is True


async def test_a_commit_that_the_server_never_got_is_refused_and_can_be_repeated(store, clock, monkeypatch):
    lose(store, monkeypatch, "before")
    with pytest.raises(StorageUnavailableError):
        await store.events.append(accept(clock, b"{}", key="k"))
    await until(lambda: store.failure is None)
    assert await ids(store) == []
    receipt = await store.events.append(accept(clock, b"{}", key="k"))
    assert not receipt.duplicate
    assert len(await ids(store)) == 1


async def test_an_outcome_whose_answer_is_lost_counts_once(store, clock, monkeypatch):
    await store.events.append(accept(clock, b"{}"))
    connection = store.database.writer.connection
    original = connection._raw.fetch

    async def fetch(sql, *values, **options):
        found = await original(sql, *values, **options)
        if "gone AS" in sql:
            connection._raw.terminate()
            raise TimeoutError
        return found

    monkeypatch.setattr(connection, "_raw", _Proxy(connection._raw, fetch))
    assert await store.deliveries.settle(ending(store.fresh[0])) is True
    assert await store.deliveries.settle(ending(store.fresh[0])) is False
    assert (await store.ledger.audit())["crm"].delivered == 1
    assert [len(news.outcomes) for news in store.news if news.outcomes] == [1]


@not_pooled("it hides which process of the server has a session")
async def test_the_writer_connects_again_and_wakes_the_lanes(store, clock):
    await store.events.append(accept(clock, b"{}"))
    await change(
        store,
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid = $1",
        store.database.writer.connection.pid,
    )
    with pytest.raises(StorageUnavailableError):
        await store.deliveries.claim("crm", 1, retries=False)
    await until(lambda: store.failure is None)
    assert store.news[-1].woken == {"crm"}
    await store.events.append(accept(clock, b"{}"))
    assert len(await ids(store)) == 2


async def test_a_read_only_server_stops_writes_until_it_accepts_them(store, clock):
    await refuse_writes(store, now=True)
    with pytest.raises(StorageUnavailableError, match="read-only"):
        await store.events.append(accept(clock, b"{}"))
    with pytest.raises(StorageUnavailableError):
        await store.events.append(accept(clock, b"{}"))
    await refuse_writes(store, now=False)
    await until(lambda: store.failure is None)
    await store.events.append(accept(clock, b"{}"))


@not_pooled("another transaction would get the session")
async def test_a_session_that_became_read_only_is_replaced(store, clock):
    """An operator may move writes to another host of the URL while the former primary still answers."""
    assert await store.database.value("SELECT 1") == 1
    [reader], former = store.database._idle, store.database.writer.connection
    await former.execute("SET default_transaction_read_only = on")
    with pytest.raises(StorageUnavailableError, match="read-only"):
        await store.events.append(accept(clock, b"{}"))
    await until(lambda: store.failure is None)
    await store.events.append(accept(clock, b"{}"))
    assert former.is_closed
    assert reader.is_closed  # it would read from the former primary


@not_pooled("another test would get the session")
async def test_transactions_do_not_follow_the_isolation_of_the_server(store):
    """A statement after a lock would not see the commits of others."""

    async def look(connection):
        await connection.execute("SET default_transaction_isolation = 'serializable'")
        async with connection.transaction():
            found = [await connection.value("SHOW transaction_isolation")]
        [row] = await transaction.Transaction(connection, "on").fetch("SHOW transaction_isolation")
        await connection.roll_back()
        await connection.execute("RESET default_transaction_isolation")
        return [*found, row[0]]

    assert await store.database.writer.call(look) == ["read committed"] * 2


async def test_a_reader_that_is_lent_while_the_writer_connects_again_is_not_used_again(store, clock):
    async with store.database.reader() as reader:
        (await store.connect()).terminate()
        assert await reader.value("SELECT 1") == 1
    assert reader.is_closed
    assert await store.database.value("SELECT 1") == 1


async def test_an_event_that_a_reader_does_not_see_is_read_by_the_writer(store, clock, monkeypatch):
    """Otherwise, its deliveries would be dead if a reader is at a server that lags behind."""
    await store.events.append(accept(clock, b"{}"))

    async def nothing(*_):
        return []

    monkeypatch.setattr(store.database, "fetch", nothing)
    [event] = store.news[-1].events
    assert await store.events.load((event.id, event.id + 1)) == {event.id: event}


async def test_a_call_that_takes_too_long_fails_and_closes_its_connection(store, clock):
    async with store.database.reader() as reader:
        with pytest.raises(TimeoutError):
            await reader.fetch("SELECT pg_sleep(30)", seconds=0.05)
        assert reader.is_closed
    assert await store.database.value("SELECT 1") == 1


async def test_a_server_that_is_not_there_is_reported_without_the_password(tmp_path, clock):
    store = opening.make_store("postgresql://relay:geheim@127.0.0.1:1/relay", tmp_path, clock)
    with pytest.raises(StorageUnavailableError) as caught:
        await store.open()
    assert "postgresql://127.0.0.1:1/relay" in str(caught.value)
    assert "geheim" not in str(caught.value)
    assert store.failure is not None
    with pytest.raises(StorageUnavailableError):
        await store.events.append(accept(clock, b"{}"))


# --- one daemon ---------------------------------------------------------------------------------------


async def test_a_second_daemon_is_refused_with_the_place_of_the_first(store, tmp_path, clock):
    (tmp_path / "other").mkdir()
    second = opening.make_store(maybe_pooled(dsn_of(store)), tmp_path / "other", clock)
    with pytest.raises(StorageError, match="another daemon uses this database") as caught:
        await second.open()
    assert not isinstance(caught.value, StorageUnavailableError)
    assert str(tmp_path) in caught.value.message
    await store.close()
    await second.open()
    await second.close()
    await store.open()


async def test_a_daemon_takes_over_from_a_killed_one_of_its_folder(store, tmp_path, clock):
    again = make_store(tmp_path / "relay.db", clock, kind="postgres")
    await again.open()  # without a stop of the first
    await again.events.append(accept(clock, b"{}"))
    await again.close()


async def test_a_daemon_whose_lease_was_taken_stops(tmp_path, clock):
    died = []
    store = make_store(tmp_path / "relay.db", clock, kind="postgres", on_fatal=died.append)
    await store.open()
    await change(store, "UPDATE leases SET incarnation = gen_random_uuid(), standing = '{}'")
    store.database.writer.connection.terminate()
    with pytest.raises(StorageUnavailableError):
        await store.events.append(accept(clock, b"{}"))
    await until(lambda: died)
    assert "another daemon uses this database" in died[0]
    await store.close()


# --- races of nodes -----------------------------------------------------------------------------------


async def test_a_key_that_another_node_stores_meanwhile_is_found(store, clock, monkeypatch):
    first = accept(clock, b"{}", key="k")
    original = store._committer.write

    async def write(transaction, batch):
        monkeypatch.setattr(store._committer, "write", original)
        await change(
            store,
            "INSERT INTO dedupe SELECT 'shop', 'k', identity, '018bcfe5-6800-7000-8000-00000000000a', $2"
            "  FROM unnest($1::bytea[]) AS k (identity)",
            [key[2] for key in batch.keys.new],
            clock.steady() + SECOND,
        )
        await original(transaction, batch)

    monkeypatch.setattr(store._committer, "write", write)
    receipt = await store.events.append(first)
    assert (receipt.event_id, receipt.duplicate) == ("evt_018bcfe5-6800-7000-8000-00000000000a", True)
    assert await ids(store) == []


async def test_different_requests_of_two_nodes_cannot_share_a_key_that_allows_one(store, clock, monkeypatch):
    mine = accept(clock, b"{}", key="k")
    mine.rejects_conflict = True
    original = store._committer.write

    async def write(transaction, batch):
        monkeypatch.setattr(store._committer, "write", original)
        values = b"", "018bcfe5-6800-7000-8000-00000000000a", clock.steady() + SECOND
        await change(store, "INSERT INTO dedupe VALUES ('shop', 'k', $1, $2, $3)", *values)
        await original(transaction, batch)

    monkeypatch.setattr(store._committer, "write", write)
    with pytest.raises(KeyConflict):
        await store.events.append(mine)
    assert await ids(store) == []


async def test_an_outcome_with_another_number_of_attempts_is_refused(store, clock):
    await store.events.append(accept(clock, b"{}"))
    late = msgspec.structs.replace(store.fresh[0])
    await store.deliveries.settle(ending(store.fresh[0], "pending", next_attempt_at=clock.steady()))
    assert await store.deliveries.settle(ending(late)) is False
    [claimed] = (await store.deliveries.claim("crm", 1, retries=True)).deliveries
    assert await store.deliveries.settle(ending(claimed)) is True
    assert await rows(store, "SELECT state, attempts FROM deliveries") == [("delivered", 2)]


async def test_a_delivery_that_is_inserted_behind_an_ending_one_of_its_key_becomes_due(store, clock):
    """Another node adds a delivery of the key, while the end of its head is being written."""
    hooks(store).route = lambda _event: (Target("crm", order_key="a"),)
    await store.events.append(accept(clock, b"{}"))
    [head] = store.fresh
    other = await asyncpg.connect(dsn_of(store))
    try:
        begun = other.transaction()
        await begun.start()
        await other.execute(
            "UPDATE order_keys SET pending = pending + 1 WHERE destination = 'crm' AND order_key = 'a'"
        )
        settling = asyncio.ensure_future(store.deliveries.settle(ending(head)))
        waits = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
        async with asyncio.timeout(30):
            while not await other.fetchval(waits):  # noqa: ASYNC110 - the server knows, and nobody else
                await asyncio.sleep(0.01)
        for table, columns in (("deliveries", "created_at"), ("owed", "created_at, size, order_key")):
            values = "1" if table == "deliveries" else "1, 2, 'a'"
            await other.execute(
                f"INSERT INTO {table} (id, public_id, event_id, destination, {columns})"
                f" VALUES ({head.id + 1}, gen_random_uuid(), {head.event_id}, 'crm', {values})"
            )
        await other.execute("INSERT INTO ledger VALUES (1, 'crm', 1, 0, 0, 0, 0)")
        await begun.commit()
        assert await settling is True
    finally:
        await other.close()
    [follower] = (await store.deliveries.claim("crm", 9, retries=False)).deliveries
    assert follower.id == head.id + 1
    assert store.news[-1].woken == {"crm"}
    await store.deliveries.settle(ending(follower))
    store.ledger.pending_counts["crm"] += 1  # counted by the other node
    assert await rows(store, "SELECT count(*) FROM order_keys") == [(0,)]


# --- ids, partitions, texts ---------------------------------------------------------------------------


async def test_row_ids_carry_the_time_and_never_go_back(store, clock):
    await store.events.append(accept(clock, b"{}"))
    clock.advance(-3600)
    await store.events.append(accept(clock, b"{}"))
    clock.advance(7200)
    await store.events.append(accept(clock, b"{}"))
    first, second, third = await ids(store)
    assert first < second < third
    assert second - first < first_id(micros_of(first) + SECOND) - first_id(micros_of(first))
    assert micros_of(third) == clock.wall() // 1000 * 1000
    assert await ids(store, "deliveries") == sorted(await ids(store, "deliveries"))


async def test_ids_continue_above_the_stored_ones_after_a_restart(store, clock):
    await store.events.append(accept(clock, b"{}"))
    await store.close()
    clock.advance(-3600)
    await store.open()
    await store.events.append(accept(clock, b"{}"))
    first, second = await ids(store)
    assert first < second


async def test_a_missing_partition_is_made_and_the_batch_written_again(store, clock):
    clock.advance(30 * DAY)
    receipts = await asyncio.gather(*(store.events.append(accept(clock, b"{}")) for _ in range(3)))
    assert len({receipt.event_id for receipt in receipts}) == len(await ids(store)) == 3
    assert store.failure is None
    day = "20231214"
    names = await rows(
        store, "SELECT relname FROM pg_class WHERE relkind = 'r' AND relname LIKE '%' || ?", (day,)
    )
    assert {name for (name,) in names} == {f"{table}_{day}" for table in PARTITIONED}


async def test_a_missing_partition_that_cannot_be_made_yet_stops_no_daemon(store, clock, monkeypatch):
    clock.advance(60 * DAY)
    make = store.make_partitions

    async def fail_once(connection):
        monkeypatch.setattr(store, "make_partitions", make)
        raise asyncpg.LockNotAvailableError("canceling statement due to lock timeout")

    monkeypatch.setattr(store, "make_partitions", fail_once)
    with pytest.raises(StorageUnavailableError):
        await store.events.append(accept(clock, b"{}"))
    await until(lambda: store.failure is None)
    await store.events.append(accept(clock, b"{}"))
    assert len(await ids(store)) == 1


async def test_partitions_are_made_ahead_once(store, clock):
    day = clock.wall() + 5000 * 86_400 * SECOND  # that other tests in this database have not reached
    counts = [
        await store.database.writer.call(lambda c, days=days: partitions.make_partitions(c, day, days))
        for days in (1, 3, 3)
    ]
    assert counts == [8, 8, 0]


async def test_texts_with_nul_are_stored_with_its_escape(store, clock):
    sent = accept(clock, b"{}", key="a\0b", subject="x\0y", change=Register(worker_id="w\0 1"))
    await store.events.append(sent)
    assert (await store.events.append(sent)).duplicate
    assert await rows(store, "SELECT subject FROM events WHERE source = 'shop' AND subject LIKE 'x%'") == [
        ("x\\u0000y",)
    ]
    failed = Attempt(started_at=1, duration_ms=1.0, result="5xx", status=500, error="a\0b")
    await store.deliveries.settle(Outcome(delivery=store.fresh[0], attempt=failed, state="dead", reason="x"))
    assert [worker.id for worker in store.workers.all()] == ["w\0 1"]
    await store.close()
    await store.open()
    assert [worker.id for worker in store.workers.all()] == ["w\0 1"]
    [found] = await store.queries.find("events", subject="x\0y")
    assert found["id"] == sent.event.public_id
    assert len(await store.queries.find("events", where=None, source="shop", type="shop.\0*")) == 0
    assert await store.queries.find("worker_metrics", source="shop", worker_id="w\0 2") == []


async def test_an_ordinary_batch_is_one_statement_without_begin_and_commit(store, clock, monkeypatch):
    seen = []
    connection = store.database.writer.connection
    original = connection._raw.fetch

    async def fetch(sql, *values, **options):
        seen.append(sql.split()[0])
        return await original(sql, *values, **options)

    monkeypatch.setattr(connection, "_raw", _Proxy(connection._raw, fetch))
    await store.events.append(accept(clock, b"{}"))
    before = [store.fresh[0]]
    await asyncio.gather(
        *(store.events.append(accept(clock, b"{}")) for _ in range(20)),
        store.deliveries.settle(ending(before[0])),
    )
    assert set(seen) == {"WITH"}
    assert len(seen) <= 4


async def test_every_transaction_sets_its_durability(tmp_path, clock, monkeypatch):
    seen = []
    original = transaction._text
    monkeypatch.setattr(transaction, "_text", lambda *parts: seen.append(original(*parts)) or seen[-1])
    store = make_store(tmp_path / "relay.db", clock, kind="postgres", durability="normal")
    await store.open()
    await store.events.append(accept(clock, b"{}"))
    await store.close()
    assert seen
    assert all("set_config('synchronous_commit', $1, true)" in sql for sql in seen)


async def test_a_claim_reads_on_where_the_last_one_ended(store, clock):
    for _ in range(6):
        await store.events.append(accept(clock, b"{}"))
        clock.advance(10)
    store.deliveries.release([d.id for d in store.fresh])
    first = (await store.deliveries.claim("crm", 2, retries=False)).deliveries
    cursor, _ = store.deliveries._cursors["crm", False]
    assert cursor == clock.steady() - 50 * SECOND - 1
    store.deliveries.release([first[0].id])
    again = (await store.deliveries.claim("crm", 2, retries=False)).deliveries
    assert [d.id for d in again] == [first[0].id, store.fresh[2].id]
    rest = await store.deliveries.claim("crm", 9, retries=False)
    assert [d.id for d in rest.deliveries] == [d.id for d in store.fresh[3:]]
    assert rest.next_due is None


async def test_a_released_delivery_moves_the_cursor_back_only_if_a_claim_has_passed_it(store, clock):
    async def claim(limit=9):
        return [d.id for d in (await store.deliveries.claim("crm", limit, retries=False)).deliveries]

    for _ in range(3):
        await store.events.append(accept(clock, b"{}"))
        clock.advance(10)
    first, second, third = [d.id for d in store.fresh]
    store.deliveries.release([second, third])
    assert await claim() == [second, third]  # past the first one, which is claimed
    cursor = store.deliveries._cursors["crm", False]
    await store.events.append(accept(clock, b"{}"))
    fresh = store.fresh[-1].id
    store.deliveries.release([fresh])
    assert store.deliveries._cursors["crm", False] == cursor
    assert await claim() == [fresh]
    clock.advance(60)
    assert await claim() == []
    store.deliveries.release([first, third])
    assert await claim(1) == [first]
    assert await claim() == [third]


# --- upgrades and foreign data ------------------------------------------------------------------------


@asynccontextmanager
async def tables_of(store, **meta):
    """Close a store, set its versions, and restore them at the end."""
    await store.close()
    for name, value in meta.items():
        row = f"('{name}', '{value}') ON CONFLICT (name) DO UPDATE SET value = '{value}'"
        await change(store, f"INSERT INTO meta VALUES {row}")
    try:
        yield
    finally:
        await change(store, f"UPDATE meta SET value = '{len(MIGRATIONS)}' WHERE name = 'version'")
        await change(store, "DELETE FROM meta WHERE name IN ('least', 'program')")


async def test_tables_that_need_a_newer_program_are_refused_with_its_version(store, clock):
    async with tables_of(store, version=99, least=98, program="7.1.0"):
        with pytest.raises(StorageError, match=r"version 99 and need .* 98; this one knows \d") as caught:
            await store.open()
        assert caught.value.hint == "run hookferry 7.1.0, which migrated it, or a newer version"
        offline = opening.offline_store(maybe_pooled(dsn_of(store)), Path())
        with pytest.raises(StorageError, match="need a program that knows version 98"):
            async with offline.read():
                pass
    await store.open()


async def test_a_program_uses_tables_that_a_newer_one_has_only_added_to(store, clock):
    """During a rolling upgrade, a node of the previous version may start again."""
    await change(store, "ALTER TABLE events ADD COLUMN newer text")
    try:
        async with tables_of(store, version=len(MIGRATIONS) + 1, least=len(MIGRATIONS)):
            await store.open()
            await store.events.append(accept(clock, b"{}"))
            [check] = [check for check in await store.upkeep.examine() if check.name == "version"]
            assert check.ok
            assert "of a newer version" in check.detail
            await store.close()
            [(version,)] = await rows(store, "SELECT value FROM meta WHERE name = 'version'")
            assert version == str(len(MIGRATIONS) + 1)  # an older program does not set it back
    finally:
        await change(store, "ALTER TABLE events DROP COLUMN newer")
    await store.open()


def test_a_program_refuses_tables_of_a_version_that_is_too_old(monkeypatch):
    monkeypatch.setattr(schema, "MIGRATIONS", ("",) * 5)
    monkeypatch.setattr(schema, "REMOVALS", {5: 4})
    assert schema.problem_of(4, 1) is None  # the removal has not run yet
    assert schema.problem_of(6, 5) is None
    assert schema.problem_of(3, 1) == "its tables have schema version 3, this program needs 4"
    assert schema.problem_of(7, 6) is not None


async def test_a_migration_gives_way_to_a_statement_that_waits_for_it(store, clock, monkeypatch):
    """Otherwise the server ends one of them, as a deadlock."""
    newer = "ALTER TABLE events ADD COLUMN newer text; ALTER TABLE owed ADD COLUMN newer text;"
    await store.close()
    for module in (schema, store_module):
        monkeypatch.setattr(module, "MIGRATIONS", (*MIGRATIONS, newer))
    other = await asyncpg.connect(dsn_of(store))
    connection = await connect(store.database.address, writes=True)
    try:
        begun = other.transaction()
        await begun.start()
        await other.execute("DELETE FROM owed")  # like a statement that then reads another table
        migrating = asyncio.create_task(store._migrate(connection))
        waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'owed'::regclass"
        async with asyncio.timeout(30):
            while not await other.fetchval(waiting):  # noqa: ASYNC110 - only the server knows
                await asyncio.sleep(0.01)
        await other.execute("SELECT count(*) FROM events")
        assert not migrating.done()
        await begun.commit()
        await asyncio.wait_for(migrating, 30)
    finally:
        await other.execute("ALTER TABLE events DROP COLUMN newer; ALTER TABLE owed DROP COLUMN newer")
        await other.close()
        await connection.close()
        await change(store, f"UPDATE meta SET value = '{len(MIGRATIONS)}' WHERE name = 'version'")
        await change(store, "DELETE FROM meta WHERE name IN ('least', 'program')")
    monkeypatch.undo()
    await store.open()


async def test_a_migration_that_removes_something_waits_for_nodes_of_older_versions(
    store, clock, monkeypatch
):
    known, newer = len(MIGRATIONS), (*MIGRATIONS, "ALTER TABLE refused RENAME COLUMN retried_at TO again_at")
    await store.close()
    for module in (schema, store_module):
        monkeypatch.setattr(module, "MIGRATIONS", newer)
    monkeypatch.setitem(schema.REMOVALS, known + 1, known + 1)
    await change(
        store,
        "INSERT INTO nodes (incarnation, slot, name, version, schema, started, seen)"
        f" VALUES (gen_random_uuid(), 9, 'old', '1.0', {known}, clock_timestamp(), clock_timestamp())",
    )
    versions = "SELECT name, value FROM meta WHERE name IN ('version', 'least') ORDER BY name"
    try:
        connection = await connect(store.database.address, writes=True)
        await store._migrate(connection)
        assert dict(await rows(store, versions)).get("version") == str(known)
        await change(store, "DELETE FROM nodes")
        await store._migrate(connection)
        assert dict(await rows(store, versions)) == {"least": str(known + 1), "version": str(known + 1)}
    finally:
        await connection.close()
        await change(store, "ALTER TABLE refused RENAME COLUMN again_at TO retried_at")
        await change(store, f"UPDATE meta SET value = '{known}' WHERE name = 'version'")
        await change(store, "DELETE FROM meta WHERE name IN ('least', 'program')")
    monkeypatch.undo()
    await store.open()


async def test_a_migration_waits_for_a_dump_without_delaying_other_nodes(store, clock, monkeypatch):
    monkeypatch.setattr(partitions, "LOOKS_APART", 0.01)
    await store.close()
    for module in (schema, store_module):
        monkeypatch.setattr(module, "MIGRATIONS", (*MIGRATIONS, "SELECT 1"))
    dump = await asyncpg.connect(dsn_of(store))
    await dump.execute("BEGIN; SELECT 1 FROM events")
    with pytest.raises(StorageUnavailableError, match="the migration waits for another program"):
        await store.open()
    assert store.failure is not None
    await dump.close()
    await store.open()
    await change(store, f"UPDATE meta SET value = '{len(MIGRATIONS)}' WHERE name = 'version'")
    await change(store, "DELETE FROM meta WHERE name IN ('least', 'program')")


async def test_a_closed_store_leaves_no_connection_to_close(store):
    async with store.database.reader() as reader:
        with pytest.raises(TimeoutError):
            await reader.fetch("SELECT pg_sleep(60)", seconds=0.01)
    assert connection_module._closing
    await store.close()
    assert not connection_module._closing
    await store.open()


async def test_a_failure_names_the_database_in_one_line(store):
    fail_writes(store, "No space left on device\nHINT:  Check free disk space.")
    assert store.failure == f"{store.location}: No space left on device HINT: Check free disk space."
    fail_writes(store, None)
    assert store.failure is None


async def test_a_node_that_cannot_join_says_why_it_refuses_senders(tmp_path, clock, monkeypatch):
    """Otherwise a load balancer would use it."""
    store = make_store(tmp_path / "relay.db", clock, kind="postgres", cluster=30.0)

    async def fail():
        raise StorageUnavailableError("no answer within 5 s")

    monkeypatch.setattr(store.nodes, "join", fail)
    with pytest.raises(StorageUnavailableError):
        await store.open()
    assert store.failure == "no answer within 5 s"
    with pytest.raises(StorageUnavailableError, match="no answer within 5 s"):
        await store.events.append(accept(clock))


async def test_a_migration_gives_up_soon_if_a_table_is_locked(store, clock, monkeypatch):
    """All other statements on the table would wait behind it."""
    for module in (schema, store_module):
        monkeypatch.setattr(module, "MIGRATIONS", (*MIGRATIONS, "ALTER TABLE owed ADD COLUMN newer integer"))
    monkeypatch.setattr(store_module, "TABLE_PATIENCE", "100ms")
    monkeypatch.setattr(store_module, "TABLES_FOR", 0.0)
    other = await asyncpg.connect(dsn_of(store))
    connection = await connect(store.database.address, writes=True)
    try:
        async with other.transaction():
            await other.fetch("SELECT * FROM owed")
            with pytest.raises(asyncpg.LockNotAvailableError):
                await store._migrate(connection)
    finally:
        await other.close()
        await connection.close()
    assert await rows(store, "SELECT value FROM meta WHERE name = 'version'") == [(str(len(MIGRATIONS)),)]
