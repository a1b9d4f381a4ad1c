"""`relay tail`: piped, on a terminal, over a restart, and ended by Ctrl-C."""

import asyncio
import json
import re
import signal

import pytest
from commands import RELAY, Commands, Terminal, run
from daemons import Daemon, adorn
from support import until
from wire import exchange, request

from relay.cli import tail
from relay.cli.tail import COLUMNS

TYPE = "adorn.session.started"


async def send(relay, session="s-1"):
    answer = await relay.exchange(request("POST", "/v1/events", adorn(session)))
    return answer.json["event_id"]


async def followed(relay):
    await until(lambda: relay.app.api._tail._followers)


async def tailed(relay, *args):
    """Begin `relay tail` in a thread, and wait until it follows."""
    command = asyncio.create_task(Commands(relay.addresses.socket)("tail", *args))
    await followed(relay)
    return command


async def test_a_piped_line_has_its_columns_and_limit_ends_it(relay, recorder):
    recorder.answers.append((500, {}))
    command = await tailed(relay, "--limit", "3")
    event = await send(relay)
    result = await command
    first, second, third = (dict(zip(("at", *COLUMNS), row, strict=True)) for row in result.rows)
    assert (first["what"], first["type"], first["source"], first["subject"]) == (
        "event",
        TYPE,
        "adorn",
        "s-1",
    )
    assert first["event_id"] == event
    assert (second["what"], second["destination"], second["result"], second["status"]) == (
        "attempt", "crm", "5xx", "500",
    )  # fmt: skip
    assert (second["state"], second["attempt"], second["event_id"]) == ("pending", "1", event)
    assert second["next_attempt_at"] > second["at"]
    assert (third["result"], third["state"], third["next_attempt_at"]) == ("ok", "delivered", "")
    assert third["delivery_id"] == second["delivery_id"]
    assert "\x1b" not in result.out


async def test_the_past_comes_first_with_payloads(relay):
    event = await send(relay)
    await until(
        lambda: relay.counted("relay_deliveries_finished_total", destination="crm", outcome="delivered")
    )
    command = await tailed(relay, "--since", "1h", "--payload", "--limit", "4")
    later = await send(relay, "s-2")
    [first, second, third, fourth] = (await command).rows
    assert [row[1] for row in (first, second, third, fourth)] == ["event", "attempt", "event", "attempt"]
    assert (len(first), len(second)) == (len(COLUMNS) + 2, len(COLUMNS) + 1)
    assert json.loads(first[-1])["session_id"] == "s-1"
    found = dict(zip(COLUMNS, second[1:], strict=True))
    assert (found["event_id"], found["attempt"], found["state"]) == (event, "", "delivered")
    assert json.loads(third[-1])["session_id"] == "s-2"
    assert dict(zip(COLUMNS, fourth[1:], strict=True))["event_id"] == later


async def test_json_is_one_object_per_line(relay):
    command = await tailed(relay, "--json", "--limit", "2")
    event = await send(relay)
    first, second = map(json.loads, (await command).out.splitlines())
    assert (first["what"], first["id"]) == ("event", event)
    assert (second["what"], second["event_id"]) == ("attempt", event)


async def test_filters_go_to_the_relay(relay, recorder):
    recorder.answers.append((500, {}))
    command = await tailed(relay, "--failed", "--destination", "crm", "--type", "adorn.*", "--limit", "1")
    await send(relay)
    [row] = (await command).rows
    assert row[1 + COLUMNS.index("result")] == "5xx"


async def test_an_invalid_follow_has_its_exit_code(relay):
    result = await Commands(relay.addresses.socket)("tail", "--source", "adron", code=4)
    assert result.err.startswith('unknown source "adron"')


def test_a_daemon_that_never_ran_exits_with_3(tmp_path):
    result = run("tail", "--socket", tmp_path / "none", code=3)
    assert "relay serve" in result.err


async def test_dropped_items_are_reported(relay, monkeypatch):
    monkeypatch.setattr(relay.app.api._tail._followers, "_room", 1)
    command = await tailed(relay, "--limit", "1")
    [follower] = relay.app.api._tail._followers
    for _ in range(3):
        follower.put(b'event: event\ndata: {"id":"evt","source":"a","type":"a.b","subject":null,'
                     b'"received_at":"2026-01-31T12:00:00.000Z","size":1}\n\n')  # fmt: skip
    assert (await command).err == "dropped 2 items: the output is slower than the events\n"


async def test_a_line_on_a_terminal_has_the_colour_of_its_state(relay, recorder):
    recorder.answers += [(500, {}), (503, {"webhook-delivery": "abort-message"})]
    async with Terminal("tail", "--limit", 3, "--socket", relay.addresses.socket) as terminal:
        await followed(relay)
        event = await send(relay, "s\x1b[2J")
        assert await terminal.exit() == 0
    first, failed, dead = terminal.out.splitlines()
    short = event[4:].replace("-", "")[:16]
    assert all(f"  {short}  " in line for line in (first, failed, dead))
    assert re.search(rf"  {TYPE} +s\\x1b\[2J, \d+ B$", first)
    assert "\x1b" not in first
    assert re.search(
        r"  → crm +\x1b\[33mretry (in 0s|due): 500 Internal Server Error, (<1|\d+) ms\x1b\[0m$", failed
    )
    assert re.search(
        r"  → crm +\x1b\[31mdead: 503 Service Unavailable, (<1|\d+) ms, attempt 2\x1b\[0m$", dead
    )


@pytest.mark.parametrize("environ", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
async def test_no_color_turns_colours_off(relay, environ):
    async with Terminal("tail", "--limit", 2, "--socket", relay.addresses.socket, **environ) as terminal:
        await followed(relay)
        await send(relay)
        assert await terminal.exit() == 0
    assert "\x1b" not in terminal.out


async def test_ctrl_c_ends_it_quietly_with_130(relay):
    async with Terminal("tail", "--socket", relay.addresses.socket) as terminal:
        await followed(relay)
        assert await terminal.interrupt() == 130
    assert (terminal.out, terminal.err) == ("", "")
    await until(lambda: not relay.app.api._tail._followers)


async def store(daemon, session):
    answer = await exchange(daemon.url, request("POST", "/v1/events", adorn(session)))
    return answer.json["event_id"]


async def test_tail_reconnects_after_a_restart_and_reports_missed_events(config, monkeypatch):
    socket = config.parent / "state" / "relay.sock"
    slowly = "from relay.cli import api_client, main; api_client.RETRY_EVERY = 5; main()"
    async with Daemon(config) as daemon:
        process = await asyncio.create_subprocess_exec(
            RELAY[0], "-c", slowly, "tail", "--source", "adorn", "--type", "adorn.*", "--json", "--socket",
            str(socket), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip

        async def heard():
            while True:
                line = json.loads(await process.stdout.readline())
                if line["what"] == "event":
                    return line["id"]

        async with asyncio.timeout(60):
            first = await until_heard(daemon, heard)
            assert first
            assert await daemon.stop() == 0
            assert b"the daemon stopped; waiting" in await process.stderr.readline()
    async with Daemon(config) as daemon:
        missed_ = [await store(daemon, f"m{number}") for number in range(2)]
        async with asyncio.timeout(60):
            line = (await process.stderr.readline()).decode()
            assert "reconnected after " in line
            assert "missed 2 events: relay events list --since 2" in line
            assert line.rstrip().endswith("--source adorn")
            assert await until_heard(daemon, heard) not in missed_
            process.send_signal(signal.SIGINT)
            assert await process.wait() == 130
            assert await process.stderr.read() == b""


async def until_heard(daemon, heard):
    """Send events until one is heard, because the command may take a moment to start following."""
    hearing = asyncio.create_task(heard())
    while not hearing.done():
        await store(daemon, "s")
        await asyncio.wait([hearing], timeout=0.1)
    return await hearing


class Answers:
    """Answers of the relay about the events that arrived meanwhile."""

    def __init__(self, *items, error=None):
        self._items = items
        self._error = error

    def get(self, *_path, **_query):
        if self._error is not None:
            raise self._error
        return {"items": list(self._items)}


def event(type_, at):
    return {"type": type_, "received_at": at}


@pytest.mark.parametrize(
    ("answers", "settings", "expected"),
    [
        (Answers(), {}, "no event was missed"),
        (Answers(event("a.b", "2"), event("a.b", "1")), {}, "missed 1 event: relay events list --since "),
        (Answers(event("a.b", "2"), event("a.c", "2")), {"pattern": "a.[c]"}, "missed 1 event: "),
        (Answers(*[event("a.b", "2")] * 500), {}, "missed 500 or more events: "),
        (Answers(error=tail.CommandError("gone")), {}, "list the missed events: relay events list"),
        (Answers(), {"events": False}, "were missed: relay deliveries list"),
    ],
)
def test_missed_events_are_counted_from_the_list(capsys, answers, settings, expected):
    gap = tail.Gap(answers, **{"source": None, "pattern": None, "events": True, **settings})
    gap.latest = "1"
    gap.start()
    gap.end()
    printed = capsys.readouterr()
    assert printed.out == ""
    assert expected in printed.err.splitlines()[1]


def test_ids_of_one_millisecond_stay_distinct_and_each_keeps_its_length(monkeypatch):
    monkeypatch.setattr(tail, "MOST_IDS", 3)
    first, second, third = (f"evt_0190aaaa-bbbb-7ccc-{digit}ddd-eeeeeeeeeeee" for digit in "89a")
    ids = tail.ShortIds()
    shown = [ids.of(each) for each in (first, second, third, first, second, third)]
    assert shown == ["0190aaaabbbb7ccc", "0190aaaabbbb7ccc9", "0190aaaabbbb7ccca"] * 2
    assert ids.of("evt_0190aaaa-cccc-7ccc-8ddd-eeeeeeeeeeee") == "0190aaaacccc7ccc"
    assert len(ids._known) == 3
