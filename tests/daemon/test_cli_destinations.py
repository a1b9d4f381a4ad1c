"""`relay destinations` and `relay sources` against a running relay."""

import asyncio
import re

import pytest
from commands import Commands, run
from daemons import SOURCES, Recorder, adorn, destination, running, write_config
from support import until
from wire import exchange, request

from relay.base.clock import SECOND, SystemClock, instant

GONE = destination("gone", "http://127.0.0.1:1")


@pytest.fixture
async def relay(tmp_path):
    async with Recorder() as recorder:
        config = write_config(tmp_path, SOURCES, destination("crm", recorder.url))
        async with running(config) as relay:
            await relay.exchange(request("POST", "/v1/events", adorn("s-1")))
            done = {"destination": "crm", "outcome": "delivered"}
            await until(lambda: relay.counted("relay_deliveries_finished_total", **done))
            yield relay


async def test_destinations_are_listed_with_their_counts(commands):
    [[name, held, pending, *_]] = (await commands("destinations", "list")).rows
    assert (name, held, pending.isdigit()) == ("crm", "", True)
    assert (await commands("destinations", "list", "-q")).out == "crm\n"
    [item] = (await commands("destinations", "list", "--json")).json["items"]
    assert item["created"] == 1


@pytest.mark.parametrize(
    ("stop", "go_on", "held"),
    [("pause", "resume", "paused"), ("disable", "enable", "disabled: operator")],
)
async def test_a_destination_is_paused_and_resumed(commands, stop, go_on, held):
    assert (await commands("destinations", stop, "crm")).out == f"crm: {held}\n"
    result = await commands("destinations", "show", "crm")
    assert ["held", held] in result.rows
    assert ["latest_type", "adorn.session.started"] in result.rows
    assert f"`relay destinations {go_on} crm`" in result.err
    assert (await commands("destinations", go_on, "crm", "--json")).json["held"] is None
    assert (await commands("destinations", "show", "crm")).err == ""


CLOCK = SystemClock()


async def test_a_pause_ends_after_the_given_time(commands, relay):
    before = CLOCK.steady()
    shown = (await commands("destinations", "pause", "crm", "--for", "1h", "--json")).json
    end = instant(shown["paused_until"])
    assert abs(end - before - 3600 * SECOND) < 10 * SECOND
    assert shown["paused_by"] == "operator"
    assert ["paused_until", shown["paused_until"]] in (await commands("destinations", "show", "crm")).rows
    event = (await relay.operator("GET", "/api/events"))["items"][0]["id"]
    explained = (await commands("explain", event)).err
    assert f"crm: held now (paused until {shown['paused_until']}); sent when the hold ends\n" in explained
    result = await commands("destinations", "pause", "crm", "--for", "2h")  # replaces the first pause
    assert re.fullmatch(r"crm: paused until \d{4}-\S+Z\n", result.out)
    assert shown["paused_until"] not in result.out
    assert (await commands("destinations", "pause", "crm")).out == "crm: paused\n"  # without an end
    assert (await commands("destinations", "resume", "crm")).out == "crm: delivering\n"
    for text in ("0s", "soon", "-1h"):
        result = await commands("destinations", "pause", "crm", "--for", text, code=2)
        assert "expected a duration" in result.err


@pytest.mark.parametrize("body", [b'{"for": "soon"}', b'{"for": "0s"}', b'{"for": 3600}', b'{"until": "1h"}'])
async def test_a_pause_of_no_duration_is_refused(relay, body):
    answer = await exchange(relay.addresses.socket, request("POST", "/api/destinations/crm/pause", body))
    assert answer.status == 400
    assert answer.json["error"]["message"].startswith(('"for": expected a duration', "invalid body: "))


async def test_config_toml_wins_over_resume(tmp_path):
    crm = destination("crm", "http://127.0.0.1:1", "paused = true")
    config = write_config(tmp_path, SOURCES, crm)
    async with running(config) as relay:
        commands = Commands(relay.addresses.socket)
        await commands("destinations", "pause", "crm", "--for", "1h")
        result = await commands("destinations", "resume", "crm", code=1)
        text = config.read_text()
        line = 1 + text[: text.index("paused = true")].count("\n")
        assert result.err == (
            f"crm is paused in the configuration: {config}:{line}: destinations.crm.paused: true\n"
            "  set it to false, or delete the line, and run: relay reload\n"
        )
        shown = (await commands("destinations", "show", "crm", "--json")).json
        assert (shown["held"], shown["paused_by"], shown["paused_until"]) == (
            "paused in config.toml", "config", None
        )  # fmt: skip
        assert "relay reload" in (await commands("destinations", "show", "crm")).err
        config.write_text(text.replace("paused = true\n", ""))
        result = await commands("destinations", "resume", "crm", code=1)
        assert "the file has changed since the daemon read it; run: relay reload" in result.err
        await commands("reload")
        assert (await commands("destinations", "resume", "crm")).out == "crm: delivering\n"


async def test_the_name_is_the_first_field(commands):
    for words in (["destinations", "show", "crm"], ["sources", "show", "adorn"]):
        assert (await commands(*words)).rows[0] == ["name", words[-1]]
    assert list((await commands("destinations", "list", "--json")).json["items"][0])[:2] == ["name", "held"]


async def test_show_has_the_backlog_its_age_and_the_reason(commands, relay):
    shown = (await commands("destinations", "show", "crm", "--json")).json
    assert (shown["due"], shown["oldest"]) == (0, None)
    await commands("destinations", "pause", "crm")
    first, *_ = [(await relay.exchange(request("POST", "/v1/events", adorn(s)))).json for s in ("s-2", "s-3")]
    shown = (await commands("destinations", "show", "crm", "--json")).json
    assert (shown["pending"], shown["due"], shown["oldest"]["event_id"]) == (2, 2, first["event_id"])
    rows = (await commands("destinations", "show", "crm")).rows
    assert ["oldest_created_at", shown["oldest"]["created_at"]] in rows
    assert ["oldest_state", "pending"] in rows


async def test_resume_of_a_destination_that_stays_held_has_a_hint(commands):
    await commands("destinations", "pause", "crm")
    await commands("destinations", "disable", "crm")
    result = await commands("destinations", "resume", "crm")
    assert result.out == "crm: disabled: operator\n"
    assert result.err == "enable it with `relay destinations enable crm`; it then gets its backlog\n"


async def test_the_backlog_of_a_stopped_relay_is_read_from_its_file(tmp_path):
    config = write_config(tmp_path, SOURCES, destination("crm", "http://127.0.0.1:1"), GONE)
    async with running(config) as relay:
        commands = Commands(relay.addresses.socket)
        for name in ("crm", "gone"):
            await commands("destinations", "pause", name)
        await relay.exchange(request("POST", "/v1/events", adorn("s-1")))
        there = (await commands("destinations", "show", "crm", "--json")).json
        listed = (await commands("destinations", "list")).rows
    config.write_text(config.read_text().replace(GONE, ""))

    async def offline(*args, code=0):
        return await asyncio.to_thread(run, "destinations", *args, "--offline", "-c", config, code=code)

    assert (await offline("show", "crm", "--json")).json == {**there, "in_flight": None, "circuit": None}
    assert "`relay destinations resume crm`" in (await offline("show", "crm")).err
    rows = (await offline("list")).rows
    assert [row[:3] for row in rows] == [["crm", "paused", "1"], ["gone", "not_in_config", "1"]]
    assert rows[0][4:] == listed[0][4:]
    assert (await offline("show", "gone", "--json")).json["oldest"]["state"] == "pending"
    assert 'unknown destination "cmr", did you mean "crm"?' in (await offline("show", "cmr", code=4)).err


@pytest.mark.parametrize(
    ("more", "held", "message"),
    [
        (
            'url = "http://127.0.0.1:1"',
            "resting",
            "to test the destination and deliver now, run `relay destinations test other --close-circuit`",
        ),
        (
            'url = "http://127.0.0.1:1"\nallow_private = true',
            "",
            "to retry them now, run `relay deliveries retry --destination other --state pending`",
        ),
    ],
)
async def test_the_error_of_a_waiting_delivery_is_shown_with_a_hint(tmp_path, more, held, message):
    other = f'[destinations.other]\nevents = ["*"]\n{more}'
    async with running(write_config(tmp_path, SOURCES, other)) as relay:
        await relay.exchange(request("POST", "/v1/events", adorn("s-1")))
        commands = Commands(relay.addresses.socket)
        async with asyncio.timeout(30):
            while not (await relay.rows("deliveries"))[0]["last_error"]:
                pass
        result = await commands("destinations", "show", "other")
        shown = dict(result.rows)
        assert shown["held"] == held
        assert "127.0.0.1" in shown["oldest_last_error"]
        assert message in result.err


async def test_a_source_is_paused_and_resumed(commands, relay):
    assert (await commands("sources", "pause", "adorn")).out == "adorn: paused\n"
    assert (await relay.exchange(request("POST", "/v1/events", adorn()))).status == 503
    assert ["adorn", "adorn", "", "yes"] in (await commands("sources", "list")).rows
    assert (await commands("sources", "resume", "adorn", "--json")).json == {"name": "adorn", "paused": False}
    assert (await relay.exchange(request("POST", "/v1/events", adorn()))).status == 200


async def test_a_source_is_shown_with_its_latest_event(commands):
    rows = (await commands("sources", "show", "adorn")).rows
    assert ["plugin", "adorn"] in rows
    assert ["latest_type", "adorn.session.started"] in rows
    assert ["workers.offline_after", "1m30s"] in rows
    assert not [row for row in rows if "{" in "".join(row)]
    assert (await commands("sources", "show", "moddy", "--json")).json["latest"] is None


@pytest.mark.parametrize("noun", ["destinations", "sources"])
@pytest.mark.parametrize("verb", ["show", "pause"])
async def test_an_unknown_name_exits_with_4_and_lists_the_names(commands, noun, verb):
    result = await commands(noun, verb, "crn", code=4)
    assert "known: " in result.err
