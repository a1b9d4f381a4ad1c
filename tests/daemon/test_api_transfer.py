"""Many events over the admin API: out as lines, in again, and gone; and what came in, counted."""

import asyncio
import json

import pytest
from daemons import SOURCES, adorn, destination, running, write_config
from support import until
from wire import Wire, exchange, request

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
    """Three delivered events, about two subjects."""
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


async def test_an_export_has_a_line_per_event_the_oldest_first(relay, events):
    answer = await ask(relay, "GET", "/api/export")
    assert answer.headers["content-type"] == "application/x-ndjson"
    lines = lines_of(answer)
    assert [line["id"] for line in lines] == events
    assert "deliveries" not in lines[0]
    assert json.loads(lines[0]["body"])["payload"] == {"n": 0}


async def test_an_export_goes_by_a_filter_tells_of_deliveries_and_can_be_counted(relay, events):
    lines = lines_of(await ask(relay, "GET", "/api/export?subject=s-1&deliveries=1"))
    assert [line["id"] for line in lines] == [events[0], events[2]]
    assert [each["state"] for each in lines[0]["deliveries"]] == ["delivered"]
    assert (await ask(relay, "GET", "/api/export?subject=s-1&dry_run=1")).json == {"count": 2}


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ("colour=red", 'unknown parameter "colour"'),
        ("since=soon", '"since": expected "2h", "14d" or a time'),
        ("deliveries=perhaps", '"deliveries": expected 0 or 1, got "perhaps"'),
        ("state=alive", '"state": expected pending, delivered, dead, expired or cancelled, got "alive"'),
    ],
)
async def test_an_export_says_what_is_wrong_with_its_question(relay, query, says):
    answer = await ask(relay, "GET", f"/api/export?{query}")
    assert answer.status == 400
    assert answer.json["error"]["message"].startswith(says)
    assert answer.json["error"]["hint"] or "since" in query


async def test_what_was_exported_and_deleted_comes_back_by_an_import_once(relay, events):
    exported = (await ask(relay, "GET", "/api/export")).body
    await ask(relay, "POST", "/api/events/delete", {"events": events})
    assert await relay.rows() == []
    for new in (3, 0):
        answer = await exchange(relay.addresses.socket, request("POST", "/api/import", exported))
        assert (answer.status, answer.json) == (200, {"lines": 3, "new": new})
    assert [row["id"] for row in await relay.rows()] == events
    assert (await ask(relay, "GET", "/api/export")).body == exported
    assert finished(relay) == 3


async def test_an_import_owes_what_is_new_if_it_is_asked_to(relay, events, recorder):
    exported = (await ask(relay, "GET", "/api/export?subject=s-2")).body
    await ask(relay, "POST", "/api/events/delete", {"events": [events[1]]})
    await exchange(relay.addresses.socket, request("POST", "/api/import?deliver=1", exported))
    await until(lambda: finished(relay) == 4)
    assert recorder.ids.count(events[1]) == 2


async def test_a_line_that_is_no_event_is_named_and_what_came_before_is_in(relay, events):
    exported = (await ask(relay, "GET", "/api/export")).body
    await ask(relay, "POST", "/api/events/delete", {"events": events})
    first, *_ = exported.splitlines(keepends=True)
    answer = await exchange(relay.addresses.socket, request("POST", "/api/import", first + b"{}\n"))
    assert (answer.status, answer.json["error"]["code"]) == (400, "bad_request")
    assert answer.json["error"]["message"].startswith("line 2: not an exported event")
    assert [row["id"] for row in await relay.rows()] == events[:1]


async def test_an_import_may_come_in_any_pieces(relay, events):
    exported = (await ask(relay, "GET", "/api/export")).body
    await ask(relay, "POST", "/api/events/delete", {"events": events})
    head = request("POST", "/api/import", transfer_encoding="chunked", content_type="application/x-ndjson")
    pieces = [exported[at : at + 7] for at in range(0, len(exported), 7)]
    body = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
    answer = await exchange(relay.addresses.socket, head + body + b"0\r\n\r\n")
    assert answer.json == {"lines": 3, "new": 3}


async def test_an_import_that_breaks_off_is_no_traceback(relay, events, caplog):
    async with Wire(*await asyncio.open_unix_connection(relay.addresses.socket)) as wire:
        head = request("POST", "/api/import", transfer_encoding="chunked")
        await wire.send(head + b"2\r\n\n\n\r\n")
    await until(lambda: [record for record in caplog.records if "/api/import: 400" in record.getMessage()])
    assert not [record for record in caplog.records if record.exc_info]


async def test_events_are_deleted_by_a_filter_after_counting(relay, events):
    wish = {"filter": {"subject": "s-1"}}
    assert (await ask(relay, "POST", "/api/events/delete", {**wish, "dry_run": True})).json == {"count": 2}
    assert len(await relay.rows()) == 3
    answer = await ask(relay, "POST", "/api/events/delete", wish)
    assert json.loads(answer.body) == {"result": {"count": 2, "deleted": 2, "cancelled": 0}}
    assert [row["id"] for row in await relay.rows()] == [events[1]]


async def test_what_is_still_owed_is_cancelled_and_what_is_being_sent_ends_first(relay, recorder):
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


async def test_an_event_that_is_being_sent_all_the_time_stays_and_is_counted(relay, recorder, monkeypatch):
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
async def test_a_deletion_that_names_nothing_or_too_much_is_400(relay, body):
    answer = await ask(relay, "POST", "/api/events/delete", body)
    assert (answer.status, answer.json["error"]["code"]) == (400, "bad_request")
    assert answer.json["error"]["hint"]


async def test_counts_outlive_the_events_and_go_on_page_by_page(relay, events):
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
    ("query", "says"),
    [
        ("cursor=7", "invalid cursor"),
        ("subject=s-1", 'unknown parameter "subject"'),
        ("limit=0", '"limit": expected a whole number of 1 or more, got "0"'),
    ],
)
async def test_counts_say_what_is_wrong_with_a_question(relay, query, says):
    answer = await ask(relay, "GET", f"/api/stats?{query}")
    assert (answer.status, answer.json["error"]["message"]) == (400, says)
    assert answer.json["error"]["hint"]
