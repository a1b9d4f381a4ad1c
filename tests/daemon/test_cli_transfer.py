"""Export, import and deletion of events on the command line; and the counts of received events."""

import asyncio
import io
import json

import pytest
from commands import run
from daemons import adorn
from support import until
from wire import request

from relay.cli import events as events_command


async def post(relay, *sessions):
    return [
        (await relay.exchange(request("POST", "/v1/events", adorn(session)))).json["event_id"]
        for session in sessions
    ]


@pytest.fixture
async def events(relay):
    """Three delivered events, about two subjects."""
    found = await post(relay, "s-1", "s-2", "s-1")
    done = {"destination": "crm", "outcome": "delivered"}
    await until(lambda: relay.counted("relay_deliveries_finished_total", **done) == 3)
    return found


async def test_an_export_goes_to_stdout_or_a_file(commands, events, tmp_path):
    piped = (await commands("events", "export", "--subject", "s-1")).out.splitlines()
    assert [json.loads(line)["id"] for line in piped] == [events[0], events[2]]
    file = tmp_path / "out.jsonl"
    result = await commands("events", "export", "-o", file, "--deliveries")
    assert result.out == f"{file}: 3 events\n"
    assert file.stat().st_mode & 0o777 == 0o600
    assert json.loads(file.read_text().splitlines()[0])["deliveries"][0]["state"] == "delivered"
    assert [path.name for path in tmp_path.glob("out*")] == ["out.jsonl"]


async def test_an_export_overwrites_a_file_only_with_force(commands, events, tmp_path):
    file = tmp_path / "out.jsonl"
    file.write_text("mine")
    result = await commands("events", "export", "-o", file, code=1)
    assert result.err == f"{file} already exists\n  name another file, or add --force to overwrite it\n"
    assert file.read_text() == "mine"
    result = await commands("events", "export", "-o", file, "--force", "--json")
    assert result.json == {"events": 3, "file": str(file)}
    result = await commands("events", "export", "-o", tmp_path / "none" / "x", code=1)
    assert "cannot write" in result.err


async def test_an_interrupted_export_leaves_no_file(relay, commands, events, tmp_path, monkeypatch):
    def broken(_self, *_):
        raise KeyboardInterrupt

    monkeypatch.setattr(events_command.Meter, "text", broken)
    monkeypatch.setattr(events_command, "PROGRESS_EVERY", 2)
    result = await commands("events", "export", "-o", tmp_path / "out.jsonl", code=130)
    assert result.err == f"interrupted: {tmp_path / 'out.jsonl'} was not written\n"
    assert list(tmp_path.glob("out*")) == []


async def test_deleted_events_can_be_imported_again(relay, commands, events, tmp_path):
    file = tmp_path / "out.jsonl"
    await commands("events", "export", "-o", file)
    assert (await commands("events", "delete", "--source", "adorn", "--dry-run")).out == "3 events\n"
    result = await commands("events", "delete", "--source", "adorn", code=2)
    assert "Delete 3 events permanently? Add --yes to confirm" in result.err
    result = await commands("events", "delete", *events[:2], "--yes", "--json")
    assert result.json == {"count": 2, "deleted": 2, "cancelled": 0}
    assert (await commands("events", "delete", "--source", "adorn", "-y")).out == "1 event deleted\n"
    assert (await commands("events", "import", file)).out == "3 events read, 3 new\n"
    assert (await commands("events", "import", file, "--json")).json == {"lines": 3, "new": 0}
    assert [row["id"] for row in await relay.rows()] == events


async def test_a_deletion_cancels_pending_deliveries(relay, commands, recorder):
    recorder.answers.append((503, {}))
    await commands("destinations", "pause", "crm")
    await post(relay, "s-1")
    result = await commands("events", "delete", "--subject", "s-1", "-y")
    assert result.out == "1 event deleted, 1 delivery cancelled\n"


async def test_a_deletion_of_nothing_is_an_error(commands, events):
    assert "select events either by id or by a filter" in (await commands("events", "delete", code=2)).err
    result = await commands("events", "delete", "--subject", "nobody", "-y", code=4)
    assert result.err == "no event matches\n  `relay events list` lists events\n"
    await commands("events", "delete", "evt_00", "-y", code=4)


async def test_a_refused_import_names_the_line(relay, commands, events, tmp_path, monkeypatch):
    file = tmp_path / "long.jsonl"
    file.write_bytes(b"{}\n" * 2_000_000)
    monkeypatch.setattr(events_command, "CHUNK", 4096)
    result = await commands("events", "import", file, code=1)
    assert result.err.startswith("line 1: not an exported event: ")
    assert "0 new events before it are stored; correct the line" in result.err


async def test_an_import_from_a_pipe_shows_its_progress(relay, commands, events, monkeypatch):
    lines = (await commands("events", "export")).out.encode()
    shown = []
    monkeypatch.setattr(events_command, "show_progress", shown.append)
    result = await asyncio.to_thread(
        run, "events", "import", "-", "--socket", relay.addresses.socket, stdin=io.BytesIO(lines)
    )
    assert result.out == "3 events read, 0 new\n"
    assert shown == ["0.0 MiB sent", ""]


async def test_counts_are_listed_per_hour(commands, events):
    [row] = (await commands("stats", "--source", "adorn")).rows
    assert row[1:4] == ["adorn", "adorn.session.started", "3"]
    assert (await commands("stats", "-q", "--type", "adorn.*")).out == "adorn.session.started\n"
    assert (await commands("stats", "--since", "1d", "--json")).json["items"][0]["events"] == 3
    assert (await commands("stats", "--source", "moddy")).out == ""


async def test_every_reading_command_works_offline(relay, config, commands, events):
    online = (await commands("events", "export", "--subject", "s-1")).out
    counts = (await commands("stats", "--json")).json
    relay.app.stopping.set()
    await until(lambda: not relay.addresses.socket.exists())

    def offline(*args):
        return asyncio.to_thread(run, *args, "--offline", "-c", config)

    assert (await offline("events", "export", "--subject", "s-1")).out == online
    assert (await offline("stats", "--json")).json == counts
    result = await offline("stats", "--limit", "1", "--source", "adorn", "--json")
    assert result.json["items"][0]["events"] == 3
