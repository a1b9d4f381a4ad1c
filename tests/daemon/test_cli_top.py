"""`relay top`: one snapshot, lines of JSON, and a screen that leaves no trace."""

import json
import re
import termios

import pytest
from commands import Commands, Terminal, run
from daemons import Daemon, adorn
from support import until
from wire import request

from relay.cli.screen import clip
from relay.cli.top import History, View, frame, lines


def snapshot(sources=1, destinations=1, **more):
    """Return a snapshot."""
    rates = {"attempts_per_second": 0.0, "delivered_per_second": 0.0, "failed_per_second": 0.0}
    return {
        "at": "2026-01-31T12:00:00.000Z", "version": "1", "uptime_seconds": 60,
        "ready": True, "reasons": [], "backlog": 1204,
        "commit_ms": None, "loop_lag_ms": 0.5, "workers": {"ONLINE": 2}, "events_per_second": 12.5, **rates,
        "sources": [
            {"name": f"s{n}", "paused": n == 1, "events_per_second": n * 1.0} for n in range(sources)
        ],
        "destinations": [
            {"name": f"d{n}", "held": "paused" if n == 7 else None, "circuit": "closed", "pending": n,
             "in_flight": 0, "last_error": None, "last_error_at": None, **rates} for n in range(destinations)
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


def drawn(out):
    """Return all lines that were drawn, without colours."""
    return [
        re.sub(r"\x1b\[[?0-9;]*[a-zA-Z]", "", line)
        for text in out.split("\x1b[H")[1:] for line in text.splitlines()
    ]  # fmt: skip


async def test_keys_filter_pause_and_quit(relay):
    socket = relay.addresses.socket
    async with Terminal("top", "--socket", socket, rows=24, columns=80, keys=True) as terminal:
        await terminal.shows("q quit   p pause   / filter")
        terminal.press("/adrn\x7f\x7fo")
        await terminal.shows("/ado█")
        terminal.press("\r")
        await terminal.shows("filter: ado")
        latest = terminal.out.rpartition("\x1b[H")[2]
        assert "\nadorn " in latest.replace("\r", "")
        assert "\ncompozy " not in latest.replace("\r", "")
        terminal.press("p")
        await terminal.shows("PAUSED")
        end = len(terminal.out)
        terminal.resize(20, 60)
        await until(lambda: "PAUSED" in terminal.out[end:])
        assert max(map(len, drawn(terminal.out[end:]))) <= 60
        terminal.press("p\x1b")
        await until(lambda: "\ncompozy " in terminal.out[end:].replace("\r", ""))
        terminal.press("q")
        assert await terminal.exit() == 0
        assert termios.tcgetattr(terminal._ours) == terminal.mode
    assert terminal.out.endswith("\x1b[?25h\x1b[?1049l")
    assert terminal.err == ""


async def test_ctrl_c_in_the_terminal_restores_it(relay):
    async with Terminal("top", "--socket", relay.addresses.socket, keys=True) as terminal:
        await terminal.shows("q quit")
        assert await terminal.interrupt() == 130
        assert termios.tcgetattr(terminal._ours) == terminal.mode
    assert terminal.out.endswith("\x1b[?25h\x1b[?1049l")


async def test_the_screen_is_redrawn_in_place_and_restored(relay):
    socket = relay.addresses.socket
    async with Terminal("top", "--socket", socket, rows=30, columns=60) as terminal:
        await until(lambda: terminal.out.count("\x1b[H") >= 2, 20)
        assert await terminal.interrupt() == 130
    assert terminal.out.startswith("\x1b[?1049h\x1b[?25l\x1b[H")
    assert terminal.out.endswith("\x1b[?25h\x1b[?1049l")
    assert terminal.err == ""
    assert "\x1b[32mready\x1b[0m" in terminal.out
    assert max(map(len, drawn(terminal.out))) == 60
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
        before = terminal.out.count("Delivered")
        async with Daemon(config):
            await until(lambda: terminal.out.count("Delivered") > before + 1, 20)
            assert await terminal.interrupt() == 130


def viewed(found):
    view = View()
    view.add(found)
    return view


@pytest.mark.parametrize("rows", [12, 16, 24, 100])
def test_the_tables_fit_the_screen(monkeypatch, rows):
    monkeypatch.setenv("NO_COLOR", "1")
    shown = frame(viewed(snapshot(sources=9, destinations=40)), 80, rows)
    assert len(shown) == rows
    if rows < 60:
        assert any(re.fullmatch(r"… \d+ destinations more", line) for line in shown)
        assert any(line.startswith("d7 ") for line in shown), "held destinations come first if not all fit"
    else:
        assert len([line for line in shown if re.match(r"[sd]\d", line)]) == 49


def test_destinations_scroll(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    view = viewed(snapshot(sources=0, destinations=40))
    for _ in range(9):
        view.press("page down")
    shown = frame(view, 80, 24)
    assert any(line.startswith("d39 ") for line in shown)
    view.press("up")
    assert not any(line.startswith("d39 ") for line in frame(view, 80, 24))


def test_a_pause_keeps_snapshots_for_the_history():
    view = viewed(snapshot(backlog=1))
    view.press("p")
    view.add(snapshot(backlog=2, at="2026-01-31T12:00:01.000Z"))
    assert view.snapshot["backlog"] == 1
    view.press("p")
    assert view.snapshot["backlog"] == 2
    assert view.history.bars("backlog", 3)[0] == " ▅█"


def test_the_line_of_keys_leaves_out_keys_that_do_not_fit():
    view = viewed(snapshot())
    view.has_keys = True
    for key in ("p", *"/billing", "\r"):
        view.press(key)
    notes = "PAUSED   filter: billing (Esc clears it)   q quit   p continue   / filter"
    assert frame(view, 80, 24)[-1] == notes
    assert frame(view, 120, 24)[-1] == f"{notes}   ↑↓ scroll"


def test_the_history_of_the_daemon_precedes_the_first_snapshot():
    view = View()
    view.add_history(
        {
            "until": "2026-01-31T11:59:58.000Z", "step_seconds": 10.0,
            "sources": [
                {"name": "s0", "events": [None, 10, 20, 5], "refused": [None, 0, 0, 0]},
                {"name": "s1", "events": [None, None, 60, 0], "refused": [None, None, 0, 0]},
            ],
            "destinations": [
                {
                    "name": "d0", "succeeded": [None, 1, 2, 3], "failed": [None, 0, 0, 40],
                    "pending": [None, 1, 1, 9],
                },
            ],
        }
    )  # fmt: skip
    view.add(snapshot(sources=2, events_per_second=2.0, backlog=4))
    assert view.history.bars("events_per_second", 4) == ("▂█▂▃", 8.0, 40)
    assert view.history.bars("failed_per_second", 4)[:2] == ("▁▁█▁", 4.0)
    assert view.history.bars("backlog", 4)[0] == "▂▂█▄"
    assert view.history.bars("source s1", 3)[0] == "█▁▂"


@pytest.mark.parametrize(
    ("samples", "bars", "seconds"),
    [
        ([], "", 0),
        ([(0, 0)], "   ▁", 4),
        ([(0, 1), (1, 8), (2, 4)], " ▂█▅", 4),
        ([(0, 1), (1.9, 1), (4, 1)], " ███", 8),  # 2 s each; snapshots are not exactly a second apart
        ([(at, 1) for at in range(40)] + [(55, 1)], "██·█", 40),
    ],
)
def test_a_history_covers_the_time_since_the_start(samples, bars, seconds):
    history = History()
    for at, value in samples:
        history.add("x", at, value)
    shown, _, covered = history.bars("x", 4)
    assert (shown, covered) == (bars, seconds)


def test_a_daemon_that_is_not_ready_has_its_reasons(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    piped = lines(snapshot(ready=False, reasons=["draining"]))
    assert piped[0] == "hookferry 1, up 1m, not ready: draining"
    assert piped[1].startswith("backlog: 1 204 deliveries; per second: 12.5 events, 0 attempts")
    assert piped[2] == "workers: 2 ONLINE; commit: -; loop lag: 0.5 ms"


def test_a_coloured_line_is_cut_by_its_visible_width():
    assert clip("\x1b[31mdead\x1b[0m, and more", 2) == "\x1b[31mde\x1b[0m"
    assert clip("short", 80) == "short"


@pytest.mark.parametrize(
    ("columns", "rows", "place"),
    [(80, None, "own table"), (80, 30, "own table"), (80, 16, None), (120, 30, "column")],
)
def test_a_narrow_screen_lists_the_latest_errors_below_the_destinations(columns, rows, place):
    shown = snapshot(destinations=3)
    error = {"last_error": "HTTP 503 Service Unavailable", "last_error_at": "2026-01-31T11:59:00.000Z"}
    shown["destinations"][1] |= {"name": "d1" + "-long" * 8, "held": "paused in config.toml", **error}
    lines = frame(viewed(shown), columns, rows)
    found = [line for line in lines if "503 Service Unavailable" in line]
    assert len(found) == (place is not None)
    if place is not None:
        assert ("paused in config.toml" in found[0]) is (place == "column")
        assert any(line.startswith("DESTINATION") and "LAST ERROR" in line for line in lines)
    assert rows is None or len(lines) == rows
