"""Each fault of a database is found by its own check, and by no other check."""

import asyncio
import os
import shutil
import sqlite3
from pathlib import Path

import pytest
from stores import end, hooks, only_sqlite, opened, send

from relay.base.clock import SECOND
from relay.model import Heartbeat, Register, Target, Unregister
from relay.store import Acceptance, Stop, checks
from relay.store.sqlite import doctor
from relay.store.sqlite.doctor import Examined, examine

pytestmark = only_sqlite("checks of its file, before any connection")
NAMES = [
    "sqlite", "permissions", "disk", "fsync", "losses", "version", "history", "integrity", "conservation",
    "stuck", "dead", "bodies", "clock", "room", "destinations", "sources", "workers",
]  # fmt: skip


@pytest.fixture
def path(tmp_path, clock):
    """The database of a stopped relay, with deliveries in several states."""

    async def fill():
        async with opened(tmp_path / "relay.db", clock) as store:
            owed = (Target("crm", order_key="a"), Target("erp"))
            hooks(store).route = lambda event: () if event.source == "relay" else owed
            events = [await send(store, clock, body=b'{"n": %d}' % number) for number in range(9)]
            await end(store, events[0], "delivered", "erp")
            await end(store, events[1], "expired", "erp")

    asyncio.run(fill())
    return tmp_path / "relay.db"


def described(path, clock, **known):
    return Examined(**{"path": path, "now": clock.wall(), "destinations": ["crm", "erp"], **known})


def failed(path, clock, **known):
    """Return detail and hint of each check that is not ok."""
    checks = examine(described(path, clock, **known), Stop())
    return {check.name: (check.detail, check.hint) for check in checks if not check.ok}


def change(path, sql):
    database = sqlite3.connect(path)
    database.executescript(sql)
    database.close()
    for suffix in ("-wal", "-shm", ".mark"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)


def test_a_sound_database_passes_every_check_and_is_not_changed(path, clock):
    before = path.read_bytes()
    checks = examine(described(path, clock), Stop())
    assert [check.name for check in checks] == NAMES
    assert [check for check in checks if not check.ok or check.hint or not check.detail] == []
    assert path.read_bytes() == before
    assert sorted(file.name for file in path.parent.iterdir()) == ["relay.db", "relay.db.mark"]


async def test_a_running_relay_examines_itself(tmp_path, clock):
    async with opened(tmp_path / "relay.db", clock) as store:
        await send(store, clock)
        checks = await store.upkeep.examine(destinations=["crm", "erp"])
    assert [check.name for check in checks if check.ok] == NAMES


async def test_an_empty_database_passes_every_check(tmp_path, clock):
    async with opened(tmp_path / "relay.db", clock) as store:
        assert all(check.ok for check in await store.upkeep.examine(destinations=[]))


@pytest.mark.parametrize(
    ("sql", "name", "detail"),
    [
        ("UPDATE ledger SET created = created + 2 WHERE destination = 'crm'", "conservation", r"crm (+2)"),
        (
            "DELETE FROM deliveries WHERE destination = 'erp' AND state = 'pending'",
            "conservation",
            "erp (+7)",
        ),
        ("UPDATE events SET body = x'7b7d' WHERE id = 1", "bodies", "the body of evt_"),
        (
            "UPDATE events SET body = CAST(replace(CAST(body AS TEXT), '8', '7') AS BLOB) WHERE id = 9",
            "bodies",
            "does not match its sha256",
        ),
        (
            "UPDATE deliveries SET next_attempt_at = NULL WHERE id = 1",
            "stuck",
            "deliveries that never become due: 1, the first is dlv_",
        ),
        (
            "PRAGMA foreign_keys = OFF; DELETE FROM events WHERE id = 5",
            "integrity",
            "a row of deliveries refers to a missing row of events",
        ),
        ("PRAGMA user_version = 99", "version", "schema version 99, this program knows"),
        ("PRAGMA auto_vacuum = NONE; VACUUM", "room", "never returned to the disk"),
    ],
)
def test_a_fault_in_the_tables_is_found(path, clock, sql, name, detail):
    change(path, sql)
    found = failed(path, clock)
    assert list(found) == [name]
    assert detail in found[name][0]
    assert found[name][1]


@pytest.mark.parametrize("heard", [True, False])
async def test_a_silent_worker_whose_id_needs_percent_encoding_is_found(path, clock, heard):
    async with opened(path, clock) as store:
        for id_ in ("a#b", "a/b", "w"):
            await store.events.append(Acceptance(source="whatsapp", change=Register(worker_id=id_)))
        await store.events.append(Acceptance(source="whatsapp", change=Register(worker_id="gone?")))
        await store.events.append(Acceptance(source="whatsapp", change=Unregister(worker_id="gone?")))
        clock.advance(91)
        if heard:
            await store.events.append(Acceptance(source="whatsapp", change=Heartbeat(worker_id="a#b")))
        await store.workers.sweep()
    checks = {check.name: check for check in examine(described(path, clock), Stop())}
    assert checks["workers"].ok is heard
    if heard:
        assert checks["workers"].detail == "workers whose clients percent-encode their ids: 1"
    else:
        assert checks["workers"].detail.endswith("percent-encoding in paths: 'a#b' of whatsapp ('#')")


def test_a_damaged_page_is_found_and_hides_no_other_check(path, clock):
    with path.open("r+b") as file:
        file.seek(4096 * 4 + 2)
        file.write(b"\xff" * 600)
    found = failed(path, clock)
    assert "integrity" in found
    assert "restore a backup" in found["integrity"][1]
    assert len(examine(described(path, clock), Stop())) == len(NAMES)


def test_a_file_that_is_not_a_database_fails_every_check_that_reads_it(path, clock):
    path.write_bytes(b"this is no database, and never was" * 500)
    found = failed(path, clock)
    assert "file is not a database" in found["version"][0]
    assert "sqlite" not in found


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to(path)])
def test_a_path_that_is_not_a_file_is_named_and_not_waited_for(path, clock, make):
    path.unlink()
    make(path)
    assert "open" in failed(path, clock)


def test_a_missing_file_is_named(tmp_path, clock):
    found = failed(tmp_path / "relay.db", clock)
    assert set(found) == {"permissions", "open"}
    assert str(tmp_path / "relay.db") in found["permissions"][0]


def test_a_file_that_others_can_read_is_found(path, clock):
    path.chmod(0o644)
    assert failed(path, clock)["permissions"] == (f"{path} has mode 0644", f"chmod 600 {path}")


def test_a_disk_below_its_floor_is_found(path, clock):
    free = shutil.disk_usage(path.parent).free
    [(name, (detail, hint))] = failed(path, clock, min_free=free * 2).items()
    assert (name, "min_free_disk is" in detail) == ("disk", True)
    assert hint.startswith(f"find out what uses the space: df -h {path.parent}, relay db status;")
    assert hint.endswith("run: relay reload && relay jobs run retention")


def test_a_disk_without_room_for_a_large_request_is_found(path, clock, monkeypatch):
    free = 10 * 2**20
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, free))
    assert failed(path, clock, min_free=free - 3 * 2**20) == {}
    [(name, (detail, _))] = failed(path, clock, min_free=free - 2 * 2**20).items()
    assert (name, detail) == (
        "disk", f"10 MiB free in {path.parent}, min_free_disk is 8 MiB: no room for a request of 1 MiB",
    )  # fmt: skip


def test_a_slow_disk_is_found(path, clock, monkeypatch):
    monkeypatch.setattr(doctor, "SLOW_FSYNC", 0.0)
    assert list(failed(path, clock)) == ["fsync"]


def test_an_event_from_the_future_is_found(path, clock):
    early = clock.wall() - 301 * SECOND
    assert list(failed(path, clock, now=early)) == ["clock"]
    assert failed(path, clock, now=early + SECOND) == {}


def test_a_log_that_does_not_shrink_is_found(path, clock, monkeypatch):
    monkeypatch.setattr(doctor, "LONG_LOG", -1)
    assert list(failed(path, clock)) == ["room"]


def test_pending_deliveries_of_an_unconfigured_destination_are_found(path, clock):
    assert failed(path, clock, destinations=["crm"])["destinations"][0].endswith(
        "not in config.toml: erp (7)"
    )
    assert failed(path, clock, destinations=None) == {}


async def test_dead_deliveries_are_found_until_they_are_repeated(tmp_path, clock):
    path = tmp_path / "relay.db"
    async with opened(path, clock) as store:
        first = await send(store, clock)
        await end(store, first, "dead")
        await end(store, await send(store, clock), "dead", "crm")
    detail, hint = failed(path, clock)["dead"]
    assert detail == "dead deliveries: crm (2), erp (1)"
    assert "relay deliveries retry --destination crm --state dead" in hint
    assert "relay deliveries retry --destination erp --state dead" in hint
    async with opened(path, clock) as store:
        [event] = [row for row in await store.queries.find("events") if row["id"] == first.public_id]
        loaded = (await store.events.load([event["row"]]))[event["row"]]
        await store.deliveries.repeat([(loaded, Target("crm")), (loaded, Target("erp"))])
    assert failed(path, clock)["dead"][0] == "dead deliveries: crm (1)"


async def test_a_paused_source_is_found_if_it_is_configured(tmp_path, clock):
    path = tmp_path / "relay.db"
    async with opened(path, clock) as store:
        await store.events.pause_source("shop", paused=True)
    assert failed(path, clock)["sources"] == (
        "paused, their senders get 503: shop",
        "relay sources resume shop",
    )
    assert failed(path, clock, sources=["till"]) == {}


def test_bodies_are_sampled_evenly_and_the_latest_is_among_them(path, clock, monkeypatch):
    monkeypatch.setattr(checks, "SAMPLE", 3)
    [bodies] = [check for check in examine(described(path, clock), Stop()) if check.name == "bodies"]
    assert bodies.detail == "sampled bodies that match their sha256: 5"  # of nine
    change(path, "UPDATE events SET body = x'7b7d' WHERE id = (SELECT max(id) FROM events)")
    assert list(failed(path, clock)) == ["bodies"]


def test_the_search_for_stuck_deliveries_reads_pending_rows_only(path):
    database = sqlite3.connect(path)
    plan = [row[3] for row in database.execute(f"EXPLAIN QUERY PLAN {doctor.STUCK_SQL}", ("crm",))]
    database.close()
    assert not any(step.startswith("SCAN") for step in plan), plan
    assert any("deliveries_order" in step for step in plan)
