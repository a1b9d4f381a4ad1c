"""Database files that vanish, are replaced or damaged: no event is acknowledged that would be lost."""

import asyncio
import json
import os
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from daemons import SERVE, SOURCES, Daemon, adorn, running, write_config
from stores import make_store, only_sqlite, opened, send
from support import FakeClock, until
from wire import exchange, request

from relay.errors import StorageError
from relay.store.sqlite.losses import reports_of
from relay.store.sqlite.mark import Mark, read_mark
from relay.store.sqlite.rescue import rescues_of
from relay.store.sqlite.wal import log_of, read_log
from relay.store.writer import Job

pytestmark = only_sqlite("damage of its file")
SOON = 5.0  # seconds within which senders are refused


def post(session="s"):
    return request("POST", "/v1/events", adorn(session))


def events_in(database):
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as reader:
        return [id_ for (id_,) in reader.execute("SELECT public_id FROM events ORDER BY id")]


def deleted(database):
    database.unlink()


def moved_away(database):
    database.rename(database.with_name("elsewhere.db"))


def replaced(database):
    other = database.with_name("other.db")
    with closing(sqlite3.connect(other)) as connection:
        connection.execute("CREATE TABLE t (a)")
    other.replace(database)


def log_deleted(database):
    log_of(database).unlink()


def folder_deleted(database):
    shutil.rmtree(database.parent)


def folder_moved(database):
    database.parent.rename(database.parent.with_name("moved"))


HAPPENINGS = [deleted, moved_away, replaced, log_deleted, folder_deleted, folder_moved]


async def refusal(url, seconds=SOON):
    """Send until the relay refuses with 503; return the acknowledged events, and the answer."""
    acknowledged = []
    async with asyncio.timeout(seconds):
        while True:
            answer = await exchange(url, post())
            if answer.status != 200:
                return acknowledged, answer
            acknowledged.append(answer.json["event_id"])
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("happens", HAPPENINGS)
async def test_deleted_files_stop_acknowledgements_and_a_rescue_copy_has_everything(tmp_path, happens):
    database = tmp_path / "state" / "relay.db"
    async with Daemon(write_config(tmp_path, SOURCES)) as daemon:
        acknowledged = await _some(daemon.url)
        happens(database)
        more, refused = await refusal(daemon.url)
        assert refused.status == 503
        assert refused.json["status"] == "error"
        await until(lambda: rescues_of(database))
        await until(lambda: "rescue copy" in daemon.output)
        assert (await daemon.stop()) == 0
    [copy] = rescues_of(database)
    assert set(events_in(copy)) >= {*acknowledged, *more}
    assert copy.stat().st_mode & 0o777 == 0o600
    restore = await asyncio.create_subprocess_shell(_restore_command(daemon))
    assert await restore.wait() == 0
    assert set(events_in(database)) >= {*acknowledged, *more}
    async with Daemon(write_config(tmp_path, SOURCES)) as again:
        assert (await exchange(again.url, post())).status == 200
        assert "data was lost" not in again.output
        assert await again.stop() == 0


async def _some(url, count=5):
    acknowledged = []
    for _ in range(count):
        answer = await exchange(url, post())
        assert answer.status == 200
        acknowledged.append(answer.json["event_id"])
    return acknowledged


def _restore_command(daemon):
    [line] = [json.loads(line)["message"] for line in daemon.lines if "rescue copy" in line]
    return line.split("run: ")[1].split("; then start")[0]


async def test_a_relay_without_its_files_is_not_ready_and_gives_the_reason(tmp_path):
    async with running(write_config(tmp_path, SOURCES)) as relay:
        await relay.exchange(post())
        (tmp_path / "state" / "relay.db").unlink()
        await until(relay.app.health.reasons, SOON)
        answer = await exchange(relay.addresses.admin, request("GET", "/ready"))
        assert answer.status == 503
        [reason] = answer.json["reasons"]
        assert "relay.db was deleted or moved away while it was in use" in reason
        assert relay.app._stuck() == []  # a restart would not help, so the watchdog must not cause one
        await until(lambda: rescues_of(tmp_path / "state" / "relay.db"))
        checks = await _doctor(tmp_path / "config.toml")
        assert not checks["ready"]["ok"]
        assert not checks["open"]["ok"]
        assert "relay.db.rescue-" in checks["losses"]["detail"]


async def test_a_file_that_returns_is_used_again(tmp_path):
    database = tmp_path / "state" / "relay.db"
    async with running(write_config(tmp_path, SOURCES)) as relay:
        await relay.exchange(post())
        database.rename(tmp_path / "away.db")
        await refusal(relay.addresses.public)
        (tmp_path / "away.db").rename(database)
        await until(lambda: relay.app.store.failure is None)
        answer = await relay.exchange(post())
        assert answer.status == 200
    assert answer.json["event_id"] in events_in(database)
    assert not rescues_of(database)  # otherwise the next start would be refused


async def test_a_start_without_the_database_but_with_its_rescue_copy_is_refused(tmp_path):
    database = tmp_path / "state" / "relay.db"
    async with running(write_config(tmp_path, SOURCES)) as relay:
        await relay.exchange(post())
        database.unlink()
        await refusal(relay.addresses.public)
    [copy] = rescues_of(database)
    with pytest.raises(StorageError, match="is missing, and it has a rescue copy") as caught:
        async with running(write_config(tmp_path, SOURCES)):
            raise AssertionError("it started with nothing")
    assert f"mv {copy} {database}" in caught.value.hint
    assert not database.exists()


@pytest.mark.parametrize("happens", [replaced, log_deleted])
async def test_a_start_on_another_file_is_refused_while_a_rescue_copy_waits(tmp_path, happens):
    database, config = tmp_path / "state" / "relay.db", write_config(tmp_path, SOURCES)
    async with Daemon(config) as daemon:
        acknowledged = await _some(daemon.url)
        happens(database)
        more, _ = await refusal(daemon.url)
        await until(lambda: rescues_of(database))  # its process is killed then
    with pytest.raises(StorageError, match="was replaced or damaged, and it has a rescue copy") as caught:
        async with running(config):
            raise AssertionError("it started with less than it had")
    command = caught.value.hint.removeprefix("restore it: ").split("; ")[0]
    done = await asyncio.create_subprocess_shell(command)
    assert await done.wait() == 0
    async with running(config):
        assert set(events_in(database)) == {*acknowledged, *more}


async def test_a_stop_with_a_damaged_file_does_not_report_that_nothing_is_lost(tmp_path, caplog):
    database = tmp_path / "state" / "relay.db"
    with caplog.at_level("INFO"):
        async with running(write_config(tmp_path, SOURCES)) as relay:
            await relay.exchange(post())
            await until(lambda: log_of(database).stat().st_size == 0)
            os.truncate(database, 3 * 4096)
            await until(lambda: relay.app.store.failure)
            await until(lambda: "no rescue copy" in caplog.text)
            await asyncio.sleep(1)  # several checks, none of which may log it again
    assert caplog.text.count("no rescue copy") == 1
    assert "nothing is lost" not in caplog.text
    with pytest.raises(StorageError, match="is damaged"):
        async with running(write_config(tmp_path, SOURCES)):
            raise AssertionError("it started with a damaged file")


async def test_lists_of_a_damaged_database_are_refused_with_a_message(tmp_path, caplog):
    database = tmp_path / "state" / "relay.db"
    async with running(write_config(tmp_path, SOURCES)) as relay:
        for _ in range(50):
            await relay.exchange(post())
        await until(lambda: log_of(database).stat().st_size == 0)
        with database.open("r+b") as file:
            for page in range(2, database.stat().st_size // 4096):
                file.seek(page * 4096)
                file.write(b"\xff" * 64)
        answer = await exchange(relay.addresses.socket, request("GET", "/api/events"))
        assert answer.status == 503
        assert "cannot read the database: " in answer.json["error"]["message"]
    assert "Traceback" not in caplog.text


async def test_a_stop_before_the_next_check_makes_the_rescue_copy_first(tmp_path):
    database = tmp_path / "state" / "relay.db"
    async with Daemon(write_config(tmp_path, SOURCES)) as daemon:
        acknowledged = await _some(daemon.url)
        database.unlink()
        assert await daemon.stop() == 0
    [copy] = rescues_of(database)
    assert set(events_in(copy)) == set(acknowledged)


async def test_a_stop_does_not_wait_for_a_copy_of_a_deleted_and_damaged_file(tmp_path):
    database = tmp_path / "state" / "relay.db"
    async with Daemon(write_config(tmp_path, SOURCES)) as daemon:
        for _ in range(60):  # more than a connection keeps in memory
            await exchange(daemon.url, request("POST", "/v1/events", adorn(note="x" * 100_000)))
        await until(lambda: log_of(database).stat().st_size == 0)
        with database.open("r+b") as file:
            for page in range(2, database.stat().st_size // 4096):
                file.seek(page * 4096)
                file.write(b"\xff" * 64)
        database.unlink()
        assert await daemon.stop() == 0
    assert "stopped; the database has no intact copy" in daemon.output
    assert not rescues_of(database)


@pytest.mark.parametrize(
    "what", ["cut off", "cut in half", "overwritten by an older one", "overwritten by noise", "its log"]
)
async def test_an_overwritten_file_stops_acknowledgements(tmp_path, what):
    database = tmp_path / "state" / "relay.db"
    config = write_config(tmp_path, SOURCES)
    async with running(config) as relay:
        for _ in range(5):
            await relay.exchange(post())
        await relay.app.store.upkeep.backup(tmp_path / "older.db")
    async with running(config) as relay:
        for _ in range(5):
            await relay.exchange(post())
        if what == "cut off":
            os.truncate(database, 0)
        elif what == "cut in half":
            await until(lambda: log_of(database).stat().st_size == 0)
            os.truncate(database, database.stat().st_size // 2)
        elif what == "its log":
            os.truncate(log_of(database), 0)
        elif what == "overwritten by noise":
            with database.open("r+b") as file:
                file.write(os.urandom(20_000))
        else:
            shutil.copyfile(tmp_path / "older.db", database)
        _, refused = await refusal(relay.addresses.public)
        assert refused.status == 503
        assert relay.app.store.failure is not None


async def test_damage_found_by_a_transaction_stops_acknowledgements(tmp_path):
    async with running(write_config(tmp_path, SOURCES)) as relay:
        await relay.exchange(post())
        store = relay.app.store

        def break_(_batch):
            error = sqlite3.DatabaseError("database disk image is malformed")
            error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
            raise error

        with pytest.raises(StorageError):
            await store.database.writer.submit(_job(break_))
        answer = await relay.exchange(post())
        assert answer.status == 503
        assert "the database is damaged" in store.failure


async def test_damage_found_by_a_read_stops_acknowledgements(tmp_path):
    async with running(write_config(tmp_path, SOURCES)) as relay:
        for _ in range(50):
            await relay.exchange(post("s" * 900))
        store = relay.app.store
        await until(lambda: log_of(store.path).stat().st_size == 0)
        size = store.path.stat().st_size
        with store.path.open("r+b") as file:  # pages that the writer still has in memory
            file.seek(4096)
            file.write(b"\xff" * (size - 4096))
        with pytest.raises(sqlite3.DatabaseError):
            await store.events.load(list(range(1, 51)))
        await until(lambda: store.failure is not None)
        assert (await relay.exchange(post())).status == 503
        assert "the database is damaged" in store.failure


def _job(apply):
    return Job(apply)


# --- the log ------------------------------------------------------------------------------------------


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        [byte] = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 0x10]))


async def killed(config, count=40):
    """Let a daemon acknowledge events, then kill it; the log and the mark include all of them."""
    database = config.parent / "state" / "relay.db"
    async with Daemon(config) as daemon:
        acknowledged = await _some(daemon.url, count)
        async with asyncio.timeout(60):
            while read_mark(database).events != len(acknowledged):
                acknowledged += await _some(daemon.url, 1)  # else the log would be emptied
                await asyncio.sleep(0.3)  # another process's next mark
        await daemon.end()
    return acknowledged


@pytest.mark.parametrize("where", [10, 40, 0.3, 0.6, -1])
async def test_a_flipped_byte_of_the_log_is_reported_at_the_start_and_by_doctor(tmp_path, where):
    config, database = write_config(tmp_path, SOURCES), tmp_path / "state" / "relay.db"
    acknowledged = await killed(config)
    log = log_of(database)
    size = log.stat().st_size
    assert size > 100_000
    at = {10: 10, 40: 40, -1: size - 100}.get(where) or int(size * where)
    flip(log, at)
    offline = await _doctor(config, "--offline")
    assert not offline["losses"]["ok"] or not offline["history"]["ok"]
    async with Daemon(config) as daemon:
        assert "data was lost" in daemon.output
        online = await _doctor(config)
        assert not online["losses"]["ok"]
        assert "rm " in online["losses"]["hint"]
        assert await daemon.stop() == 0
    reports = reports_of(database)
    assert any(path.name.startswith("relay.db.lost-") for path in reports)
    if where != -1:
        [copy] = [path for path in reports if ".damaged-" in path.name]
        assert copy.stat().st_size == size
        assert copy.stat().st_mode & 0o777 == 0o600
    assert len(set(events_in(database)) & set(acknowledged)) < len(acknowledged)
    for path in reports:
        path.unlink()
    assert (await _doctor(config, "--offline"))["losses"]["ok"]


async def _doctor(config, *options):
    process = await asyncio.create_subprocess_exec(
        *SERVE[:-1], "doctor", "-c", str(config), "--json", *options,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    result, _ = await process.communicate()
    return {check["name"]: check for check in json.loads(result)["checks"]}


async def test_a_killed_relay_with_an_intact_log_reports_no_loss(tmp_path):
    config, database = write_config(tmp_path, SOURCES), tmp_path / "state" / "relay.db"
    acknowledged = await killed(config)
    assert (await _doctor(config, "--offline"))["losses"]["ok"]
    async with Daemon(config) as daemon:
        assert "data was lost" not in daemon.output
        await daemon.stop()
    assert reports_of(database) == []
    assert set(events_in(database)) == set(acknowledged)


async def test_a_database_replaced_while_the_relay_was_stopped_is_reported(tmp_path):
    config, database = write_config(tmp_path, SOURCES), tmp_path / "state" / "relay.db"
    acknowledged = await killed(config, 3)
    for path in (database, log_of(database)):
        path.unlink()
    async with Daemon(config) as daemon:
        assert f"events 1 to {len(acknowledged)} " in daemon.output
        await daemon.stop()


async def test_the_log_is_emptied_when_nothing_is_written(tmp_path):
    async with running(write_config(tmp_path, SOURCES)) as relay:
        await relay.exchange(post())
        log = log_of(relay.app.store.path)
        await until(lambda: log.stat().st_size == 0)
        assert (await relay.exchange(post())).status == 200
        assert relay.app.store.failure is None


async def test_the_mark_follows_commits_and_is_never_ahead(tmp_path):
    async with running(write_config(tmp_path, SOURCES)) as relay:
        path = relay.app.store.path
        await relay.exchange(post())
        await until(lambda: read_mark(path).events == 1)
        await relay.exchange(post())
        await until(lambda: read_mark(path).events == 2)
    assert read_mark(path) == Mark(events=2)


async def test_ids_of_deleted_events_are_not_reused_and_are_not_a_loss(tmp_path):
    clock = FakeClock()
    path = tmp_path / "relay.db"
    async with opened(path, clock) as store:
        for _ in range(3):
            await send(store, clock)
        store_ids = [row["row"] for row in await store.queries.find("events")]
        deliveries = [row["row"] for row in await store.queries.find("deliveries")]
        assert (await store.events.expunge(store_ids)).events == 3
    async with opened(path, clock) as store:
        assert reports_of(path) == []
        await send(store, clock)
        assert [row["row"] for row in await store.queries.find("events")] == [max(store_ids) + 1]
        assert min(row["row"] for row in await store.queries.find("deliveries")) == max(deliveries) + 1


def test_the_log_is_read_like_sqlite_reads_it(tmp_path):
    path = tmp_path / "a.db"
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA wal_autocheckpoint = 0")
        connection.execute("CREATE TABLE t (a)")
        for _ in range(12):
            connection.execute("INSERT INTO t VALUES (?)", ("x" * 3000,))
        [(_, frames, _)] = connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
        raw = log_of(path).read_bytes()
        whole = read_log(log_of(path))
        assert (whole.valid, whole.damaged) == (frames, False)
        connection.execute("INSERT INTO t VALUES ('restarted')")
        assert not read_log(log_of(path)).damaged  # frames of the generation before are no loss
    torn = tmp_path / "torn"
    torn.write_bytes(raw[:-2000])  # as after a kill during a write
    assert not read_log(torn).damaged
    for at in range(0, len(raw) - 3 * 4120, 997):
        damaged = bytearray(raw)
        damaged[at] ^= 1
        torn.write_bytes(damaged)
        assert read_log(torn).damaged, at


async def test_no_backup_is_made_of_a_file_that_is_not_the_open_one(tmp_path):
    config = write_config(tmp_path, SOURCES, '[backup]\nevery = "1d"\nkeep = 1\n')
    async with running(config) as relay:
        await relay.exchange(post())
        good = Path((await relay.app.backups.make()).path)
        await relay.exchange(post())
        shutil.copyfile(good, tmp_path / "state" / "foreign.db")
        (tmp_path / "state" / "foreign.db").replace(relay.app.store.path)
        await refusal(relay.addresses.public)
        with pytest.raises(StorageError, match="was replaced by another file"):
            await relay.app.store.upkeep.backup(tmp_path / "copy.db")
        with pytest.raises(StorageError, match="was replaced by another file"):
            await relay.app.backups.make()
        assert list(relay.app.backups.made()) == [good]


async def test_a_linked_database_is_watched_at_its_target(tmp_path):
    (tmp_path / "state").mkdir()
    (tmp_path / "disk").mkdir()
    (tmp_path / "state" / "relay.db").symlink_to(tmp_path / "disk" / "relay.db")
    (tmp_path / "disk" / "relay.db").touch(mode=0o600)
    async with running(write_config(tmp_path, SOURCES)) as relay:
        assert (await relay.exchange(post())).status == 200
        await until(lambda: (tmp_path / "disk" / "relay.db-wal").stat().st_size == 0)
        (tmp_path / "disk" / "relay.db").unlink()
        await refusal(relay.addresses.public)
        await until(lambda: rescues_of(relay.app.store.path))


async def test_a_store_without_its_folder_can_be_closed(tmp_path):
    store = make_store(tmp_path / "state" / "relay.db", FakeClock())
    (tmp_path / "state").mkdir()
    await store.open()
    shutil.rmtree(tmp_path / "state")
    await store.close()
    assert rescues_of(store.path)
