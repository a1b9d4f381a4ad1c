"""The file of SQLite: its versions and migrations, its mode, and files that are something else."""

import os
import shutil
import sqlite3
from contextlib import closing
from functools import partial

import pytest
import stores
from stores import rows

from relay.errors import StorageError, StorageUnavailableError
from relay.store.sqlite import connection
from relay.store.sqlite import store as sqlite
from relay.store.sqlite.schema import MIGRATIONS

make_store = partial(stores.make_store, kind="sqlite")


async def test_the_template_of_other_tests_is_what_the_relay_creates(tmp_path, clock):
    path, copied = tmp_path / "relay.db", tmp_path / "copied.db"
    os.close(os.open(path, os.O_CREAT, 0o600))  # the template replaces no file
    copied.write_bytes(stores.template())
    store = make_store(path, clock)
    await store.open()
    await store.close()
    queries = (
        "SELECT type, name, tbl_name, sql FROM sqlite_master ORDER BY name",
        "PRAGMA user_version",
        "PRAGMA auto_vacuum",
        "PRAGMA page_size",
        "PRAGMA encoding",
    )
    found = []
    for each in (path, copied):
        with closing(sqlite3.connect(each)) as db:
            found.append([db.execute(query).fetchall() for query in queries])
    assert found[0] == found[1]
    assert len(found[0][0]) > 40


async def test_a_file_of_a_newer_version_is_refused_with_both_versions(tmp_path, clock):
    path = tmp_path / "relay.db"
    store = make_store(path, clock)
    await store.open()
    await store.close()
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(StorageError, match=rf"version 99.*knows {len(MIGRATIONS)}"):
        await make_store(path, clock).open()


async def test_a_file_of_the_first_version_is_copied_and_migrated(tmp_path, clock):
    path = tmp_path / "relay.db"
    with closing(sqlite3.connect(path)) as db:
        db.executescript(f"{MIGRATIONS[0]} PRAGMA user_version = 1;")
        for number, at in ((1, 100), (2, 90), (1024, 500)):
            db.execute(
                "INSERT INTO events VALUES (?, ?, 'shop', 'shop.a', NULL, ?, 'x', NULL, x'', 2, x'7b7d', 0,"
                " 2, NULL, x'7b7d')",
                (number, f"evt_{number}", at),
            )
            db.execute(
                "INSERT INTO deliveries (public_id, event_id, destination, state, created_at)"
                " VALUES (?, ?, 'crm', 'dead', 1)",
                (f"dlv_{number}", number),
            )
        db.commit()
    store = make_store(path, clock)
    await store.open()
    blocks = await rows(store, "SELECT block, first, last FROM event_times")
    assert [tuple(row) for row in blocks] == [(0, 90, 100), (1, 500, 500)]
    assert [row["id"] for row in await store.queries.find("events", since=95, until=101)] == ["evt_1"]
    found = await store.queries.find("deliveries", destination="crm", state="dead", since=95)
    assert [row["id"] for row in found] == ["dlv_1024", "dlv_1"]
    await store.close()
    copy = path.with_name(f"relay.db.before-v{len(MIGRATIONS)}")
    assert copy.stat().st_mode & 0o777 == 0o600
    assert not path.with_name(f"relay.db.before-v{len(MIGRATIONS)}.part").exists()
    with closing(sqlite3.connect(copy)) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (1,)
        assert db.execute("SELECT count(*) FROM events").fetchone() == (3,)


async def test_an_interrupted_migration_keeps_the_copy_of_the_previous_version(tmp_path, clock, monkeypatch):
    """A copy of the half migrated file would be useless for the former program."""
    path = tmp_path / "relay.db"
    with closing(sqlite3.connect(path)) as db:
        db.executescript(f"{MIGRATIONS[0]} PRAGMA user_version = 1;")
    monkeypatch.setattr(connection, "MIGRATIONS", (*MIGRATIONS[:-1], "SELECT power_failure;"))
    with pytest.raises(StorageError, match="power_failure"):
        await make_store(path, clock).open()
    monkeypatch.undo()
    store = make_store(path, clock)
    await store.open()
    await store.close()
    found = []
    for each in (path, path.with_name(f"relay.db.before-v{len(MIGRATIONS)}")):
        with closing(sqlite3.connect(each)) as db:
            found += db.execute("PRAGMA user_version").fetchone()
    assert found == [len(MIGRATIONS), 1]


async def test_the_copy_before_a_migration_is_for_its_owner_only_from_the_first_byte(
    tmp_path, clock, monkeypatch
):
    path = tmp_path / "relay.db"
    with closing(sqlite3.connect(path)) as db:
        db.executescript(f"{MIGRATIONS[0]} PRAGMA user_version = 1;")
    modes = []

    def look(*_):
        modes.extend(copy.stat().st_mode & 0o777 for copy in tmp_path.glob("relay.db.before-v*"))
        return 0

    async def watched(path, **named):
        connection = await open_writer(path, **named)
        await connection.set_progress_handler(look, 1)  # at every step of the copying
        return connection

    open_writer = sqlite.open_writer
    monkeypatch.setattr(sqlite, "open_writer", watched)
    before = os.umask(0)
    try:
        store = make_store(path, clock)
        await store.open()
        await store.close()
    finally:
        os.umask(before)
    assert set(modes) == {0o600}


async def test_without_room_for_the_copy_the_migration_is_postponed(tmp_path, clock, monkeypatch):
    path = tmp_path / "relay.db"
    with closing(sqlite3.connect(path)) as db:
        db.executescript(f"{MIGRATIONS[0]} PRAGMA user_version = 1;")
    usage = shutil.disk_usage(tmp_path)
    store = make_store(path, clock)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=10))
        with pytest.raises(StorageUnavailableError, match="has 10 B free"):
            await store.open()
    assert not list(tmp_path.glob("*.before-*"))
    await store.open()
    await store.close()


async def test_a_file_that_is_not_a_database_is_refused_and_kept(tmp_path, clock):
    path = tmp_path / "relay.db"
    path.write_bytes(b"not a database, but somebody's" * 500)
    with pytest.raises(StorageError, match="damaged"):
        await make_store(path, clock).open()
    assert path.read_bytes().startswith(b"not a database")


async def test_the_file_is_for_its_owner_only(tmp_path, clock):
    store = make_store(tmp_path / "relay.db", clock)
    await store.open()
    await store.close()
    assert (tmp_path / "relay.db").stat().st_mode & 0o777 == 0o600
