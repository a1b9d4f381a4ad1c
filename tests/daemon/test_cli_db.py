"""`relay db` and `relay doctor`, with a running and a stopped relay; and their API."""

import asyncio
import json
import sqlite3

import pytest
from commands import run
from daemons import SOURCES, adorn, destination, running, write_config
from stores import KINDS, only_sqlite
from support import until
from wire import exchange, request

from relay.cli import db, offline

CARELESS = {"durability", "partitions", "vacuum"} if KINDS[0] == "postgres" else set()
"""Checks that fail on the server of the tests: it does not sync or clean up, and has partitions for a day."""


@pytest.fixture
def config(tmp_path):
    return write_config(tmp_path, SOURCES, destination("crm", "http://127.0.0.1:9/hook"))


@pytest.fixture
async def relay(config):
    async with running(config) as relay:
        await relay.operator("POST", "/api/destinations/crm/pause")
        for session in ("s-1", "s-2"):
            await relay.exchange(request("POST", "/v1/events", adorn(session)))
        yield relay


def offline_run(config, *args, code=0):
    return asyncio.to_thread(run, *args, "-c", config, code=code)


async def stopped(relay):
    relay.app.stopping.set()
    await until(lambda: not relay.addresses.socket.exists())


async def test_an_invalid_url_is_reported_and_no_other_database_is_read(tmp_path):
    """The default, relay.db, would be damaged or missing, and the advice would be to restore a backup."""
    config = write_config(tmp_path, SOURCES, url="postgresql://relay:secret@db/relay")
    for words in (("doctor", "--offline"), ("events", "list", "--offline"), ("db", "check")):
        shown = await offline_run(config, *words, code=1)
        assert "storage.url: the URL contains a password" in shown.err
        assert "relay.db" not in shown.out + shown.err


async def test_db_status_shows_contents_and_sizes(relay, commands, config):
    answer = (await commands("db", "status", "--json")).json
    assert (answer["events"], answer["pending"], answer["backups"]) == (2, 2, [])
    assert answer["path"] == relay.app.store.location
    assert answer["oldest"] < answer["newest"]
    assert answer["bytes"] > 4096
    rows = dict((await commands("db", "status")).rows)
    assert rows["events"] == "2"
    assert rows["bytes"].endswith("iB")
    await stopped(relay)
    answer = (await offline_run(config, "db", "status", "--offline", "--json")).json
    assert (answer["events"], answer["pending"]) == (2, 2)


@only_sqlite("backups of its file")
async def test_the_daemon_backs_up_to_its_folder(relay, commands, config):
    done = (await commands("db", "backup", "--json")).json
    assert done["events"] == 2
    assert done["path"].startswith(str(relay.app.state_dir.path / "backups" / "relay-"))
    [made] = (await commands("db", "status", "--json")).json["backups"]
    assert (made["path"], made["bytes"]) == (done["path"], done["bytes"])
    assert made["path"] in (await commands("db", "status")).out
    await stopped(relay)
    there = (await offline_run(config, "db", "status", "--offline", "--json")).json
    assert there["backups"] == [made]


@only_sqlite("backups of its file")
async def test_the_command_backs_up_to_any_file(relay, config, tmp_path):
    file = tmp_path / "copy.db"
    result = await offline_run(config, "db", "backup", file)
    assert result.out.startswith(f"{file}: 2 events, ")
    assert file.stat().st_mode & 0o777 == 0o600
    result = await offline_run(config, "db", "backup", file, code=1)
    assert result.err == f"{file} already exists\n  name another file, or add --force\n"
    assert (await offline_run(config, "db", "backup", file, "--force", "--json")).json["deliveries"] == 2
    await stopped(relay)
    await offline_run(config, "db", "backup", tmp_path / "again.db")
    checked = (await offline_run(config, "db", "check", tmp_path / "again.db", "--json")).json
    assert [check["name"] for check in checked["checks"]] == list(db.CHECKS[1:])
    assert checked["ok"] is True


@only_sqlite("backups of its file")
async def test_a_damaged_file_fails_its_check(relay, config, tmp_path):
    file = tmp_path / "copy.db"
    await offline_run(config, "db", "backup", file)
    with sqlite3.connect(file) as connection:
        connection.execute("UPDATE events SET body = CAST(replace(body, 's-1', 's-9') AS BLOB)")
    result = await offline_run(config, "db", "check", file, code=1)
    assert ["bodies", "FAILED"] in [row[:2] for row in result.rows]
    assert result.err.startswith("1 check failed\n  bodies: stop the relay, keep the file")
    file.write_bytes(b"SQLite format 3\0" + b"?" * 4096)
    assert "FAILED" in (await offline_run(config, "db", "check", file, code=1)).out


@only_sqlite("a missing file")
async def test_a_missing_database_is_an_error(config, tmp_path):
    result = await offline_run(config, "db", "check", code=1)
    assert "no database at" in result.err
    result = await offline_run(config, "db", "backup", tmp_path / "x.db", code=1)
    assert "no database at" in result.err
    result = await offline_run(config, "db", "status", "--offline", code=1)
    assert "it is created when the relay first runs" in result.err
    assert "--force needs FILE" in (await offline_run(config, "db", "backup", "--force", code=2)).err


@only_sqlite("compaction of its file")
async def test_compact_reports_the_size_before_and_after(relay, commands):
    for _ in range(20):
        await relay.exchange(request("POST", "/v1/events", adorn("big", payload={"text": "x" * 50_000})))
    await commands("events", "delete", "--subject", "big", "--yes")
    done = (await commands("db", "compact", "--json")).json
    assert done["after"] < done["before"]
    assert done["whole"] is True
    assert (await commands("db", "compact")).out.endswith(" after\n")


@only_sqlite("the place of its file")
async def test_the_database_is_found_where_the_unit_puts_it(relay, tmp_path, monkeypatch):
    monkeypatch.setattr(offline, "STATE", relay.app.state_dir.path)
    elsewhere = tmp_path / "etc"
    elsewhere.mkdir()
    other = write_config(elsewhere, SOURCES)
    assert (await offline_run(other, "db", "status", "--offline", "--json")).json["events"] == 2


async def test_the_doctor_passes_for_a_healthy_relay(relay, commands, config):
    await commands("deliveries", "cancel", "--destination", "crm", "--yes")
    result = await commands("doctor", code=1 if CARELESS else 0)
    assert {row[0] for row in result.rows if row[1] != "ok"} <= CARELESS
    names = [row[0] for row in result.rows]
    assert names[-3:] == ["ready", "jobs", "config"]
    await stopped(relay)
    result = await offline_run(config, "doctor", "--offline", "--json", code=1 if CARELESS else 0)
    failed = {check["name"] for check in result.json["checks"] if not check["ok"]}
    assert failed | {"partitions"} == CARELESS | {"partitions"}  # an earlier test may have made them
    of_daemons = {"wakeups", *names[-3:]}
    assert [check["name"] for check in result.json["checks"]] == [
        name for name in names if name not in of_daemons
    ]


PORT = 'listen = "127.0.0.1:{}"\nshutdown'


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (('events = ["*"]', 'events = ["adorn.*"]'), ("changed destinations.crm", "config: relay reload")),
        ((PORT.format(0), PORT.format(1)), ("server.listen", "restart the daemon")),
        (("development", "develpment"), ('did you mean "development"', "correct it before")),
    ],
)
async def test_the_doctor_reports_a_changed_configuration(commands, config, change, found):
    config.write_text(config.read_text().replace(*change))
    result = await commands("doctor", code=1)
    [row] = [row for row in result.rows if row[0] == "config"]
    assert row[1] == "FAILED"
    assert found[0] in row[2]
    assert found[1] in result.err


async def test_the_effective_configuration_has_every_default_and_no_secret(relay):
    answer = await exchange(relay.addresses.socket, request("GET", "/api/config"))
    assert answer.json["config"]["retention"]["events"] == "14d"
    assert answer.json["config"]["destinations"]["crm"]["secrets"] == ["<secret>"]
    assert answer.json["path"].endswith("config.toml")
    assert "whsec" not in answer.body.decode()
    assert "dev-token" not in answer.body.decode()
    listed = (await exchange(relay.addresses.socket, request("GET", "/api/plugins"))).json
    assert json.loads(run("plugins", "list", "--json").out) == listed
    assert {each["name"] for each in listed["items"]} >= {"adorn", "compozy", "lazychat", "moddy", "whatsapp"}


def test_ctrl_c_stops_an_operation_in_a_thread(monkeypatch):
    begun = []

    def look(stop):
        begun.append(stop)
        assert stop.wait(10)

    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(db, "PROGRESS_EVERY", 0.01)
    with pytest.raises(Exception, match="interrupted: nothing was changed") as raised:
        db._in_thread(look, interrupted, "nothing was changed")
    assert raised.value.code == 130
    assert begun[0].is_set()
