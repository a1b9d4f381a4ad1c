"""What becomes of requests: none is lost, none is counted twice, nothing is promised too soon."""

import asyncio
import json
import sqlite3

import pytest
import pytest_asyncio
from daemon import SOURCES, Relay, adorn, running, write_config
from support import until
from wire import Wire, request

from relay.ids import event_id
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
async def relay(tmp_path_factory):
    async with running(write_config(tmp_path_factory.mktemp("relay"), SOURCES, OTHER)) as relay:
        yield relay


@pytest.fixture
def slow_store(relay, monkeypatch):
    """Make appends wait until the test lets them go; says how many are waiting."""
    original, gate = relay.app.store.append, asyncio.Event()

    async def append(acceptance):
        gate.waiting += 1
        await gate.wait()
        return await original(acceptance)

    gate.waiting = 0
    monkeypatch.setattr(relay.app.store, "append", append)
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
        connections = relay.app.ingest._echoes._open
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
    await until(lambda: all(entry.gone() for entry in relay.app.ingest._echoes._open.values()))
    slow_store.set()
    await until(lambda: not relay.app.ingest._echoes._open)
    repeated, new = await relay.exchange(raw), await relay.exchange(raw)
    first, second = await relay.rows(subject="late echo")
    assert (repeated.json["event_id"], new.json["event_id"]) == (first["id"], second["id"])
    assert (first["duplicate"], second["duplicate"]) == (True, False)


async def test_genuine_twins_are_two_events(relay: Relay, slow_store):
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
async def test_a_key_of_the_sender_dedupes_with_the_first_id_in_the_answer(relay: Relay, header):
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
    path = relay.app.store.path
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as reader:
        found = reader.execute(
            "SELECT 1 FROM events WHERE public_id = ?", (answer.json["event_id"],)
        ).fetchone()
    reader.close()
    return found is not None


async def test_the_answer_leaves_only_after_the_commit(relay: Relay):
    assert await is_stored_when_answered(relay)


async def test_an_answer_before_the_commit_would_be_noticed(relay: Relay, monkeypatch):
    original, late = relay.app.store.append, []

    async def append(acceptance):
        late.append(acceptance)
        return Receipt(event_id=acceptance.event.public_id)

    monkeypatch.setattr(relay.app.store, "append", append)
    assert not await is_stored_when_answered(relay)
    await original(late[0])


async def test_an_answer_that_differs_by_its_receipt_is_rendered_anew(relay: Relay, monkeypatch):
    first = event_id(0)

    async def append(_acceptance):
        return Receipt(event_id=first, duplicate=True)

    monkeypatch.setattr(relay.app.store, "append", append)
    answer = await relay.exchange(request("POST", ADORN, adorn()))
    assert answer.json == {"status": "ok", "event_id": first}


# --- limits -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", ["bearer dev-token", "Bearer   dev-token", "BEARER dev-token "])
async def test_a_rate_limit_counts_a_token_however_it_is_spelt(tmp_path, spelling):
    limited = '[sources.lazychat]\nplugin = "lazychat"\ntokens = ["dev-token"]\nrate_limit = "1/h"\n'
    async with running(write_config(tmp_path, limited)) as relay:
        body = b'{"event_type":"a"}'
        first = await relay.exchange(request("POST", LAZYCHAT, body, authorization="Bearer dev-token"))
        again = await relay.exchange(request("POST", LAZYCHAT, body, authorization=spelling))
    assert (first.status, again.status) == (200, 429)


async def test_a_rate_limit_without_tokens_counts_everyone_together(tmp_path):
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
