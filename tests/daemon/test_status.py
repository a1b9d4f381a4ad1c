"""`GET /api/status`, and the latest events and successes of sources and destinations."""

from datetime import UTC, datetime, timedelta

import pytest
from daemons import SOURCES, Recorder, adorn, destination, running, write_config
from stores import KINDS, change_rows
from support import until
from wire import request

from relay.base.clock import SECOND
from relay.delivery.http.http_client import Certificate
from relay.jobs.activity import Rhythm
from relay.store import DiskSpace

HAS_FILE = KINDS[0] == "sqlite"  # the relay backs it up, and checks its disk
BACKUPS = '[backup]\nevery = "24h"\n' if HAS_FILE else ""
SERVER = [
    (
        "fsync or full_page_writes of the PostgreSQL server is off: a power failure damages the database",
        "relay doctor",
    )
]
"""Problems of the tests' PostgreSQL server."""
DAY = 86_400 * SECOND
OLD = "relay-20240101T000000Z.db"


def problems(status):
    return [(each["what"], each["next"]) for each in status["problems"]]


def near(text, seconds=120):
    """Return whether an RFC 3339 time is close to now."""
    return abs(datetime.now(UTC) - datetime.fromisoformat(text)) < timedelta(seconds=seconds)


async def test_a_healthy_relay_has_no_problems_and_a_restart_forgets_nothing(tmp_path):
    async with Recorder() as receiver:
        url = receiver.url.replace("127.0.0.1", "localhost")
        config = write_config(tmp_path, SOURCES, destination("crm", url), BACKUPS)
        async with running(config) as relay:
            status = await relay.operator("GET", "/api/status")
            none = {"last_success": None, "bytes": None, "kept": 0, "overdue": False, "error": None}
            assert status["backups"] == ({**none, "interval": "1d"} if HAS_FILE else None)
            assert (await relay.operator("GET", "/api/sources/adorn"))["last_event"] is None
            assert (await relay.operator("GET", "/api/destinations/crm"))["last_success"] is None
            await relay.exchange(request("POST", "/v1/events", adorn()))
            await until(lambda: relay.app.dispatcher.lanes["crm"].last_success)
            await relay.app.jobs.run("backup")
            before = await relay.operator("GET", "/api/status")
        assert problems(before) == ([] if HAS_FILE else SERVER)
        if HAS_FILE:
            disk = before["disk"]
            assert disk["folder"] == str(tmp_path / "state")
            assert disk["free"] > disk["min_free"] == 2**20
            assert (disk["full"], disk["days_left"]) == (False, None)
        else:
            assert before["disk"] is None
        async with running(config) as relay:
            after = await relay.operator("GET", "/api/status")
            await relay.app.jobs.run("backup")  # makes no backup, because none is due
            backups = {
                name: relay.counted(f"relay_backup_{name}")
                for name in ("last_success_timestamp_seconds", "size_bytes", "interval_seconds")
            }
            await until(lambda: relay.app.activity.last_success("crm"))
            sources = (await relay.operator("GET", "/api/sources"))["items"]
            [source] = [each for each in sources if each["name"] == "adorn"]
            [crm] = (await relay.operator("GET", "/api/destinations"))["items"]
            shown = await relay.operator("GET", "/api/destinations/crm")
    assert after["backups"] == before["backups"]
    if HAS_FILE:
        assert near(after["backups"]["last_success"])
        assert after["backups"]["kept"] == 1
        assert backups["last_success_timestamp_seconds"] > 1_700_000_000
        assert backups["size_bytes"] == after["backups"]["bytes"] > 10_000
        assert backups["interval_seconds"] == 86_400
    else:
        assert set(backups.values()) == {0}
    assert near(source["last_event"])
    assert source["silent"] is False
    assert near(crm["last_success"])
    assert crm == {key: value for key, value in shown.items() if key in crm}
    assert (crm["url_host"], crm["paused_by"], crm["paused_until"], crm["certificate_expires"]) == (
        "localhost", None, None, None,
    )  # fmt: skip


@pytest.fixture
async def troubled(tmp_path):
    """A relay with every problem that an operator can solve."""
    (tmp_path / "state" / "backups").mkdir(parents=True)
    (tmp_path / "state" / "backups" / OLD).write_bytes(bytes(1000))
    targets = [destination(name, "http://127.0.0.1:9/x") for name in ("crm", "erp", "gone", "old")]
    async with running(write_config(tmp_path, SOURCES, *targets, BACKUPS)) as relay:
        app = relay.app
        for path in ("destinations/crm/pause", "destinations/gone/disable", "sources/moddy/pause"):
            await relay.operator("POST", f"/api/{path}")
        await relay.exchange(request("POST", "/v1/events", adorn()))
        await until(lambda: app.activity.usual_gap("compozy") == 0 and "compozy" in app.activity._rhythms)
        rhythm = app.activity._rhythms["compozy"] = Rhythm()
        for _ in range(7 * 24):
            rhythm.hours.add(active=True)
        rhythm.measure()
        rhythm.minutes.empty = 200
        app.dispatcher.lanes["erp"].health.rest(60 * SECOND)
        old = app.dispatcher.lanes["old"]
        now = app.clock.wall()
        old._runner.client.certificate = Certificate(now - 80 * DAY, now + 10 * DAY + 3600 * SECOND)
        app.dispatcher.lanes["erp"]._runner.client.certificate = Certificate(now - 4 * DAY, now + 2 * DAY)
        app.backups._applied = app.backups._config().backup
        await change_rows(app.store, "UPDATE ledger SET created = created + 1 WHERE destination = 'crm'")
        await app.ledger_check.check()
        await change_rows(app.store, "UPDATE ledger SET created = created - 1 WHERE destination = 'crm'")
        app.reloads.failed = "config.toml:3: server.listen: expected host:port"
        app.jobs.stop()  # the job `disk` would change the forecast
        app.disk_forecast._samples.clear()
        app.disk_forecast._samples.extend([(0, 0), (86_400 * SECOND, 1_000_000_000_000)])
        yield relay


async def test_each_problem_names_the_next_command_the_worst_first(troubled, tmp_path):
    relay = troubled
    relay.app.disk_forecast.space = DiskSpace(tmp_path, free=2 * 10**12, floor=0, is_full=False)
    status = await relay.operator("GET", "/api/status")
    assert status["ready"] is True
    assert status["disk"]["days_left"] == 2
    if HAS_FILE:
        assert status["backups"]["overdue"] is True
    assert problems(status) == [
        ("at the pace of the last day, the disk will be full in 2 days", "relay db status"),
        ("the ledger of crm does not balance, a bug in the relay; difference: 1", "relay doctor"),
        ("crm is paused; 1 delivery waits", "relay destinations resume crm"),
        ("erp is held (backing off); 1 delivery waits", "relay destinations show erp"),
        ("gone is disabled (by an operator); 1 delivery waits", "relay destinations enable gone"),
        *(
            [("the latest backup is too old, or there is none", "relay jobs run backup")]
            if HAS_FILE
            else SERVER
        ),
        (
            "the last reload failed: config.toml:3: server.listen: expected host:port",
            f"relay check-config {tmp_path / 'config.toml'}",
        ),
        (
            "compozy is silent: no event for 3 hours; usually one arrives within 60 minutes",
            "relay sources show compozy",
        ),
        ("moddy is paused: its senders get 503", "relay sources resume moddy"),
        ("the certificate of old expires in 10 days", "relay destinations test old"),
    ]
    relay.app.disk_forecast.space = DiskSpace(tmp_path, 3 * 2**20, 2**20, is_full=False, lacking=2**22)
    space = f"3 MiB free in {tmp_path}, min_free_disk is 1 MiB"
    lacking = await relay.operator("GET", "/api/status")
    assert lacking["ready"] is True
    assert problems(lacking)[0] == (
        f"large requests are refused with 503, because the disk has no room for them; {space}",
        f"df -h {tmp_path}",
    )  # fmt: skip
    relay.app.ingest.admission.disk_full = True
    full = await relay.operator("GET", "/api/status")
    assert problems(full)[0] == (
        f"not ready: less free space than min_free_disk; {space}", f"df -h {tmp_path}",
    )  # fmt: skip
    assert not any("at the pace" in each["what"] for each in full["problems"])
    items = (await relay.operator("GET", "/api/destinations"))["items"]
    assert {each["name"]: each["paused_by"] for each in items} == {
        "crm": "operator", "erp": None, "gone": None, "old": None,
    }  # fmt: skip
    sources = (await relay.operator("GET", "/api/sources"))["items"]
    assert [each["name"] for each in sources if each["silent"]] == ["compozy"]
