"""Calls on the writing connection fail as the transactions of requests do."""

import asyncio
import sqlite3

import pytest
from stores import accept, call_writer, hooks, make_store, only_sqlite, set_pragma
from support import FakeClock, until

from relay.errors import StorageUnavailableError


@pytest.fixture
async def died():
    return []


@pytest.fixture
async def store(tmp_path, died):
    store = make_store(tmp_path / "relay.db", FakeClock(), on_fatal=died.append)
    await store.open()
    yield store
    await store.close()


@only_sqlite("its errors")
async def test_a_full_disk_fails_a_call_and_leaves_no_transaction_open(store, died):
    async def fill(connection):
        await connection.execute("BEGIN IMMEDIATE")
        await connection.execute("INSERT INTO meta (name, value) VALUES ('x', ?)", ("x" * 100_000,))

    await set_pragma(store, "max_page_count = 1")
    with pytest.raises(StorageUnavailableError, match="full"):
        await call_writer(store, fill)
    assert not store.database.connection.in_transaction
    assert (store.failure, died) == (None, [])


@only_sqlite("its errors")
async def test_a_failed_fsync_in_a_call_stops_the_daemon(store, died):
    async def fail(_connection):
        error = sqlite3.OperationalError("disk I/O error")
        error.sqlite_errorcode = sqlite3.SQLITE_IOERR_FSYNC
        raise error

    with pytest.raises(StorageUnavailableError):
        await call_writer(store, fail)
    assert died == ["fsync failed: disk I/O error"]


async def test_an_error_in_a_call_is_raised_in_its_caller(store, died):
    async def fail(_connection):
        raise ValueError("its own")

    with pytest.raises(ValueError, match="its own"):
        await call_writer(store, fail)
    assert died == []


async def test_a_call_waits_for_few_transactions_while_senders_keep_the_writer_busy(store):
    """Claims of due deliveries are calls, so a lane would stand still."""
    clock, senders, waits = FakeClock(), [], []

    async def append():
        for _ in range(200):
            await store.events.append(accept(clock, b"{}"))

    def route(_event):
        if len(senders) == 1:  # during a transaction of the first sender: the next one is this sender's
            senders.append(asyncio.create_task(append()))
        return ()

    async def count(_connection):
        waits.append(store.commits - before)

    hooks(store).route = route
    senders.append(asyncio.create_task(append()))
    await until(lambda: store.commits > 4)
    for _ in range(5):
        before = store.commits
        await call_writer(store, count)
    assert max(waits) <= 2
    assert not any(each.done() for each in senders)
    await asyncio.gather(*senders)
