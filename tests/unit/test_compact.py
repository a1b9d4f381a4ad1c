"""Compacting returns free space to the disk, and empties the log."""

import pytest
from stores import only_sqlite, opened, rows, send

from relay.model import Compacted
from relay.store import pruning

pytestmark = only_sqlite("compaction of its file")


@pytest.fixture
async def store(tmp_path, clock, monkeypatch):
    monkeypatch.setattr(pruning, "LONGEST_PAUSE", 0)
    async with opened(tmp_path / "relay.db", clock) as store:
        yield store


async def fill(store, clock):
    events = [await send(store, clock, body=b"a secret " * 5000) for _ in range(20)]
    await store.events.expunge([event.id for event in events[:19]])


async def test_compaction_returns_free_space_to_the_disk(store, clock):
    await fill(store, clock)
    done = await store.upkeep.compact()
    assert done.whole
    assert done.after < done.before / 3
    assert store.path.stat().st_size == done.after
    assert store.path.with_name("relay.db-wal").stat().st_size == 0
    assert len(await store.events.load([20])) == 1


async def test_deleted_data_is_in_no_file(store, clock):
    await fill(store, clock)
    await store.events.expunge([20])
    await store.upkeep.compact()
    for path in store.path.parent.glob("relay.db*"):
        assert b"a secret" not in path.read_bytes()


async def test_compaction_does_not_wait_for_a_reader(store, clock):
    await rows(store, "BEGIN")
    await rows(store, "SELECT count(*) FROM events")
    await fill(store, clock)
    assert not (await store.upkeep.compact()).whole
    assert [row for (row,) in await store.database.connection.execute_fetchall("PRAGMA busy_timeout")] == [
        5000
    ]
    await rows(store, "COMMIT")
    assert (await store.upkeep.compact()).whole


async def test_compaction_without_free_pages_changes_nothing(store, clock):
    await send(store, clock)
    await store.upkeep.compact()  # what the migrations of a new file leave free
    done = await store.upkeep.compact()
    assert done == Compacted(before=done.before, after=done.before, whole=True)
