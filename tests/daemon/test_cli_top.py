"""`relay top`: one snapshot, lines of JSON, and a screen that leaves no trace."""

import json
import re

import pytest
from commands import Commands, Terminal, run
from daemons import Daemon, adorn
from support import until
from wire import request

from relay.cli.screen import clip
from relay.cli.top import lines


def snapshot(sources=1, destinations=1, **more):
    """Return a snapshot."""
    rates = {"attempts_per_second": 0.0, "delivered_per_second": 0.0, "failed_per_second": 0.0}
    return {
        "version": "1", "uptime_seconds": 60, "ready": True, "reasons": [], "backlog": 1204,
        "commit_ms": None, "loop_lag_ms": 0.5, "workers": {"ONLINE": 2}, "events_per_second": 12.5, **rates,
        "sources": [
            {"name": f"s{n}", "paused": n == 1, "events_per_second": n * 1.0} for n in range(sources)
        ],
        "destinations": [
            {"name": f"d{n}", "held": "paused" if n == 7 else None, "circuit": "closed", "pending": n,
             "in_flight": 0, **rates} for n in range(destinations)
        ],
        **more,
    }  # fmt: skip


async def test_without_a_terminal_top_prints_one_snapshot(relay):
    await relay.operator("POST", "/api/destinations/crm/pause")
    await relay.exchange(request("POST", "/v1/events", adorn()))
    result = await Commands(relay.addresses.socket)("top")
    assert re.match(r"hookferry \S+, up \S+, ready\nbacklog: 1 delivery; per second: ", result.out)
    assert re.search(r"^SOURCE +PAUSED +EVENTS/S$", result.out, re.MULTILINE)
    assert re.search(r"^crm +paused +1 +0 ", result.out, re.MULTILINE)
    assert "\x1b" not in result.out


async def test_once_as_json_is_the_snapshot(relay):
    result = await Commands(relay.addresses.socket)("top", "--once", "--json")
    assert result.json["destinations"][0]["name"] == "crm"


async def test_json_is_one_snapshot_per_line_until_ctrl_c(relay):
    async with Terminal("top", "--json", "--socket", relay.addresses.socket) as terminal:
        await until(lambda: terminal.out.count("\n") >= 2, 20)
        assert await terminal.interrupt() == 130
    first, second = map(json.loads, terminal.out.splitlines()[:2])
    assert first["at"] < second["at"]
    assert terminal.err == ""


def test_a_daemon_that_never_ran_exits_with_3(tmp_path):
    run("top", "--socket", tmp_path / "none", code=3)


async def test_the_screen_is_redrawn_in_place_and_restored(relay):
    socket = relay.addresses.socket
    async with Terminal("top", "--socket", socket, rows=30, columns=60) as terminal:
        await until(lambda: terminal.out.count("\x1b[H") >= 2, 20)
        assert await terminal.interrupt() == 130
    assert terminal.out.startswith("\x1b[?1049h\x1b[?25l\x1b[H")
    assert terminal.out.endswith("\x1b[?25h\x1b[?1049l")
    assert terminal.err == ""
    assert "\x1b[32mready\x1b[0m" in terminal.out
    [_, *screens] = terminal.out.split("\x1b[H")
    drawn = [re.sub(r"\x1b\[[?0-9;]*[a-zA-Z]", "", line) for text in screens for line in text.splitlines()]
    assert max(map(len, drawn)) == 60
    await until(lambda: not relay.app.api._top._followers)


async def test_sigterm_restores_the_terminal(relay):
    async with Terminal("top", "--socket", relay.addresses.socket) as terminal:
        await terminal.shows("ready")
        terminal.process.terminate()
        assert await terminal.exit() == 143
    assert terminal.out.endswith("\x1b[?25h\x1b[?1049l")


async def test_a_dumb_terminal_gets_one_snapshot_without_escapes(relay):
    async with Terminal("top", "--socket", relay.addresses.socket, TERM="dumb") as terminal:
        assert await terminal.exit() == 0
    assert "crm" in terminal.out
    assert "\x1b" not in terminal.out


async def test_the_screen_reports_a_stopped_daemon_and_continues_after_its_restart(config):
    socket = config.parent / "state" / "relay.sock"
    async with Daemon(config) as daemon, Terminal("top", "--socket", socket) as terminal:
        await terminal.shows("ready")
        assert await daemon.stop() == 0
        await terminal.shows("the daemon stopped; waiting for it to restart")
        drawn = terminal.out.count("per second")
        async with Daemon(config):
            await until(lambda: terminal.out.count("per second") > drawn + 1, 20)
            assert await terminal.interrupt() == 130


@pytest.mark.parametrize("rows", [8, 12, 24, 100])
def test_the_tables_fit_the_screen(monkeypatch, rows):
    monkeypatch.setenv("NO_COLOR", "1")
    drawn = lines(snapshot(sources=9, destinations=40), rows)
    assert len(drawn) <= rows or rows == 8
    if rows < 60:
        assert any(re.fullmatch(r"… and \d+ destinations more", line) for line in drawn)
        assert any(line.startswith("d7 ") for line in drawn), "what is held comes first where not all fit"
    else:
        assert len([line for line in drawn if re.match(r"[sd]\d", line)]) == 49


def test_a_daemon_that_is_not_ready_has_its_reasons(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    drawn = lines(snapshot(ready=False, reasons=["draining"]))
    assert drawn[0] == "hookferry 1, up 1m, not ready: draining"
    assert drawn[1].startswith("backlog: 1 204 deliveries; per second: 12.5 events, 0 attempts")
    assert drawn[2] == "workers: 2 ONLINE; commit: -; loop lag: 0.5 ms"


def test_a_coloured_line_is_cut_by_its_visible_width():
    assert clip("\x1b[31mdead\x1b[0m, and more", 2) == "\x1b[31mde\x1b[0m"
    assert clip("short", 80) == "short"
