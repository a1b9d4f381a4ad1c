"""A backup is a complete database, made while the relay works; another relay can start from it."""

import asyncio
import os
import shutil
import sqlite3
import stat

import pytest
from stores import end, ids, only_sqlite, opened, rows, send
from support import until

from relay.errors import StorageError
from relay.store.sqlite import backup, read_only
from relay.store.sqlite.backup import back_up

pytestmark = only_sqlite("backups of its file")


@pytest.fixture
async def store(tmp_path, clock):
    async with opened(tmp_path / "relay.db", clock) as store:
        yield store


async def test_a_relay_started_from_a_backup_has_the_same_pending_deliveries(store, clock, tmp_path):
    events = [await send(store, clock, body=b"%d" % number) for number in range(3)]
    await end(store, events[0])
    made = await store.upkeep.backup(tmp_path / "copy.db")
    assert (made.events, made.deliveries) == (3, 6)
    assert made.bytes == (tmp_path / "copy.db").stat().st_size
    await send(store, clock)
    async with opened(tmp_path / "copy.db", clock) as copy:
        assert await copy.events.load([1, 2, 3]) == {event.id: event for event in events}
        assert (await copy.ledger.audit())["crm"].pending == 2
        claim = await copy.deliveries.claim("crm", 10, retries=False)
        assert len(claim.deliveries) == 2
        assert [row for (row,) in await rows(copy, "PRAGMA auto_vacuum")] == [2]


async def test_a_backup_is_private_and_leaves_no_temporary_file(store, clock, tmp_path):
    await send(store, clock)
    before = set(tmp_path.iterdir())
    old = os.umask(0)
    try:
        await store.upkeep.backup(tmp_path / "copy.db")
    finally:
        os.umask(old)
    watched = tmp_path / "relay.db.mark"  # written by the store, perhaps meanwhile
    assert set(tmp_path.iterdir()) - before - {watched} == {tmp_path / "copy.db"}
    assert stat.S_IMODE((tmp_path / "copy.db").stat().st_mode) == 0o600


async def test_a_backup_replaces_a_file_only_with_replace(store, clock, tmp_path):
    target = tmp_path / "copy.db"
    target.write_text("precious")
    with pytest.raises(StorageError, match="already exists") as caught:
        await store.upkeep.backup(target)
    assert "--force" in caught.value.hint
    assert target.read_text() == "precious"
    await send(store, clock)
    assert (await store.upkeep.backup(target, replace=True)).events == 1
    with sqlite3.connect(target) as copy:
        assert copy.execute("SELECT count(*) FROM events").fetchone() == (1,)
    copy.close()


async def test_a_backup_never_replaces_the_database_itself(store, tmp_path):
    (tmp_path / "link.db").hardlink_to(tmp_path / "relay.db")
    for name in ("relay.db", "link.db"):
        with pytest.raises(StorageError, match="cannot be a backup of"):
            await store.upkeep.backup(tmp_path / name, replace=True)


async def test_a_leftover_part_file_does_not_prevent_a_backup(store, tmp_path):
    (tmp_path / "copy.db.part").write_text("half of it")
    await store.upkeep.backup(tmp_path / "copy.db")
    assert not (tmp_path / "copy.db.part").exists()


async def test_a_missing_folder_is_named_in_the_error(store, tmp_path):
    with pytest.raises(StorageError, match="does not exist") as caught:
        await store.upkeep.backup(tmp_path / "nowhere" / "copy.db")
    assert caught.value.hint.startswith("mkdir -p ")


async def test_too_little_free_space_is_reported_before_writing(store, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(backup.shutil, "disk_usage", lambda _path: usage._replace(free=10))
    with pytest.raises(StorageError, match="10 B free, a copy may need"):
        await store.upkeep.backup(tmp_path / "copy.db")
    assert not list(tmp_path.glob("copy*"))


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        ("UPDATE ledger SET created = created + 1", "the ledger of the copy does not balance: crm, erp"),
        ("DELETE FROM deliveries; DELETE FROM ledger", "the copy lacks the latest events"),
    ],
)
async def test_a_copy_that_fails_its_check_is_discarded(store, clock, monkeypatch, damage, complaint):
    folder = store.path.parent
    await send(store, clock)
    verify = backup._verify

    def damaged(part, stop, before):
        with sqlite3.connect(part) as copy:
            copy.executescript(damage)
        copy.close()
        return verify(part, stop, before)

    monkeypatch.setattr(backup, "_verify", damaged)
    with pytest.raises(StorageError, match=complaint):
        await store.upkeep.backup(folder / "copy.db")
    assert not list(folder.glob("copy*"))


async def test_a_damaged_copy_is_discarded(store, clock, tmp_path, monkeypatch):
    for _ in range(50):
        await send(store, clock, body=b"x" * 5000)
    verify = backup._verify

    def damaged(part, stop, before):
        with part.open("r+b") as file:
            file.seek(4096 * 3)
            file.write(b"\xff" * 4096)
        return verify(part, stop, before)

    monkeypatch.setattr(backup, "_verify", damaged)
    with pytest.raises(StorageError, match=r"damaged|malformed"):
        await store.upkeep.backup(tmp_path / "copy.db")
    assert not list(tmp_path.glob("copy*"))


async def test_events_are_stored_while_a_backup_is_made(store, clock, tmp_path):
    for _ in range(20):
        await send(store, clock, body=b"x" * 100_000)
    task = asyncio.ensure_future(store.upkeep.backup(tmp_path / "copy.db"))
    sent = 0
    while not task.done():
        await send(store, clock)
        sent += 1
    made = await task
    assert sent > 0
    assert 20 <= made.events <= 20 + sent
    assert len(await ids(store)) == 20 + sent


async def test_a_cancelled_backup_stops_and_removes_its_file(store, clock, tmp_path, monkeypatch):
    monkeypatch.setattr(read_only, "_CHECK_EVERY", 1)
    await send(store, clock)
    begun = []

    def slow(source, target, stop, *, replace=False):
        begun.append(stop)
        stop.wait(10)
        return back_up(source, target, stop, replace=replace)

    monkeypatch.setattr("relay.store.sqlite.upkeep.back_up", slow)
    task = asyncio.ensure_future(store.upkeep.backup(tmp_path / "copy.db"))
    await until(lambda: begun)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert begun[0].is_set()
    assert not list(tmp_path.glob("copy*"))


def test_a_backup_of_a_stopped_relay_creates_no_file_beside_the_database(tmp_path, clock):
    async def fill():
        async with opened(tmp_path / "relay.db", clock) as store:
            await send(store, clock)

    asyncio.run(fill())
    before = (tmp_path / "relay.db").read_bytes()
    assert back_up(tmp_path / "relay.db", tmp_path / "copy.db", read_only.Stop()).events == 1
    assert (tmp_path / "relay.db").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"relay.db", "relay.db.mark", "copy.db"}
