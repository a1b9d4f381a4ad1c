"""Checks of the doctor besides the database: held deliveries, failed jobs and backups, file permissions."""

import asyncio
import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner
from commands import run
from daemons import PLUGINS, SERVE, SOURCES, Recorder, adorn, destination, running, write_config
from stores import only_sqlite
from support import until
from wire import request

from relay import doctor
from relay.base.clock import SECOND
from relay.cli import main
from relay.doctor import DestinationBacklog
from relay.plugin_loading.loader import load

HOUR = 3600 * SECOND


async def examined(relay, config):
    """Return the checks of a running relay, and those of its file."""
    ways = (("--socket", relay.addresses.socket), ("--offline", "-c", config))
    return [await asyncio.to_thread(_checks, *way) for way in ways]


def _checks(*options):
    result = CliRunner().invoke(main, ["doctor", "--json", *map(str, options)])
    return {check["name"]: check for check in json.loads(result.stdout)["checks"]}


def post(session="s"):
    return request("POST", "/v1/events", adorn(session))


@pytest.mark.parametrize(
    ("verb", "why", "advice"),
    [
        ("pause", "paused", "relay destinations resume crm"),
        ("disable", "disabled (by an operator)", "relay destinations enable crm"),
    ],
)
async def test_doctor_finds_a_destination_with_held_deliveries(tmp_path, verb, why, advice):
    config = write_config(tmp_path, SOURCES, destination("crm", "http://127.0.0.1:9/hook"))
    async with running(config) as relay:
        await relay.operator("POST", f"/api/destinations/crm/{verb}")
        for _ in range(9):
            await relay.exchange(post())
        for found in await examined(relay, config):
            assert found["held"]["ok"] is False
            assert found["held"]["detail"] == f"crm: 9 pending, {why}"
            assert advice in found["held"]["hint"]


async def test_doctor_finds_an_open_circuit_with_held_deliveries(tmp_path):
    circuit = 'circuit = { failures = 1, probe = "1h" }'
    config = write_config(tmp_path, SOURCES, destination("crm", "http://127.0.0.1:9/hook", circuit))
    async with running(config) as relay:
        for _ in range(3):
            await relay.exchange(post())
        await until(lambda: relay.app.dispatcher.lanes["crm"].held == "circuit open")
        online, offline = await examined(relay, config)
        assert online["held"]["detail"] == "crm: 3 pending, circuit open"
        assert online["held"]["hint"] == "relay destinations test crm --close-circuit"
        assert offline["held"]["detail"].startswith("crm: 3 pending, failing since ")


async def test_doctor_finds_dead_deliveries_and_paused_sources(tmp_path):
    async with Recorder() as receiver:
        receiver.answers.extend([(500, {})] * 5)
        config = write_config(tmp_path, SOURCES, destination("crm", receiver.url))
        async with running(config) as relay:
            await relay.exchange(post())
            await until(
                lambda: relay.counted("relay_deliveries_finished_total", destination="crm", outcome="dead")
            )
            await relay.operator("POST", "/api/sources/adorn/pause")
            for found in await examined(relay, config):
                assert found["dead"]["detail"] == "dead deliveries: crm (1)"
                assert "relay deliveries retry --destination crm --state dead" in found["dead"]["hint"]
                assert found["sources"]["hint"] == "relay sources resume adorn"


async def test_doctor_finds_a_failing_job(tmp_path):
    config = write_config(tmp_path, PLUGINS, SOURCES)
    async with running(config) as relay:

        async def broken():
            raise ValueError("boom")

        relay.app.jobs.add("shop.sync", 0.05, broken)
        await until(lambda: relay.app.jobs._jobs["shop.sync"].past.failures > 2)
        online, _ = await examined(relay, config)
        assert online["jobs"]["ok"] is False
        assert "shop.sync failed " in online["jobs"]["detail"]
        assert "ValueError: boom" in online["jobs"]["detail"]
        assert "relay jobs run shop.sync" in online["jobs"]["hint"]


@only_sqlite("backups of its file")
async def test_doctor_finds_failing_backups(tmp_path):
    config = write_config(tmp_path, SOURCES, '[backup]\nevery = "1d"\n')
    async with running(config) as relay:
        (tmp_path / "state" / "backups").write_text("in the way")
        await relay.app.jobs.run("backup")
        online, offline = await examined(relay, config)
        for name in ("backups", "jobs"):
            assert not online[name]["ok"]
            assert online[name]["hint"]
        assert "backups" in offline


async def test_doctor_reports_a_relay_that_is_not_ready(tmp_path):
    config = write_config(tmp_path, SOURCES)
    async with running(config) as relay:
        online, _ = await examined(relay, config)
        assert online["ready"]["ok"]
        relay.app.health.watch(lambda: "something is the matter")
        online, _ = await examined(relay, config)
        assert online["ready"]["detail"] == "something is the matter"


@only_sqlite("a folder in the place of its file")
@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to(path)])
async def test_doctor_reports_a_database_that_is_not_a_file(tmp_path, make):
    config = write_config(tmp_path, SOURCES)
    (tmp_path / "state").mkdir()
    make(tmp_path / "state" / "relay.db")
    async with asyncio.timeout(60):
        done = await asyncio.create_subprocess_exec(
            *SERVE[:-1], "doctor", "--offline", "-c", str(config),
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        result, _ = await done.communicate()
    assert done.returncode == 1
    assert b"open\tFAILED" in result
    assert b"Traceback" not in result
    assert b"unexpected error" not in result


def test_doctor_finds_a_failing_destination_after_ten_minutes():
    failing = DestinationBacklog(name="crm", held=None, pending=5, failing_since=0)
    assert doctor.held([failing], 599 * SECOND).ok
    assert not doctor.held([failing], 600 * SECOND).ok
    nothing_pending = DestinationBacklog(name="crm", held="paused", pending=0)
    assert doctor.held([nothing_pending], HOUR).ok


@pytest.mark.parametrize(
    "which", ["state", "state/relay.db.mark", "plugins.d", "plugins.d/shop.py", "config.toml", "."]
)
def test_doctor_finds_world_writable_files(tmp_path, which):
    config = write_config(tmp_path, SOURCES)
    for folder in ("state", "plugins.d"):
        (tmp_path / folder).mkdir(mode=0o755)
    (tmp_path / "state" / "relay.db.mark").touch(mode=0o600)
    tmp_path.chmod(0o755)
    loaded = load(config).config
    (tmp_path / "plugins.d" / "shop.py").touch(mode=0o644)
    assert doctor.writable(loaded, tmp_path / "state").ok
    path = tmp_path / which
    path.chmod(path.stat().st_mode | 0o002)
    found = doctor.writable(loaded, tmp_path / "state")
    assert found.detail == f"writable for every user: {path}"
    assert found.hint == f"chmod o-w {path}"


async def test_every_failed_check_names_the_next_command(tmp_path):
    config = write_config(tmp_path, SOURCES, destination("crm", "http://127.0.0.1:9/hook"))
    async with running(config) as relay:
        await relay.operator("POST", "/api/destinations/crm/disable")
        await relay.exchange(post())
        result = await asyncio.to_thread(run, "doctor", "--socket", relay.addresses.socket, code=1)
        assert "held: repair the receiver, then: relay destinations enable crm" in result.err
