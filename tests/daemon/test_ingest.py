"""Requests: none is lost or counted twice, and none is acknowledged before the commit."""

import asyncio
import json

import pytest
import pytest_asyncio
from daemons import SOURCES, Relay, adorn, running, write_config
from stores import rows
from support import until
from wire import Wire, request

from relay import errors
from relay.base.ids import EVENT, new_id
from relay.model import Receipt

pytestmark = pytest.mark.asyncio(loop_scope="module")

ADORN = "/v1/events"
LAZYCHAT = "/api/woocommerce-plugin/events"
TOKEN = {"authorization": "Bearer dev-token"}
OTHER = """
[sources.shop]
plugin = "adorn"
prefix = "/shop"
"""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def relay(tmp_path_factory, listener):
    async with running(write_config(tmp_path_factory.mktemp("relay"), SOURCES, OTHER)) as relay:
        yield relay


@pytest.fixture
def slow_store(relay, monkeypatch):
    """Make appends wait until the test releases them; yields the number that wait."""
    original, gate = relay.app.store.events.append, asyncio.Event()

    async def append(acceptance):
        gate.waiting += 1
        await gate.wait()
        return await original(acceptance)

    gate.waiting = 0
    monkeypatch.setattr(relay.app.store.events, "append", append)
    return gate


# --- senders that do not wait -------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["one packet", "head and body apart", "large body"])
async def test_an_event_whose_sender_closes_right_after_the_body_is_stored(relay: Relay, split):
    before = relay.counted("relay_events_received_total", source="lazychat")
    shops = [f"{split} {number}" for number in range(200 if split != "large body" else 10)]
    padding = "x" * (600_000 if split == "large body" else 10)
    for shop in shops:
        body = json.dumps({"event_type": "plugin.updated", "event_data": {"text": padding}}).encode()
        raw = request("POST", LAZYCHAT, body, **TOKEN, x_lazychat_shop_id=shop, connection="close")
        async with await Wire.open(relay.addresses.public) as wire:
            at = len(raw) - len(body) if split == "head and body apart" else len(raw)
            await wire.send(raw[:at])
            await wire.send(raw[at:])
    await until(
        lambda: relay.counted("relay_events_received_total", source="lazychat") == before + len(shops)
    )
    stored = [row["subject"] for row in await relay.rows(source="lazychat")]
    assert sorted(stored[-len(shops) :]) == sorted(shops)


async def test_a_body_that_is_cut_short_is_not_stored(relay: Relay):
    rejected = relay.counted("relay_events_rejected_total", source="adorn", reason="malformed")
    before = len(await relay.rows())
    async with await Wire.open(relay.addresses.public) as wire:
        await wire.send(request("POST", ADORN, adorn())[:-1])
    await until(
        lambda: relay.counted("relay_events_rejected_total", source="adorn", reason="malformed") > rejected
    )
    assert len(await relay.rows()) == before


# --- repetitions --------------------------------------------------------------------------------------


async def test_a_repeated_request_whose_first_sender_hung_up_is_its_duplicate(relay: Relay, slow_store):
    raw = request("POST", ADORN, adorn("echo"))
    duplicates = relay.counted("relay_events_duplicate_total", source="adorn")
    async with await Wire.open(relay.addresses.public) as impatient:
        await impatient.send(raw)
        await until(lambda: slow_store.waiting == 1)
    async with await Wire.open(relay.addresses.public) as patient:
        connections = relay.app.ingest._unheard_replies._open
        await until(lambda: all(entry.gone() for entry in connections.values()))
        await patient.send(raw)
        slow_store.set()
        answer = await patient.answer()
    [row] = await relay.rows(subject="echo")
    assert answer.json == {"status": "ok", "event_id": row["id"]}
    assert row["duplicate"]
    assert relay.counted("relay_events_duplicate_total", source="adorn") == duplicates + 1


async def test_a_repetition_after_the_first_was_stored_unheard_is_its_duplicate_once(
    relay: Relay, slow_store
):
    raw = request("POST", ADORN, adorn("late echo"))
    async with await Wire.open(relay.addresses.public) as impatient:
        await impatient.send(raw)
        await until(lambda: slow_store.waiting == 1)
    await until(lambda: all(entry.gone() for entry in relay.app.ingest._unheard_replies._open.values()))
    slow_store.set()
    await until(lambda: not relay.app.ingest._unheard_replies._open)
    repeated, new = await relay.exchange(raw), await relay.exchange(raw)
    first, second = await relay.rows(subject="late echo")
    assert (repeated.json["event_id"], new.json["event_id"]) == (first["id"], second["id"])
    assert (first["duplicate"], second["duplicate"]) == (True, False)
    shown = [await relay.operator("GET", f"/api/events/{each['id']}") for each in (first, second)]
    assert [each["repetitions"] for each in shown] == [1, 0]
    assert [[(each["status"], each["heard"]) for each in event["replies"]] for event in shown] == [
        [(200, False), (200, True)],
        [(200, True)],
    ]
    assert [event["replies"][0]["received_at"] == event["received_at"] for event in shown] == [True, True]


async def test_two_equal_requests_with_replies_are_two_events(relay: Relay, slow_store):
    raw = request("POST", ADORN, adorn("twin"))
    async with (
        await Wire.open(relay.addresses.public) as one,
        await Wire.open(relay.addresses.public) as other,
    ):
        await one.send(raw)
        await other.send(raw)
        await until(lambda: slow_store.waiting == 2)
        slow_store.set()
        ids = {(await one.answer()).json["event_id"], (await other.answer()).json["event_id"]}
    third = await relay.exchange(raw)
    assert len({*ids, third.json["event_id"]}) == 3
    assert len(await relay.rows(subject="twin")) == 3


@pytest.mark.parametrize("header", ["Idempotency-Key", "IDEMPOTENCY-KEY", "webhook-id"])
async def test_the_reply_to_a_duplicate_key_has_the_first_id(relay: Relay, header):
    async def send(key, session):
        return await relay.exchange(request("POST", ADORN, adorn(session), **{header: key}))

    first = await send(f"{header}-1", "keyed")
    again = await send(f"{header}-1", "keyed")
    other = await send(f"{header}-2", "keyed")
    assert again.json == first.json
    assert other.json["event_id"] != first.json["event_id"]


async def test_a_key_belongs_to_its_source(relay: Relay):
    first = await relay.exchange(request("POST", ADORN, adorn("a"), idempotency_key="shared"))
    other = await relay.exchange(request("POST", f"/shop{ADORN}", adorn("a"), idempotency_key="shared"))
    assert first.json["event_id"] != other.json["event_id"]


# --- the answer leaves only after the commit ----------------------------------------------------------


async def is_stored_when_answered(relay: Relay) -> bool:
    """Send an event and, as soon as its answer is there, look for it through another connection."""
    answer = await relay.exchange(request("POST", ADORN, adorn("durable")))
    sql = "SELECT 1 FROM events WHERE public_id = ?"
    return bool(await rows(relay.app.store, sql, (answer.json["event_id"],)))


async def test_the_reply_is_sent_after_the_commit(relay: Relay):
    assert await is_stored_when_answered(relay)


async def test_the_check_detects_a_reply_before_the_commit(relay: Relay, monkeypatch):
    original, late = relay.app.store.events.append, []

    async def append(acceptance):
        late.append(acceptance)
        return Receipt(event_id=acceptance.event.public_id)

    monkeypatch.setattr(relay.app.store.events, "append", append)
    assert not await is_stored_when_answered(relay)
    await original(late[0])


async def test_a_reply_that_depends_on_the_receipt_is_rendered_again(relay: Relay, monkeypatch):
    first = new_id(EVENT, 0)

    async def append(_acceptance):
        return Receipt(event_id=first, duplicate=True)

    monkeypatch.setattr(relay.app.store.events, "append", append)
    answer = await relay.exchange(request("POST", ADORN, adorn()))
    assert answer.json == {"status": "ok", "event_id": first}


# --- limits -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", ["bearer dev-token", "Bearer   dev-token", "BEARER dev-token "])
async def test_a_rate_limit_counts_every_spelling_of_a_token_together(tmp_path, spelling):
    limited = '[sources.lazychat]\nplugin = "lazychat"\ntokens = ["dev-token"]\nrate_limit = "1/h"\n'
    async with running(write_config(tmp_path, limited)) as relay:
        body = b'{"event_type":"a"}'
        first = await relay.exchange(request("POST", LAZYCHAT, body, authorization="Bearer dev-token"))
        again = await relay.exchange(request("POST", LAZYCHAT, body, authorization=spelling))
    assert (first.status, again.status) == (200, 429)


async def test_a_rate_limit_without_tokens_counts_all_senders_together(tmp_path):
    limited = '[sources.adorn]\nplugin = "adorn"\nrate_limit = "1/h"\n'
    async with running(write_config(tmp_path, limited)) as relay:
        first = await relay.exchange(request("POST", ADORN, adorn(), authorization="a"))
        again = await relay.exchange(request("POST", ADORN, adorn(), authorization="b"))
    assert (first.status, again.status) == (200, 429)


async def test_a_source_sees_the_path_below_its_prefix(tmp_path):
    second = """
[sources.second]
plugin = "moddy"
prefix = "/acme"
tokens = ["dev-token"]
"""
    async with running(write_config(tmp_path, SOURCES, second)) as relay:
        assert (await relay.exchange(request("GET", "/acme/internal/health", **TOKEN))).status == 200
        assert (await relay.exchange(request("GET", "/internal/health", **TOKEN))).status == 200
        assert (await relay.exchange(request("GET", "/acme/internal/nothing"))).json == {
            "detail": "No such path"
        }


# --- requests that reach no source, and why others are refused ----------------------------------------

UNROUTABLE = [
    (request("POST", "//v1/events", b"{}"), "path", "POST //v1/events: no source owns this path; did you"),
    (request("POST", "/v1events/", b"{}"), "path", "did you mean /v1/events?"),
    (request("POST", "/v2/event", b"{}"), "path", "did you mean /v1/events?"),
    (request("PUT", "/api/v2/workers/w/heartbeat", b"{}"), "path", "did you mean /api/v1/workers/{"),
    (request("GET", "/healthz"), "path", "did you mean /health?"),
    (request("GET", "/favicon.ico"), "path", "GET /favicon.ico: no source owns this path (127.0.0.1)"),
    (request("OPTIONS", "*"), "path", "OPTIONS *: no source owns this path"),
    (request("GET", "/" + "x" * 5000 + "?secret=1"), "path", "x: no source owns this path (127.0.0.1)"),
    (request("POST", "/health", b"{}"), "method", "POST /health: use GET"),
    (b"nonsense\r\n\r\n", "malformed", "malformed: Invalid method encountered (127.0.0.1)"),
    (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: y\r\n\r\n", "malformed", "(127.0.0.1)"),
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", "malformed", "(127.0.0.1)"),
]  # fmt: skip


@pytest.mark.parametrize(("raw", "reason", "line"), UNROUTABLE)
async def test_a_request_that_reaches_no_source_is_counted_and_logged(tmp_path, caplog, raw, reason, line):
    async with running(write_config(tmp_path, SOURCES)) as relay:
        with caplog.at_level("INFO", "relay.ingest"):
            for _ in range(3):
                await relay.exchange(raw)
        counted = {
            each: relay.counted("relay_requests_unroutable_total", reason=each) for each in errors.UNROUTABLE
        }
    assert counted == {**dict.fromkeys(errors.UNROUTABLE, 0.0), reason: 3.0}
    [record] = [each for each in caplog.records if each.name == "relay.ingest"]
    assert record.getMessage().startswith(f"unroutable: {reason}: ")
    assert line in record.getMessage()
    assert "secret" not in record.getMessage()
    assert record.fields == {"reason": reason, "remote": "127.0.0.1"}


@pytest.mark.parametrize("path", ["/v1/events/", "/v1//events", "/v1/event", "/internal/event/notify/"])
async def test_a_wrong_path_below_a_source_is_counted_and_refused_in_its_form(tmp_path, path):
    async with running(write_config(tmp_path, SOURCES)) as relay:
        answer = await relay.exchange(request("POST", path, adorn()))
        await relay.exchange(request("PUT", "/v1/events", adorn()))  # has a route
        source = "moddy" if "internal" in path else "adorn"
        refused = relay.counted("relay_events_rejected_total", source=source, reason="not_found")
        unroutable = relay.counted("relay_requests_unroutable_total", reason="path")
    assert answer.status == 404
    assert (refused, unroutable) == (1, 1)


async def test_a_sender_beyond_the_limit_of_connections_is_counted(tmp_path):
    async with running(write_config(tmp_path, SOURCES)) as relay:
        relay.app.ingest.unroutable("too_many", "203.0.113.9", "4096 connections are open")
        assert relay.counted("relay_requests_unroutable_total", reason="too_many") == 1


REFUSED = [
    (
        request("POST", "/internal/event/notify", b'{"event_type":"member_left","discord_id":1}', **TOKEN),
        "moddy: refused with 422, invalid: discord_id: expected `str`, got `int` (type member_left, from",
        {"type": "member_left", "field": "discord_id", "problem": "expected `str`, got `int`"},
    ),
    (
        request("POST", "/internal/event/notify", b"", authorization="Bearer wrong", x_event_type="a\u202eb"),
        "moddy: refused with 403, auth: Missing or invalid token (type a\\u202eb, from 127.0.0.1)",
        {"type": "a\u202eb", "problem": "unknown"},
    ),
    (
        request("POST", "/v1/events/", adorn()),
        "adorn: refused with 404, not_found: No such path: POST /v1/events/; did you mean /v1/events? (127",
        {},
    ),
    (
        request("PUT", "/v1/events", adorn()),
        "adorn: refused with 405, method: Method not allowed: PUT /v1/events (127.0.0.1)",
        {},
    ),
    (
        request("POST", "/v1/events", b'{"event_type": "session.started", "session_id": ""}'),
        "adorn: refused with 400, invalid: session_id: expected a non-empty string (type session.started",
        {"type": "session.started", "field": "session_id", "problem": "expected a non-empty string"},
    ),
    (
        request("POST", "/v1/events", b'{"event_type": "session.started"'),
        "adorn: refused with 400, malformed: The body is not valid JSON (127.0.0.1)",
        {},
    ),
]  # fmt: skip


@pytest.mark.parametrize(("raw", "line", "named"), REFUSED)
async def test_a_refusal_is_logged_with_source_type_field_and_problem(tmp_path, caplog, raw, line, named):
    async with running(write_config(tmp_path, SOURCES)) as relay:
        with caplog.at_level("INFO", "relay.ingest"):
            await relay.exchange(raw)
    [record] = [each for each in caplog.records if each.name == "relay.ingest"]
    assert record.getMessage().startswith(line)
    source = line.partition(":")[0]
    assert {"source": source, **named}.items() <= record.fields.items()
    assert {"type", "field", "problem"} & record.fields.keys() == named.keys()
