"""Exports, imports, deletions and counts of events over the admin API."""

import asyncio
import json

import msgspec
import pytest
from daemons import SOURCES, adorn, destination, running, write_config
from support import until
from wire import Wire, exchange, request

from relay.api import events as events_api
from relay.api.events import Deletion


@pytest.fixture
async def relay(tmp_path, recorder):
    async with running(write_config(tmp_path, SOURCES, destination("crm", recorder.url))) as relay:
        yield relay
        for name, books in (await relay.app.store.ledger.audit()).items():
            assert books.unaccounted == 0, name


def finished(relay, outcome="delivered"):
    return relay.counted("relay_deliveries_finished_total", destination="crm", outcome=outcome)


@pytest.fixture
async def events(relay):
    """Three delivered events with two subjects."""
    found = []
    for session in ("s-1", "s-2", "s-1"):
        answer = await relay.exchange(
            request("POST", "/v1/events", adorn(session, payload={"n": len(found)}))
        )
        found.append(answer.json["event_id"])
    await until(lambda: finished(relay) == 3)
    return found


async def ask(relay, method, path, body=None):
    raw = None if body is None else json.dumps(body).encode()
    return await exchange(relay.addresses.socket, request(method, path, raw))


def lines_of(answer):
    return [json.loads(line) for line in answer.body.splitlines()]


async def test_an_export_has_one_line_per_event_oldest_first(relay, events):
    answer = await ask(relay, "GET", "/api/export")
    assert answer.headers["content-type"] == "application/x-ndjson"
    lines = lines_of(answer)
    assert [line["id"] for line in lines] == events
    assert "deliveries" not in lines[0]
    assert json.loads(lines[0]["body"])["payload"] == {"n": 0}


async def test_an_export_can_be_filtered_counted_and_include_deliveries(relay, events):
    lines = lines_of(await ask(relay, "GET", "/api/export?subject=s-1&deliveries=1"))
    assert [line["id"] for line in lines] == [events[0], events[2]]
    assert [each["state"] for each in lines[0]["deliveries"]] == ["delivered"]
    assert (await ask(relay, "GET", "/api/export?subject=s-1&dry_run=1")).json == {"count": 2}


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("colour=red", 'unknown parameter "colour"'),
        ("since=soon", '"since": expected "2h", "14d" or a time'),
        ("deliveries=perhaps", '"deliveries": expected 0 or 1, got "perhaps"'),
        ("state=alive", '"state": expected pending, delivered, dead, expired or cancelled, got "alive"'),
    ],
)
async def test_an_invalid_query_of_an_export_gets_400(relay, query, message):
    answer = await ask(relay, "GET", f"/api/export?{query}")
    assert answer.status == 400
    assert answer.json["error"]["message"].startswith(message)
    assert answer.json["error"]["hint"] or "since" in query


async def test_deleted_events_are_imported_once(relay, events):
    exported = (await ask(relay, "GET", "/api/export")).body
    await ask(relay, "POST", "/api/events/delete", {"events": events})
    assert await relay.rows() == []
    for new in (3, 0):
        answer = await exchange(relay.addresses.socket, request("POST", "/api/import", exported))
        assert (answer.status, answer.json) == (200, {"lines": 3, "new": new})
    assert [row["id"] for row in await relay.rows()] == events
    assert (await ask(relay, "GET", "/api/export")).body == exported
    assert finished(relay) == 3


async def test_an_import_can_deliver_new_events(relay, events, recorder):
    exported = (await ask(relay, "GET", "/api/export?subject=s-2")).body
    await ask(relay, "POST", "/api/events/delete", {"events": [events[1]]})
    await exchange(relay.addresses.socket, request("POST", "/api/import?deliver=1", exported))
    await until(lambda: finished(relay) == 4)
    assert recorder.ids.count(events[1]) == 2


async def test_an_invalid_line_is_named_and_earlier_lines_are_imported(relay, events):
    exported = (await ask(relay, "GET", "/api/export")).body
    await ask(relay, "POST", "/api/events/delete", {"events": events})
    first, *_ = exported.splitlines(keepends=True)
    answer = await exchange(relay.addresses.socket, request("POST", "/api/import", first + b"{}\n"))
    assert (answer.status, answer.json["error"]["code"]) == (400, "bad_request")
    assert answer.json["error"]["message"].startswith("line 2: not an exported event")
    assert [row["id"] for row in await relay.rows()] == events[:1]


async def test_an_import_may_be_split_into_any_chunks(relay, events):
    exported = (await ask(relay, "GET", "/api/export")).body
    await ask(relay, "POST", "/api/events/delete", {"events": events})
    head = request("POST", "/api/import", transfer_encoding="chunked", content_type="application/x-ndjson")
    pieces = [exported[at : at + 7] for at in range(0, len(exported), 7)]
    body = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
    answer = await exchange(relay.addresses.socket, head + body + b"0\r\n\r\n")
    assert answer.json == {"lines": 3, "new": 3}


async def test_the_longest_line_of_an_import_follows_the_bodies_that_the_sources_accept(
    relay, events, monkeypatch
):
    monkeypatch.setattr(events_api, "LONGEST_LINE", 10)
    monkeypatch.setattr(events_api, "CHUNK", 100)
    mounts = relay.app.ingest.mounts.values()
    exported = (await ask(relay, "GET", "/api/export")).body
    await ask(relay, "POST", "/api/events/delete", {"events": events})
    for mount in mounts:
        monkeypatch.setattr(mount, "config", msgspec.structs.replace(mount.config, max_body=2))
    raw = request("POST", "/api/import", exported)
    refused = await exchange(relay.addresses.socket, raw)
    assert (refused.status, "larger `max_body`" in refused.json["error"]["hint"]) == (400, True)
    for mount in mounts:
        monkeypatch.setattr(mount, "config", msgspec.structs.replace(mount.config, max_body=len(exported)))
    answer = await exchange(relay.addresses.socket, raw)
    assert answer.json == {"lines": 3, "new": 3}


async def test_an_interrupted_import_logs_no_traceback(relay, events, caplog):
    async with Wire(*await asyncio.open_unix_connection(relay.addresses.socket)) as wire:
        head = request("POST", "/api/import", transfer_encoding="chunked")
        await wire.send(head + b"2\r\n\n\n\r\n")
    await until(lambda: [record for record in caplog.records if "/api/import: 400" in record.getMessage()])
    assert not [record for record in caplog.records if record.exc_info]


async def test_events_are_counted_and_deleted_by_a_filter(relay, events):
    wish = {"filter": {"subject": "s-1"}}
    assert (await ask(relay, "POST", "/api/events/delete", {**wish, "dry_run": True})).json == {"count": 2}
    assert len(await relay.rows()) == 3
    answer = await ask(relay, "POST", "/api/events/delete", wish)
    assert json.loads(answer.body) == {"result": {"count": 2, "deleted": 2, "cancelled": 0}}
    assert [row["id"] for row in await relay.rows()] == [events[1]]


async def test_a_deletion_cancels_pending_deliveries_and_waits_for_those_in_flight(relay, recorder):
    recorder.open.clear()
    answer = await relay.exchange(request("POST", "/v1/events", adorn()))
    await until(lambda: recorder.busy)
    asked = asyncio.create_task(
        ask(relay, "POST", "/api/events/delete", {"events": [answer.json["event_id"]]})
    )
    await until(lambda: relay.app.store.claims.cancelled)
    recorder.open.set()
    assert json.loads((await asked).body.splitlines()[-1])["result"]["deleted"] == 1
    assert await relay.rows() == []
    assert finished(relay) == 1


async def test_an_event_in_flight_too_long_is_not_deleted(relay, recorder, monkeypatch):
    monkeypatch.setattr(Deletion, "PATIENCE", 0)
    recorder.open.clear()
    answer = await relay.exchange(request("POST", "/v1/events", adorn()))
    await until(lambda: recorder.busy)
    answer = await ask(relay, "POST", "/api/events/delete", {"events": [answer.json["event_id"]]})
    assert json.loads(answer.body)["result"] == {"count": 1, "deleted": 0, "cancelled": 0}
    assert len(await relay.rows()) == 1
    recorder.open.set()


@pytest.mark.parametrize(
    "body", [{}, {"events": ["evt_0"], "filter": {"source": "adorn"}}, {"filter": {}}, {"ids": []}, []]
)
async def test_a_deletion_needs_either_ids_or_a_filter(relay, body):
    answer = await ask(relay, "POST", "/api/events/delete", body)
    assert (answer.status, answer.json["error"]["code"]) == (400, "bad_request")
    assert answer.json["error"]["hint"]


async def test_counts_outlive_events_and_are_paged(relay, events):
    await relay.exchange(request("POST", "/v1/events", adorn("s-3", event_type="image.shared")))
    await ask(relay, "POST", "/api/events/delete", {"filter": {"source": "adorn"}})
    found, cursor = [], ""
    while cursor is not None:
        page = (await ask(relay, "GET", f"/api/stats?source=adorn&limit=1{cursor}")).json
        found += page["items"]
        cursor = page["next_cursor"] and f"&cursor={page['next_cursor']}"
    assert {(each["type"], each["events"]) for each in found} == {
        ("adorn.session.started", 3), ("adorn.image.shared", 1),
    }  # fmt: skip
    assert set(found[0]) == {"hour", "source", "type", "events", "duplicates", "bytes"}
    assert found[0]["hour"].endswith(":00:00.000Z")


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("cursor=7", "invalid cursor"),
        ("subject=s-1", 'unknown parameter "subject"'),
        ("limit=0", '"limit": expected a whole number of 1 or more, got "0"'),
    ],
)
async def test_an_invalid_query_of_counts_gets_400(relay, query, message):
    answer = await ask(relay, "GET", f"/api/stats?{query}")
    assert (answer.status, answer.json["error"]["message"]) == (400, message)
    assert answer.json["error"]["hint"]
