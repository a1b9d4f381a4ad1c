"""`relay events` and `relay deliveries` against a running and a stopped relay."""

import asyncio
import re

import postgres
import pytest
import pytest_asyncio
import receivers
from commands import Commands, run
from daemons import SOURCES, Recorder, adorn, destination, running, write_config
from stores import KINDS
from support import until
from wire import request

from relay.cli.api_client import Daemon
from relay.routing.condition_text import read_conditions
from relay.routing.conditions import compile_conditions
from relay.store.queries import page as page_budget

BODY = adorn("s-1", payload={"total": "45000.00"})
OTHER = adorn("s-2")
REPLIES = re.compile(r'"replies": \[.*?\n  \]', re.DOTALL)
LAST_SUCCESS = re.compile(r"(last_success\W+\d{4}-\d\d-\d\dT).*?Z")


def finished(relay, outcome="delivered"):
    return relay.counted("relay_deliveries_finished_total", destination="crm", outcome=outcome)


async def deliver(relay):
    """Send two events, wait until both are delivered, and return their ids in order."""
    found = [
        (await relay.exchange(request("POST", "/v1/events", body))).json["event_id"] for body in (BODY, OTHER)
    ]
    await until(lambda: finished(relay) == 2)
    return found


@pytest.fixture
async def events(relay):
    """Two events that have been delivered, in order."""
    return await deliver(relay)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def filled(tmp_path_factory):
    """Commands for a relay with two delivered events, and the ids of these; for tests that only read."""
    async with Recorder() as recorder:
        config = write_config(tmp_path_factory.mktemp("filled"), SOURCES, destination("crm", recorder.url))
        async with running(config) as relay:
            yield Commands(relay.addresses.socket), await deliver(relay)


only_reads = pytest.mark.asyncio(loop_scope="module")


async def test_a_list_is_tab_separated_when_piped_and_newest_first(commands, events):
    rows = (await commands("events", "list")).rows
    assert [row[0] for row in rows] == events[::-1]
    assert rows[0][2:] == ["adorn.session.started", "s-2", str(len(OTHER)), "1 delivered"]


@pytest.mark.parametrize(
    ("args", "found"),
    [
        (["--subject", "s-1"], ["s-1"]),
        (["--source", "adorn", "--limit", "1"], ["s-2"]),
        (["--type", "adorn.session.started"], ["s-2", "s-1"]),
        (["--source", "moddy"], []),
        (["--since", "1h"], ["s-2", "s-1"]),
        (["--since", "1h", "--source", "adorn", "--limit", "1"], ["s-2"]),
        (["--until", "1h"], []),
        (["--until", "2100-01-01T00:00:00Z"], ["s-2", "s-1"]),
    ],
)
@only_reads
async def test_lists_are_filtered(filled, args, found):
    commands, _ = filled
    assert [row[3] for row in (await commands("events", "list", *args)).rows] == found


@pytest.mark.parametrize(
    ("args", "found"),
    [
        (["--where", "data.total=45000.00"], []),
        (["--where", 'data.total="45000.00"'], ["s-1"]),
        (["--where", "data.total~45*", "--type", "adorn.*"], ["s-1"]),
        (["--where", "data.total=null"], ["s-2"]),
        (["--where", "data.total", "--where", "subject!=s-1"], []),
        (["--destination", "crm", "--state", "delivered"], ["s-2", "s-1"]),
        (["--state", "dead"], []),
    ],
)
@pytest.mark.parametrize("noun", ["events", "deliveries"])
@only_reads
async def test_lists_are_filtered_by_the_content_of_events(filled, noun, args, found):
    commands, events = filled
    shown = (await commands(noun, "list", *args, "--json")).json["items"]
    subjects = dict(zip(events, ["s-1", "s-2"], strict=True))
    assert [subjects[each.get("event_id", each["id"])] for each in shown] == found


@pytest.mark.parametrize("text", ["=1", "", "'data", "data.a!", "total=1", "data..a"])
def test_an_invalid_condition_is_a_usage_error_with_examples(text):
    result = run("events", "list", "--where", text, "--socket", "none", code=2)
    assert "data.sale_made=true" in result.err


@pytest.mark.parametrize(
    ("texts", "table"),
    [
        (["data.a=1", "data.b=x", "data.c=[1, 2]"], {"data.a": 1, "data.b": "x", "data.c": [1, 2]}),
        (["data.a>=1", "data.a<5"], {"data.a": {"gte": 1, "lt": 5}}),
        (["type!=a", "type!=b"], {"type": {"not": {"in": ["a", "b"]}}}),
        (["subject~s-*", "data.x"], {"subject": {"glob": "s-*"}, "data.x": {"exists": True}}),
        (["data.x!=null", "data.'a=b'=1"], {"data.x": {"exists": True}, "data.'a=b'": 1}),
        (["data.a=x=y>1"], {"data.a": "x=y>1"}),
        ([], None),
    ],
)
def test_conditions_are_parsed(texts, table):
    literal = {key: each if isinstance(each, dict) else {"in": [each]} for key, each in (table or {}).items()}
    assert read_conditions(texts) == (literal or None)
    if literal:
        assert compile_conditions(literal)


@pytest.mark.parametrize(
    "args",
    [
        ["events", "list", "--since", "yesterday"],
        ["stats", "--until", "2026-01-31T12:00:00"],
        ["deliveries", "list", "--type", ""],
        ["deliveries", "retry", "0190", "--rate", "0/s"],
        ["workers", "command", "whatsapp", "w-1", "restart", "--ttl", "soon"],
    ],
)
def test_an_invalid_value_is_a_usage_error_even_without_a_daemon(args):
    assert f"Invalid value for '{args[-2]}'" in run(*args, "--socket", "none", code=2).err


def test_a_condition_that_contradicts_another_is_refused():
    result = run("events", "list", "--where", "data.a=1", "--where", "data.a=2", "--socket", "none", code=2)
    assert "contradicts" in result.err


async def test_a_list_follows_short_pages_to_rare_rows(commands, events, monkeypatch):
    monkeypatch.setattr(page_budget, "MOST_CANDIDATES", 1)
    page = (await commands("events", "list", "--where", "subject=s-1", "--json")).json
    assert ([each["id"] for each in page["items"]], page["next_cursor"]) == ([events[0]], None)
    assert page["id_digits"] > 0
    page = (await commands("events", "list", "--limit", "1", "--where", "source=adorn", "--json")).json
    assert [each["id"] for each in page["items"]] == [events[1]]
    assert page["next_cursor"] is not None


def test_an_interrupted_search_prints_the_cursor(monkeypatch):
    pages = iter([{"items": [{"id": "a"}], "next_cursor": "7"}])

    def get(self, *path, **query):
        try:
            return next(pages)
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr(Daemon, "get", get)
    result = run("events", "list", "--socket", "none", code=130)
    assert result.err == "interrupted after 1 event\n  to continue, add --cursor 7\n"


async def test_json_is_the_page_of_the_api_and_its_cursor_continues(commands, events):
    page = (await commands("events", "list", "--limit", "1", "--json")).json
    assert [each["id"] for each in page["items"]] == [events[1]]
    rest = await commands("events", "list", "--cursor", page["next_cursor"], "-q")
    assert rest.out == f"{events[0]}\n"


async def test_an_event_is_shown_with_its_deliveries(commands, events):
    result = await commands("events", "show", events[0][:-1])
    assert ["id", events[0]] in result.rows
    assert ["deliveries", "1 delivered"] in result.rows
    assert ["duplicate", "no"] in result.rows
    assert {("repetitions", "0"), ("intact", "yes")} <= set(map(tuple, result.rows))
    assert result.rows[-1][1:3] == ["crm", "delivered"]
    assert (await commands("events", "show", events[0], "--json")).json["subject"] == "s-1"


async def test_a_body_prints_byte_for_byte(commands, events):
    assert (await commands("events", "body", events[0])).out.encode() == BODY
    assert (await commands("events", "body", events[0], "--json")).json == {"body": BODY.decode()}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("events", "list", "--limit", "many"), 'expected a number from 1 to 500, got "many"'),
        (("events", "list", "--limit", "501"), 'expected a number from 1 to 500, got "501"'),
        (("tail", "--limit", "0"), 'expected a number of at least 1, got "0"'),
    ],
)
def test_a_wrong_number_is_reported_with_its_range(args, message):
    assert message in run(*args, code=2).err


@pytest.mark.parametrize("command", [("events", "show"), ("events", "body"), ("deliveries", "show")])
@only_reads
async def test_an_unknown_id_exits_with_4(filled, command):
    commands, _ = filled
    result = await commands(*command, "0190", code=4)
    noun = {"events": "event", "deliveries": "delivery"}[command[0]]
    hint = f"`relay {command[0]} list` lists {command[0]}"
    assert result.err == f'unknown {noun} "0190"\n  {hint}\n'


@pytest.mark.parametrize("command", [("events", "show"), ("events", "body"), ("destinations", "pause")])
def test_an_empty_argument_is_a_usage_error(command):
    assert "check the shell variables in the command" in run(*command, "", "--socket", "none", code=2).err


async def test_events_are_replayed_by_their_ids_without_asking(commands, events, relay, recorder):
    result = await commands("events", "replay", events[0])
    assert result.out == "1 of 1 event: 1 delivery\n"
    await until(lambda: recorder.ids.count(events[0]) == 2)


async def test_a_replay_by_a_filter_needs_confirmation(commands, events, recorder):
    wish = ("events", "replay", "--source", "adorn", "--since", "1h", "--to", "crm")
    assert (await commands(*wish, "--dry-run")).out == "2 events\n"
    refused = await commands(*wish, code=2)
    assert "Replay 2 events to crm? Add --yes" in refused.err
    answer = (await commands(*wish, "--yes", "--json")).json
    assert (answer["state"], answer["done"], answer["created"]) == ("done", 2, 2)
    await until(lambda: len(recorder.ids) == 4)


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        ([], 2, "select events either by id or by a filter"),
        (["0190", "--since", "2h"], 2, "select events either by id or by a filter"),
        (["--source", "moddy"], 4, "no event matches\n  `relay events list`"),
        (["--since", "yesterday"], 2, """'--since': expected "2h\""""),
        (["--source", "adorn", "--rate", "fast"], 2, "'--rate': expected a rate"),
    ],
)
@only_reads
async def test_an_invalid_replay_has_an_error_message(filled, args, code, message):
    commands, _ = filled
    assert message in (await commands("events", "replay", *args, code=code)).err


async def test_a_replay_that_skips_events_exits_with_6(commands, events, relay):
    await commands("destinations", "pause", "crm")
    await commands("events", "replay", events[0])
    result = await commands("events", "replay", events[0], code=6)
    assert (
        result.err == "skipped 1 event\n  they match no destination, or their delivery is already pending\n"
    )


async def test_deliveries_are_listed_and_shown_with_their_attempts(commands, events):
    rows = (await commands("deliveries", "list", "--state", "delivered")).rows
    assert [row[3:7] for row in rows] == [["crm", "delivered", "1", "200"]] * 2
    [[delivery, *_]] = (await commands("deliveries", "list", "--event", events[0])).rows
    result = await commands("deliveries", "show", delivery)
    assert ["destination", "crm"] in result.rows
    assert result.rows[-1][2:4] == ["ok", "200"]
    whole, _, tenths = result.rows[-1][1].partition(".")
    assert (whole.isdigit(), len(tenths)) == (True, 1)


async def test_attempts_are_listed(commands, events):
    listed = await commands("attempts", "list")
    assert [row[1:5] for row in listed.rows] == [["adorn.session.started", "crm", "ok", "200"]] * 2
    times = [row[0] for row in listed.rows]
    assert times == sorted(times, reverse=True)
    page = (await commands("attempts", "list", "--limit", "1", "--json")).json
    [latest] = page["items"]
    assert (latest["started_at"], latest["event_id"] in events) == (times[0], True)
    rows = (await commands("attempts", "list", "--cursor", page["next_cursor"])).rows
    assert [row[0] for row in rows] == times[1:]
    delivery = latest["delivery_id"]
    for words in (
        ["--delivery", delivery],
        ["--event", latest["event_id"]],
        ["--since", "1h", "--limit", "1"],
    ):
        assert (await commands("attempts", "list", *words, "-q")).out == f"{delivery}\n"
    assert (await commands("attempts", "list", "--failed", "--destination", "crm")).out == ""


async def test_an_ended_delivery_is_retried(commands, events, recorder):
    [delivery] = (await commands("deliveries", "list", "--event", events[0], "-q")).out.split()
    assert (await commands("deliveries", "retry", delivery)).out == "1 delivery created, 0 pending due now\n"
    await until(lambda: recorder.ids.count(events[0]) == 2)


async def test_deliveries_are_retried_by_a_filter(commands, events, recorder):
    wish = ("deliveries", "retry", "--destination", "crm", "--state", "delivered")
    assert "Retry 2 deliveries? Add --yes" in (await commands(*wish, code=2)).err
    assert (await commands(*wish, "-y")).out == "2 of 2 events: 2 deliveries\n"
    await until(lambda: len(recorder.ids) == 4)


async def test_dry_run_of_retry_and_cancel_only_counts(commands, events, relay):
    retry, cancel = (
        ("deliveries", verb, "--destination", "crm", "--dry-run") for verb in ("retry", "cancel")
    )
    assert (await commands(*retry, "--state", "delivered")).out == "2 deliveries\n"
    assert (await commands(*cancel)).out == "0 deliveries\n"
    await commands("destinations", "pause", "crm")
    await commands("events", "replay", events[0])
    [pending] = (await commands("deliveries", "list", "--state", "pending", "-q")).out.split()
    assert (await commands(*cancel, "--json")).json == {"count": 1}
    assert (await commands("deliveries", "cancel", pending, "--dry-run")).out == "1 delivery\n"
    assert len(await relay.rows("deliveries", state="pending")) == 1
    assert len(await relay.rows("deliveries")) == 3


async def test_pending_deliveries_are_cancelled_and_ended_ones_exit_with_6(commands, events, relay):
    await commands("destinations", "pause", "crm")
    await commands("events", "replay", *events)
    pending = (await commands("deliveries", "list", "--state", "pending", "-q")).out.split()
    ended = (await commands("deliveries", "list", "--state", "delivered", "-q")).out.split()
    result = await commands("deliveries", "cancel", pending[0], ended[0], code=6)
    assert (result.out, result.err) == (
        "1 delivery cancelled, 0 in flight\n",
        "1 delivery had already ended\n",
    )
    result = await commands("deliveries", "cancel", "--destination", "crm", "--yes", "--json")
    assert result.json == {"cancelled": 1, "in_flight": 0}
    assert (
        "no delivery matches this filter"
        in (await commands("deliveries", "cancel", "--destination", "crm", code=4)).err
    )


async def test_the_file_of_a_stopped_relay_is_read(config, recorder):
    async with running(config) as relay:
        event = (await relay.exchange(request("POST", "/v1/events", BODY))).json["event_id"]
        await until(lambda: finished(relay) == 1)
        there = await Commands(relay.addresses.socket)("events", "show", event, "--json")
    before = sorted(path.name for path in (config.parent / "state").iterdir())

    async def offline(*args, code=0):
        return await asyncio.to_thread(run, *args, "--offline", "-c", config, code=code)

    assert (await offline("events", "list", "-q")).out == f"{event}\n"
    shown = (await offline("events", "show", event, "--json")).json
    assert shown == {**there.json, "replies": []}  # only the daemon knows them
    assert len(there.json["replies"]) == 1
    [[delivery, *_]] = (await offline("deliveries", "list", "--state", "delivered")).rows
    assert (await offline("deliveries", "show", delivery)).rows[-1][2:4] == ["ok", "200"]
    assert 'unknown event "0190"' in (await offline("events", "show", "0190", code=4)).err
    assert (await offline("events", "list", "--since", "1h", "-q")).out == f"{event}\n"
    result = await offline("deliveries", "list", "--destination", "cmr", code=4)
    assert 'unknown destination "cmr"' in result.err
    assert "'--since': expected" in (await offline("events", "list", "--since", "noon", code=2)).err
    assert "invalid cursor" in (await offline("events", "list", "--cursor", "x", code=1)).err
    assert sorted(path.name for path in (config.parent / "state").iterdir()) == before


@pytest.mark.parametrize("as_json", [False, True])
async def test_offline_output_equals_the_output_of_the_relay(commands, events, config, as_json):
    event, *_ = events
    delivery = (await commands("events", "show", event, "--json")).json["owed"][0]["id"]
    for command in (
        ["events", "list"], ["events", "show", event],
        ["deliveries", "list"], ["deliveries", "show", delivery], ["attempts", "list"],
        ["destinations", "list"], ["destinations", "show", "crm"], ["stats"],
    ):  # fmt: skip
        given = [*command, *(["--json"] if as_json else [])]
        there = await commands(*given)
        offline = await asyncio.to_thread(run, *given, "--offline", "-c", config)
        only_online = {
            '"in_flight": 0': '"in_flight": null', "in_flight\t0": "in_flight\t",
            '"circuit": "closed"': '"circuit": null', "circuit\tclosed": "circuit\t",
        }  # fmt: skip
        expected = there.out
        for online, unknown in only_online.items():
            expected = expected.replace(online, unknown)
        expected = REPLIES.sub('"replies": []', expected)  # only the daemon knows them
        if command == ["destinations", "list"] and not as_json:
            expected = expected.replace("crm\t\t0\t0\t", "crm\t\t0\t\t")
        # The store has the time of the commit, which is a few milliseconds later.
        assert LAST_SUCCESS.sub(r"\1", offline.out) == LAST_SUCCESS.sub(r"\1", expected), command


async def test_a_delivery_is_shown_with_the_receiver_s_responses(tmp_path):
    long = b"first line\n\x1b[31msecond" + b"x" * 3000
    async with (
        receivers.answers(status="500 Internal Server Error", body=long) as receiver,
        running(write_config(tmp_path, SOURCES, destination("crm", receiver.url))) as relay,
    ):
        commands = Commands(relay.addresses.socket)
        await relay.exchange(request("POST", "/v1/events", BODY))
        await until(lambda: finished(relay, "dead") == 1)
        [[id_, *_]] = (await commands("deliveries", "list")).rows
        result = await commands("deliveries", "show", id_)
        _, _, responses = result.out.partition("\nresponse 500 at ")
        [_, first, second] = responses.splitlines()  # five equal responses are shown once
        assert first == "  first line"
        assert second.startswith("  \\x1b[31msecondxxx")
        assert second.endswith("x…")
        assert len(second) < 1100
        attempts = (await commands("deliveries", "show", id_, "--json")).json["tries"]
        assert [each["answer"].encode() for each in attempts] == [long] * 5


async def test_the_file_of_a_running_relay_is_read(commands, events, config):
    result = await asyncio.to_thread(run, "events", "list", "-q", "--offline", "-c", config)
    assert result.out.split() == events[::-1]


def test_offline_without_data_is_an_error(tmp_path):
    config = write_config(tmp_path, SOURCES)
    message = f"no database at {tmp_path / 'state' / 'relay.db'}\n"
    if KINDS[0] == "postgres":
        config.write_text(
            re.sub(r'"postgresql:.*"', f'"{postgres.database_of(tmp_path)}"', config.read_text())
        )
        message = "the database has no tables yet\n"
    result = run("events", "list", "--offline", "-c", config, code=1)
    postgres.drop_databases()
    assert result.err.startswith(message)
    result = run("events", "list", "--offline", "--url", "http://h", "--token-file", "f", code=2)
    assert "cannot be used with --url" in result.err


def test_a_stopped_daemon_exits_with_3(tmp_path):
    for command in (["events", "list"], ["deliveries", "retry", "0190"], ["events", "replay", "0190"]):
        assert "start it with `relay serve`" in run(*command, "--socket", tmp_path / "none", code=3).err
