"""A disk that is full, a database that others hold: the relay starts, reports the problem, and recovers."""

import asyncio
import json
import os
import sqlite3
import time
from contextlib import closing
from functools import partial
from unittest.mock import patch

import daemons
import pytest
from commands import Commands
from daemons import SOURCES, Daemon, adorn, destination, write_config
from machines import small_disk
from stores import only_sqlite
from support import until
from wire import exchange, request

from relay.app import App
from relay.delivery import dispatcher
from relay.errors import StorageError
from relay.plugin_loading.loader import load
from relay.store.opening import DISK_RESERVE
from relay.store.sqlite.disk import Disk
from relay.store.sqlite.rescue import rescues_of

pytestmark = only_sqlite("its file on a full disk, or locked")
MIB = 2**20
HEALED = 15.0  # seconds; the relay checks its disk every second

running = partial(daemons.running, reserve=DISK_RESERVE)


@pytest.fixture
def disk(tmp_path):
    """The state directory on a disk of 12 MiB."""
    with small_disk(tmp_path / "state", 12 * MIB) as disk:
        yield disk


def post(session="s", **more):
    return request("POST", "/v1/events", adorn(session, **more))


async def accepted(url, session="s", **more):
    answer = await exchange(url, post(session, **more))
    assert answer.status == 200, answer
    return answer.json["event_id"]


async def until_accepted(url, seconds=HEALED, **more):
    """Send until an event is taken, and return its id."""
    async with asyncio.timeout(seconds + 5):
        began = time.monotonic()
        while (answer := await exchange(url, post("healed", **more))).status != 200:
            assert time.monotonic() - began < seconds, answer
            await asyncio.sleep(0.05)
        return answer.json["event_id"]


async def readiness(daemon):
    answer = await exchange(daemon.config.parent / "state" / "relay.sock", request("GET", "/ready"))
    return answer.status, answer.json["reasons"]


async def refused(url):
    """Return how a sender is refused, after checks of the envelope and `Retry-After`."""
    answer = await exchange(url, post())
    assert answer.status == 503
    assert int(answer.headers["retry-after"]) > 0
    assert answer.json["status"] == "error"
    return answer.json["message"]


# --- starts -------------------------------------------------------------------------------------------


async def test_a_first_start_on_a_full_disk_recovers(tmp_path, disk):
    disk.fill()
    async with Daemon(write_config(tmp_path, SOURCES)) as daemon:
        status, [reason] = await readiness(daemon)
        assert status == 503
        assert reason.startswith("the store cannot be opened: ")
        assert await refused(daemon.url) == "Storage is unavailable"
        shown = await daemon.operator("GET", "/api/status")
        assert (shown["ready"], shown["reasons"]) == (False, [reason])
        output = await Commands(tmp_path / "state" / "relay.sock")("status", code=1)
        assert f"not ready: {reason}\n" in output.out
        assert "backlog: unknown\n" in output.out
        page = await exchange(tmp_path / "state" / "relay.sock", request("GET", "/ui/"))
        assert (page.status, reason.encode() in page.body) == (200, True)
        listed = await exchange(tmp_path / "state" / "relay.sock", request("GET", "/api/destinations"))
        assert (listed.status, listed.json["error"]["code"]) == (503, "unavailable")
        disk.clear()
        await until_accepted(daemon.url)
        assert await readiness(daemon) == (200, [])
        assert await daemon.stop() == 0
    assert "Traceback" not in daemon.output


async def test_a_start_on_a_full_disk_after_a_kill_loses_nothing_and_recovers(tmp_path, disk, recorder):
    recorder.open.clear()
    config = write_config(tmp_path, SOURCES, destination("crm", recorder.url))
    async with Daemon(config) as daemon:
        ids = {await accepted(daemon.url, f"session {number}") for number in range(20)}
        await daemon.end()
    recorder.open.set()
    (disk.path / "relay.db.ballast").unlink()
    (disk.path / "relay.db-shm").unlink()  # as after a copy to another disk: opening has to make it
    disk.fill()
    async with Daemon(config) as daemon:
        assert (await readiness(daemon))[0] == 503
        await refused(daemon.url)
        disk.clear()
        ids.add(await until_accepted(daemon.url))
        await until(lambda: set(recorder.ids) == ids)
        assert await daemon.stop() == 0
    assert "Traceback" not in daemon.output


async def test_a_stop_while_the_disk_is_full_at_the_start_ends_at_once(tmp_path, disk):
    disk.fill()
    async with Daemon(write_config(tmp_path, SOURCES)) as daemon:
        assert (await readiness(daemon))[0] == 503
        assert await daemon.stop() == 0


async def test_the_start_waits_for_a_locked_database_and_then_delivers(tmp_path, recorder):
    recorder.open.clear()
    config = write_config(tmp_path, SOURCES, destination("crm", recorder.url))
    async with Daemon(config) as daemon:
        ids = {await accepted(daemon.url)}
        await daemon.stop()
    recorder.open.set()
    with closing(sqlite3.connect(tmp_path / "state" / "relay.db", isolation_level=None)) as other:
        other.execute("PRAGMA locking_mode = EXCLUSIVE")
        other.execute("BEGIN EXCLUSIVE")
        async with Daemon(config) as daemon:
            assert await readiness(daemon) == (503, ["the store cannot be opened: database is locked"])
            assert await refused(daemon.url) == "Storage is unavailable"
            other.execute("ROLLBACK")
            other.close()
            ids.add(await until_accepted(daemon.url))
            await until(lambda: set(recorder.ids) == ids)
            assert await daemon.stop() == 0
    assert "Traceback" not in daemon.output


async def test_connections_stay_open_while_the_database_is_opened(tmp_path, disk):
    disk.fill()
    async with running(write_config(tmp_path, SOURCES)) as relay:
        assert not relay.app.store.opened
        sending = asyncio.create_task(until_accepted(relay.addresses.public))
        disk.clear()
        assert await sending
        assert relay.app.store.opened
        await until(lambda: relay.app.health.reasons() == [])
        assert (await exchange(relay.addresses.admin, request("GET", "/ready"))).status == 200


def make_a_folder(path):
    path.mkdir()


def make_nonsense(path):
    path.write_bytes(b"not a database" * 1000)


def make_a_newer_version(path):
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA user_version = 99")


def make_a_pipe(path):
    path.symlink_to("/dev/null")


def make_anothers_database(path):
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE users (name)")


def make_a_log_that_is_a_folder(path):
    path.with_name("relay.db-wal").mkdir()


def make_a_log_that_is_a_pipe(path):
    os.mkfifo(path.with_name("relay.db-wal"))


def make_shared_memory_that_is_a_folder(path):
    path.with_name("relay.db-shm").mkdir()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (make_anothers_database, "relay.db is a database of another program"),
        (make_a_log_that_is_a_folder, "relay.db-wal is not a file"),
        (make_a_log_that_is_a_pipe, "relay.db-wal is not a file"),
        (make_shared_memory_that_is_a_folder, "relay.db-shm is not a file"),
        (make_a_folder, "relay.db is a directory"),
        (make_nonsense, "relay.db is damaged: file is not a database"),
        (make_a_newer_version, "relay.db has schema version 99, this program knows"),
        (make_a_pipe, "relay.db is not a file"),
    ],
)
async def test_a_permanent_fault_ends_the_start_with_one_sentence(tmp_path, make, message):
    config = write_config(tmp_path, SOURCES)
    (tmp_path / "state").mkdir()
    make(tmp_path / "state" / "relay.db")
    daemon = Daemon(config)
    await daemon.start()
    try:
        assert await daemon.exit() == 1
    finally:
        await daemon.end()
    assert message in daemon.output
    assert "Traceback" not in daemon.output
    assert "unexpected error" not in daemon.output


async def test_a_database_without_one_of_its_tables_ends_the_start_with_one_sentence(tmp_path):
    config = write_config(tmp_path, SOURCES)
    async with running(config):
        pass
    with closing(sqlite3.connect(tmp_path / "state" / "relay.db")) as db:
        db.execute("DROP TABLE destinations")
    daemon = Daemon(config)
    await daemon.start()
    try:
        assert await daemon.exit() == 1
    finally:
        await daemon.end()
    assert "relay.db is damaged: no such table: destinations" in daemon.output
    assert "unexpected error" not in daemon.output


async def test_the_start_does_not_wait_for_a_mark_that_is_a_pipe(tmp_path):
    (tmp_path / "state").mkdir()
    os.mkfifo(tmp_path / "state" / "relay.db.mark")
    async with Daemon(write_config(tmp_path, SOURCES)) as daemon:
        await accepted(daemon.url)
        assert await daemon.stop() == 0


async def test_the_admin_api_responds_while_the_database_is_locked(tmp_path):
    config = write_config(tmp_path, SOURCES)
    async with running(config):
        pass
    with closing(sqlite3.connect(tmp_path / "state" / "relay.db", isolation_level=None)) as other:
        other.execute("PRAGMA locking_mode = EXCLUSIVE")
        other.execute("BEGIN EXCLUSIVE")
        async with Daemon(config) as daemon, asyncio.timeout(30):
            answer = await exchange(tmp_path / "state" / "relay.sock", request("POST", "/api/reload"))
            assert answer.status == 503
            assert "the daemon is still waiting for its database: " in answer.json["error"]["message"]
            answer = await exchange(tmp_path / "state" / "relay.sock", request("GET", "/api/events"))
            assert "fuser" in answer.json["error"]["hint"]
            answer = await exchange(tmp_path / "state" / "relay.sock", request("GET", "/api/doctor"))
            checks = json.loads(answer.body.splitlines()[-1])["result"]["checks"]
            found = {check["name"]: check for check in checks}
            assert found["open"]["detail"].endswith("relay.db: database is locked")
            assert "fuser" in found["open"]["hint"]
    assert "Traceback" not in daemon.output


async def test_a_missing_folder_is_named_in_the_error(tmp_path):
    config = write_config(tmp_path, SOURCES)
    config.write_text(config.read_text().replace("[storage]\n", '[storage]\nurl = "sqlite:no/relay.db"\n'))
    with pytest.raises(StorageError, match=r"no/relay\.db cannot be opened: No such file") as caught:
        await App(load(config)).run()
    assert "folder" in caught.value.hint


# --- at work ------------------------------------------------------------------------------------------


async def fill_up(relay, disk):
    """Fill the disk to the last byte, without a reserve, and with a log without free space."""
    relay.app.store.disk.ballast.unlink()
    await relay.app.store.upkeep.compact()
    disk.fill()


async def test_a_failing_disk_holds_the_lanes_without_starving_the_watchdog(
    tmp_path, disk, recorder, monkeypatch
):
    monkeypatch.setattr(dispatcher, "STUCK_AFTER", 100_000)
    config = write_config(tmp_path, SOURCES, destination("crm", recorder.url, "concurrency = 2"))
    async with running(config) as relay:
        recorder.open.clear()
        ids = {await accepted(relay.addresses.public, f"session {number}") for number in range(12)}
        await until(lambda: recorder.busy == 2)
        await fill_up(relay, disk)
        recorder.open.set()
        lane = relay.app.dispatcher.lanes["crm"]
        await until(lambda: lane.held == "waiting for storage")
        begun = len(recorder.ids)
        [shown] = (await relay.operator("GET", "/api/destinations"))["items"]
        assert shown["held"] == "waiting for storage"
        assert await refused(relay.addresses.public)
        for _ in range(20):
            assert relay.app._stuck() == []
            await asyncio.sleep(0.05)  # twice the patience above, many times over
        assert len(recorder.ids) == begun <= 4
        disk.clear()
        await until(lambda: set(recorder.ids) == ids, HEALED)
        await until(lambda: lane.held is None)
        ids.add(await until_accepted(relay.addresses.public))
        await until(lambda: set(recorder.ids) == ids)
    assert len(recorder.ids) == len(ids)  # nothing was sent twice


async def test_on_a_full_disk_deliveries_continue_with_the_reserve(tmp_path, disk, recorder):
    config = write_config(tmp_path, SOURCES, destination("crm", recorder.url))
    async with running(config) as relay:
        recorder.open.clear()
        ids = {await accepted(relay.addresses.public, f"session {number}") for number in range(50)}
        await relay.app.store.upkeep.compact()
        ballast = relay.app.store.disk.ballast
        assert ballast.stat().st_size == DISK_RESERVE
        assert ballast.stat().st_mode & 0o777 == 0o600
        disk.fill()
        recorder.open.set()

        def delivered():
            return relay.counted("relay_deliveries_finished_total", destination="crm", outcome="delivered")

        await until(lambda: delivered() == len(ids))
        assert not ballast.exists()
        assert await refused(relay.addresses.public) == "Out of disk space"
        assert set(recorder.ids) == ids
        disk.clear()
        await until_accepted(relay.addresses.public)
        assert ballast.stat().st_size == DISK_RESERVE


async def test_a_locked_database_fails_no_work_permanently(tmp_path, recorder):
    config = write_config(tmp_path, SOURCES, destination("crm", recorder.url))
    async with running(config) as relay:
        recorder.open.clear()
        ids = {await accepted(relay.addresses.public)}
        with closing(sqlite3.connect(tmp_path / "state" / "relay.db", isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            recorder.open.set()
            await until(lambda: relay.app.store.failure == "database is locked", 20)
            assert await refused(relay.addresses.public) == "Storage is unavailable"
            assert relay.app._stuck() == []
            other.execute("ROLLBACK")
        ids.add(await until_accepted(relay.addresses.public))
        await until(lambda: set(recorder.ids) == ids)


async def test_outcomes_that_wait_for_the_store_are_logged_at_a_limited_rate(tmp_path, recorder, caplog):
    config = write_config(tmp_path, SOURCES, destination("crm", recorder.url, "concurrency = 10"))
    async with running(config) as relay:
        recorder.open.clear()
        ids = {await accepted(relay.addresses.public) for _ in range(10)}
        await until(lambda: recorder.busy == 10)
        store = relay.app.store
        with patch.object(
            store.deliveries, "settle", side_effect=StorageError("database is locked")
        ) as settle:
            recorder.open.set()
            await until(lambda: settle.call_count > 30)
            assert caplog.text.count("cannot store results yet: database is locked") == 1
        await until(lambda: not store.ledger.pending())
    assert sorted(recorder.ids) == sorted(ids)  # nothing was sent twice


async def test_the_floor_counts_the_bytes_that_are_about_to_be_written(tmp_path):
    floor = 16 * MIB
    with small_disk(tmp_path / "state", 48 * MIB) as disk:
        config = write_config(tmp_path, SOURCES)
        config.write_text(config.read_text().replace('"1 MiB"', '"16 MiB"'))
        async with running(config) as relay:
            relay.app.jobs.stop()  # the floor holds without the check of each second
            answers = []
            text = "x" * MIB

            async def sender(number):
                while not answers or answers[-1].status == 200:
                    answers.append(
                        await exchange(relay.addresses.public, post(f"{number}", payload={"t": text}))
                    )

            await asyncio.gather(*map(sender, range(8)))
            assert sum(answer.status == 200 for answer in answers) > 4
            assert {answer.status for answer in answers} == {200, 503}
            assert answers[-1].json["message"] == "Out of disk space"
            assert disk.free >= floor
            await relay.app.store.upkeep.compact()
            assert disk.free >= floor  # also once the log is in the file
            assert await accepted(relay.addresses.public)  # a small one fits
            stored = await relay.rows()
            assert len(stored) == sum(answer.status == 200 for answer in answers) + 1


async def test_retention_alone_frees_a_disk_that_the_relay_filled(tmp_path, disk):
    config = write_config(tmp_path, SOURCES, '[retention]\nevents = "1s"\n')
    async with running(config) as relay:
        text = "x" * 400_000
        relay.app.store.disk.floor = 0  # as if other programs filled the disk
        while (await exchange(relay.addresses.public, post(payload={"t": text}))).status == 200:
            pass
        relay.app.store.disk.floor = MIB
        disk.fill()
        await until(lambda: relay.app.ingest.admission.disk_full)
        assert await refused(relay.addresses.public) == "Out of disk space"
        await asyncio.sleep(1)  # until the events are old enough to be deleted
        done = await relay.app.jobs.run("retention")
        assert done.error is None
        assert await until_accepted(relay.addresses.public)
        assert disk.free >= MIB


async def test_large_requests_that_find_no_room_are_reported_and_retention_runs_early(
    tmp_path, disk, monkeypatch
):
    monkeypatch.setattr("relay.app.RETENTION_EVERY", 0.5)
    config = write_config(tmp_path, SOURCES, '[retention]\nevents = "1d"\n')
    async with running(config) as relay:
        payload = {"t": "x" * 400_000}
        refused_twice = False
        while not refused_twice:
            while (await exchange(relay.addresses.public, post(payload=payload))).status == 200:
                pass
            await relay.app.store.upkeep.compact()  # the log is in the file, so it frees no more space
            refused_twice = (await exchange(relay.addresses.public, post(payload=payload))).status == 503
        assert disk.free >= MIB
        await until(lambda: relay.app.disk_forecast.space.lacking)
        assert await accepted(relay.addresses.public)  # a small one fits
        status = await relay.operator("GET", "/api/status")
        assert status["ready"] is True
        [problem] = status["problems"]
        assert problem["what"].startswith("large requests are refused with 503")
        config.write_text(config.read_text().replace('"1d"', '"1s"'))
        await relay.operator("POST", "/api/reload")
        await until_accepted(relay.addresses.public, 3 * HEALED, payload=payload)
        await until(lambda: not relay.app.disk_forecast.space.lacking)
        assert (await relay.operator("GET", "/api/status"))["problems"] == []


async def test_an_import_stops_at_the_floor(tmp_path, disk):
    async with running(write_config(tmp_path, SOURCES)) as relay:
        await accepted(relay.addresses.public)
        lines = (await exchange(relay.addresses.socket, request("GET", "/api/export"))).body
        relay.app.store.disk.floor = 1000 * MIB
        relay.app.store.disk.measure()
        assert lines
        answer = await exchange(relay.addresses.socket, request("POST", "/api/import", lines))
        assert answer.status == 503, answer
        assert "min_free_disk" in answer.json["error"]["message"]


def test_free_space_is_reported_after_the_folder_is_gone(tmp_path):
    (tmp_path / "state").mkdir()
    disk = Disk(tmp_path / "state" / "relay.db")
    disk.prepare()
    (tmp_path / "state").rmdir()
    assert disk.free() > 0
    disk.close()


async def test_a_stop_waits_for_room_for_the_only_rescue_copy(tmp_path, disk):
    database = tmp_path / "state" / "relay.db"
    async with Daemon(write_config(tmp_path, SOURCES)) as daemon:
        ids = [await accepted(daemon.url, note="x" * (MIB // 2)) for _ in range(10)]
        await until(lambda: database.with_name("relay.db-wal").stat().st_size == 0)
        disk.fill()
        database.unlink()
        stopping = asyncio.create_task(daemon.stop())
        await until(lambda: "the relay stops as soon as the copy succeeds: free space in" in daemon.output)
        assert not stopping.done()
        disk.clear()
        assert await stopping == 0
    [copy] = rescues_of(database)
    with closing(sqlite3.connect(f"file:{copy}?mode=ro", uri=True)) as reader:
        assert [id_ for (id_,) in reader.execute("SELECT public_id FROM events ORDER BY id")] == ids
