"""`relay workers`, `status`, `explain` and `completion`."""

import json
import re

import pytest
from commands import run
from daemons import SOURCES, adorn, destination, running, write_config
from wire import request

TOKEN = {"Authorization": "Bearer worker-secret-token-12345"}


@pytest.fixture
async def relay(tmp_path):
    config = write_config(
        tmp_path, SOURCES, destination("crm", "http://127.0.0.1:9/", 'where = { "data.n" = 2 }')
    )
    async with running(config) as relay:
        body = json.dumps({"version": "1.2", "sessions": [{"id": "s1", "status": "connected"}]}).encode()
        for worker in ("w1", "w2"):
            answer = await relay.exchange(
                request("PUT", f"/api/v1/workers/{worker}/heartbeat", body, **TOKEN)
            )
            assert answer.status == 200
        yield relay


async def test_workers_are_listed_by_filter_and_page(commands):
    rows = (await commands("workers", "list", "--status", "ONLINE")).rows
    assert [row[:3] for row in rows] == [["w1", "whatsapp", "ONLINE"], ["w2", "whatsapp", "ONLINE"]]
    page = (await commands("workers", "list", "--limit", "1", "--json")).json
    assert (await commands("workers", "list", "--cursor", page["next_cursor"], "-q")).out == "w2\n"
    assert (await commands("workers", "list", "--version", "9")).out == ""


async def test_a_worker_is_shown_with_its_commands(commands):
    result = await commands("workers", "command", "whatsapp", "w1", "restart", '{"reason": "update"}')
    assert result.out.endswith(": queued\n")
    rows = (await commands("workers", "show", "whatsapp", "w1")).rows
    assert ["version", "1.2"] in rows
    assert rows[-1][4] == '{"reason": "update", "type": "restart"}'
    assert (await commands("workers", "show", "whatsapp", "w1", "--json")).json["id"] == "w1"


@pytest.mark.parametrize(("more", "message"), [("{", "invalid JSON"), ("[]", "expected an object")])
async def test_a_command_that_is_not_an_object_exits_with_2(commands, more, message):
    assert message in (await commands("workers", "command", "whatsapp", "w1", "restart", more, code=2)).err


async def test_maintenance_begins_and_ends(commands):
    assert (await commands("workers", "maintenance", "whatsapp", "w1", "on")).out == "w1: MAINTENANCE\n"
    answer = (await commands("workers", "maintenance", "whatsapp", "w1", "off", "--json")).json
    assert answer["id"] == "w1"
    assert not answer["maintenance"]


async def test_maintenance_of_a_pattern_has_an_end(commands):
    result = await commands("workers", "maintenance", "--pattern", "w*", "--for", "2h")
    assert re.fullmatch(r"2 workers in maintenance until \d{4}-\S+Z\n", result.out)
    rows = (await commands("workers", "list", "--status", "MAINTENANCE")).rows
    assert [row[0] for row in rows] == ["w1", "w2"]
    assert result.out.split()[-1] == rows[0][-1]
    result = await commands("workers", "maintenance", "whatsapp", "off", "--pattern", "w2")
    assert result.out == "1 worker out of maintenance\n"
    shown = (await commands("workers", "show", "whatsapp", "w1", "--json")).json
    assert (shown["maintenance_by"], shown["maintenance_until"]) == ("operator", rows[0][-1])
    result = await commands("workers", "maintenance", "whatsapp", "w1", "--for", "30m")
    assert result.out.startswith("w1: MAINTENANCE until ")
    result = await commands("workers", "maintenance", "--pattern", "batch-*", "on", code=4)
    assert result.err.startswith('no worker matches "batch-*"\n  list workers: relay workers list')


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["whatsapp", "w1"], 2, "write on or off, or a duration with --for"),
        (["on"], 2, "name a SOURCE and a WORKER, or --pattern"),
        (["whatsapp", "w1", "on", "--pattern", "w*"], 2, "--pattern names workers of one SOURCE"),
        (["--pattern", "w*", "off", "--for", "1h"], 2, "--for needs on"),
        (["--pattern", "w*", "--for", "0s"], 2, "expected a duration longer than 0"),
        (["whatsap", "on", "--pattern", "w*"], 4, 'unknown source "whatsap", did you mean "whatsapp"?'),
        (["--pattern", "", "on"], 1, '"pattern": a pattern must not be empty'),
    ],
)
async def test_an_unclear_maintenance_is_refused(commands, words, code, message):
    assert message in (await commands("workers", "maintenance", *words, code=code)).err


async def test_forget_needs_confirmation(commands):
    assert (
        "Forget 1 worker, w1? Add --yes"
        in (await commands("workers", "forget", "whatsapp", "w1", code=2)).err
    )
    assert (await commands("workers", "forget", "whatsapp", "w1", "--yes")).out == "w1: forgotten\n"
    result = await commands("workers", "forget", "whatsapp", "w1", "--yes", code=4)
    assert result.err == 'unknown worker "w1" of source "whatsapp"\n  list them: relay workers list\n'


async def test_the_status_is_one_screen(commands):
    await commands("sources", "pause", "moddy")
    result = await commands("status")
    head, sources, workers, backlog, *rows = result.out.splitlines()
    assert head.startswith("hookferry ")
    assert head.endswith(", ready")
    assert (sources, workers) == ("5 sources, paused: moddy", "workers: 2 ONLINE")
    assert backlog.startswith("backlog: ")
    assert rows[0].startswith("crm\t")
    assert "moddy is paused: its senders get 503\n  relay sources resume moddy\n" in result.err
    assert (await commands("status", "--json")).json["workers"] == {"ONLINE": 2}


async def test_a_daemon_that_is_not_ready_exits_with_1_and_the_reasons(commands, relay):
    relay.app.health.phase = "draining"
    result = await commands("status", code=1)
    assert "not ready: draining" in result.out


async def test_an_event_is_explained_per_destination(commands, relay):
    answer = await relay.exchange(request("POST", "/v1/events", adorn(payload={"n": 1})))
    event = answer.json["event_id"]
    [[name, why]] = (await commands("explain", event[:-2])).rows
    assert name == "crm"
    assert why.startswith("no: ")
    assert "data.n" in why
    shown = (await commands("explain", event, "--json")).json
    assert (shown["id"], shown["destinations"][0]["held"]) == (event, None)  # it does not match


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script_per_shell(shell):
    assert "_COMPLETE=" in run("completion", shell).out.replace("_COMPLETE ", "_COMPLETE=")
