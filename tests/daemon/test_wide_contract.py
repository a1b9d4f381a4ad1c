"""Features of sources besides one event per request: batches, handshakes, checks of heads, other replies."""

import asyncio
import json
import logging
import time
from types import SimpleNamespace

import pytest
import pytest_asyncio
from daemons import Relay, running, write_config
from stores import make_event, make_store
from support import FakeClock, until
from wire import Wire, request

from relay.errors import KeyConflict
from relay.ingest.body import Extra
from relay.ingest.handler import _acceptances_of
from relay.source import Event, Incoming
from relay.store import Acceptance

PLUGIN = '''
import msgspec
from relay.hookspecs import hookimpl
from relay.source import Accepted, Event, Forbidden, Heartbeat, Register, Reply, Session, SessionSeen
from relay.source import Source, Unauthenticated, Unregister, route

class Bulk(Source, kind="bulk"):
    """Its path is a setting; it takes lists of events."""

    path: str
    blocked: str = "192.0.2.1"
    reads_body: bool = False

    def owned(self):
        return (self.path,)

    def routes(self):
        routes = (("POST", "one"), ("GET", "one"), ("HEAD", "one"), ("POST", "all"), ("POST", "work"))
        return tuple((method, f"{self.path}/{name}", name) for method, name in routes)

    def needs_body(self):
        return self.reads_body

    def screen(self, incoming):
        if incoming.remote == self.blocked:
            raise Forbidden("This network may not send")

    def handshake(self, incoming):
        if incoming.method == "GET":
            challenge = incoming.headers.get("X-Challenge") or incoming.query.removeprefix("challenge=")
            return Reply(body=challenge, content_type="text/plain")
        if incoming.method == "HEAD":
            return Reply(body=b"")
        if b"odd" in incoming.body:
            return "odd"
        return None

    def verify(self, incoming):
        if incoming.header("X-Token") != "yes":
            raise Unauthenticated(problem="missing")

    def one(self, incoming):
        kind = incoming.header("X-Kind")
        if kind == "empty":
            return Reply(status=202, body=b"")
        if kind == "text":
            return Accepted(event=Event(type="a"), reply=Reply(body="*ok*", content_type="text/plain"))
        if kind == "typeless":
            return Reply(body=b"x", content_type="")
        if kind == "head":
            return Reply(body=b"", content_type="text/plain\\r\\nX-Evil: 1")
        data = {"target": incoming.target, "remote": incoming.remote, "at": incoming.received_at}
        return Accepted(event=Event(type="one", data=data), reply=lambda receipt: {"id": receipt.event_id})

    def work(self, incoming):
        return Accepted(worker=CHANGES[int(incoming.header("X-Change"))], reply={})

    def sign_of_life(self, incoming):
        return CHANGES[int(incoming.header("X-Change") or 0)]

    def all(self, incoming):
        events = [
            Event(type=each.get("type", "item"), subject=each.get("subject"), key=each.get("key"),
                  data=msgspec.Raw(each["raw"].encode()) if "raw" in each else each)
            for each in msgspec.json.decode(incoming.body)
        ]
        if incoming.header("X-Copies"):
            events = [Event(type="copy", data={"x": "x" * 1000})] * int(incoming.header("X-Copies"))
        match incoming.header("X-Odd"):
            case "generator":
                events = (each for each in events)
            case "set":
                events = set(map(id, events))
            case "dict":
                events = {"a": 1}
            case "text":
                events = "text"
            case "numbers":
                events = [1]
        extra = Event(type="more") if incoming.header("X-Extra") else None
        return Accepted(events=events, event=extra, reply=self.reply)

    def reply(self, receipt):
        return {"ids": [each.event_id for each in receipt.each], "first": receipt.event_id,
                "duplicate": receipt.duplicate, "duplicates": [each.duplicate for each in receipt.each]}

RAW = msgspec.Raw(b'"1","status":"OFFLINE"')
CHANGES = [
    Register(worker_id="w"),
    Heartbeat(worker_id="w", version="2", cpu=1, sessions=[Session(id="s")]),
    Register(worker_id="w", version=RAW),
    Heartbeat(worker_id="w", version=RAW),
    Heartbeat(worker_id="w", version=2),
    Heartbeat(worker_id="w", sessions=[Session(id=RAW)]),
    Heartbeat(worker_id="w", sessions=[Session(id=5)]),
    Heartbeat(worker_id="w", counts={"a": "b"}),
    Heartbeat(worker_id="w", cpu="1"),
    Heartbeat(worker_id="w", message_count=2**63),
    Heartbeat(worker_id="w", status="LATE"),
    Heartbeat(worker_id=["w"]),
    SessionSeen(session={"id": "s"}, worker_id="w", at=RAW),
    Unregister(worker_id=5),
    {"worker_id": "w"},
]

@hookimpl
def relay_sources():
    return [Bulk]
'''
CONFIG = """
[plugins]
dirs = ["plugins"]
[sources.bulk]
plugin = "bulk"
path = "/bulk"
max_body = "100 KiB"
[sources.strict]
plugin = "bulk"
path = "/strict"
key_conflict = "reject"
[sources.late]
plugin = "bulk"
path = "/late"
reads_body = true
[sources.limited]
plugin = "bulk"
path = "/limited"
rate_limit = "2/h"
[sources.closed]
plugin = "bulk"
path = "/closed"
blocked = "127.0.0.1"
"""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def relay(tmp_path_factory, listener):
    folder = tmp_path_factory.mktemp("relay")
    (folder / "plugins").mkdir()
    (folder / "plugins" / "bulk.py").write_text(PLUGIN)
    async with running(write_config(folder, "", CONFIG)) as relay:
        yield relay


async def post(relay, path, items=None, **headers):
    body = b"{}" if items is None else json.dumps(items).encode()
    return await relay.exchange(request("POST", path, body, x_token="yes", **headers))


pytestmark = pytest.mark.asyncio(loop_scope="module")


# --- several events of one request --------------------------------------------------------------------


async def test_each_item_of_a_batch_is_an_event_with_its_own_body(relay: Relay):
    before = relay.counted("relay_events_received_total", source="bulk")
    answer = await post(relay, "/bulk/all", [{"n": 1}, {"n": 2, "subject": "b", "type": "other"}])
    assert answer.status == 200
    events = [await relay.event(event_id) for event_id in answer.json["ids"]]
    assert [event.type for event in events] == ["bulk.item", "bulk.other"]
    assert [event.subject for event in events] == [None, "b"]
    assert [json.loads(event.data)["n"] for event in events] == [1, 2]
    assert [event.body for event in events] == [event.data for event in events]
    assert {event.content_type for event in events} == {"application/json"}
    assert answer.json["first"] == answer.json["ids"][0]
    assert relay.counted("relay_events_received_total", source="bulk") == before + 2


async def test_an_empty_batch_stores_nothing(relay: Relay):
    before = len(await relay.rows())
    answer = await post(relay, "/bulk/all", [])
    assert (answer.status, answer.json["ids"]) == (200, [])
    assert len(await relay.rows()) == before


async def test_a_batch_stores_only_the_items_whose_keys_are_new(relay: Relay):
    first = (await post(relay, "/bulk/all", [{"key": "1"}, {"key": "2"}])).json
    duplicates = relay.counted("relay_events_duplicate_total", source="bulk")
    items = [{"key": "2"}, {"key": "3"}, {"key": "3"}, {}]
    again = (await post(relay, "/bulk/all", items)).json
    assert again["duplicates"] == [True, False, True, False]
    assert again["ids"][0] == first["ids"][1]
    assert again["ids"][1] == again["ids"][2]
    assert not again["duplicate"]
    assert relay.counted("relay_events_duplicate_total", source="bulk") == duplicates + 2
    whole = (await post(relay, "/bulk/all", [{"key": "1"}, {"key": "2"}])).json
    assert (whole["ids"], whole["duplicate"]) == (first["ids"], True)


async def test_a_key_in_a_header_of_a_batch_is_ignored(relay: Relay):
    answer = await post(relay, "/bulk/all", [{"n": 1}, {"n": 1}], idempotency_key="whole")
    assert answer.json["duplicates"] == [False, False]


@pytest.mark.parametrize(
    "items", [[{"n": 0}, {"key": "used", "n": 2}], [{"key": "new", "n": 1}, {"key": "new", "n": 2}]]
)
async def test_a_batch_with_a_used_key_is_refused_completely(relay: Relay, items):
    await post(relay, "/strict/all", [{"key": "used", "n": 1}])
    before = len(await relay.rows(source="strict"))
    assert (await post(relay, "/strict/all", items)).status == 422
    assert len(await relay.rows(source="strict")) == before
    assert (await post(relay, "/strict/all", [{"key": "used", "n": 1}])).json["duplicates"] == [True]


@pytest.mark.parametrize(
    "raw",
    [
        '1,"type":"relay.forged"',
        '{"a":1},"id":"evt_forged","x":{"b":2}',
        '{"a":1}}{"type":"forged"',
        "{'a': 1}",
        '"\n"',
        "",
        "NaN",
    ],
)
async def test_a_crafted_text_cannot_forge_a_field_of_an_event(relay: Relay, raw):
    before = len(await relay.rows(source="bulk"))
    answer = await post(relay, "/bulk/all", [{"n": 1}, {"raw": raw}])
    assert answer.status == 500
    assert len(await relay.rows(source="bulk")) == before


@pytest.mark.parametrize(("copies", "status"), [(100, 200), (410, 413), (5001, 413)])
async def test_a_batch_is_bounded_in_items_and_bytes(relay: Relay, copies, status):
    answer = await post(relay, "/bulk/all", [], x_copies=str(copies))
    assert answer.status == status


async def test_batches_share_the_memory_of_bodies(relay: Relay):
    budget = relay.app.ingest._budget
    others = budget.limit - 100_000
    budget.used += others
    try:
        assert (await post(relay, "/bulk/one")).status == 200
        assert (await post(relay, "/bulk/all", [], x_copies="10")).status == 200
        assert (await post(relay, "/bulk/all", [], x_copies="100")).status == 503
        assert budget.used == others
    finally:
        budget.used -= others


async def test_an_invalid_event_of_a_batch_is_named_by_its_position(relay: Relay):
    before = len(await relay.rows(source="bulk"))
    answer = await post(relay, "/bulk/all", [{}, {"type": "a\nb"}])
    text = "events[1]: expected 1 to 200 printable characters"
    assert (answer.status, answer.json["error"]["message"]) == (400, text)
    answer = await post(relay, "/bulk/all", [{"subject": "x" * 300}, {}])
    assert answer.json["error"]["message"] == "events[0].subject: expected at most 256 characters"
    assert len(await relay.rows(source="bulk")) == before


@pytest.mark.parametrize("kind", ["generator", "set", "dict", "text", "numbers"])
async def test_events_that_are_not_a_list_of_events_are_a_fault_of_the_plugin(relay: Relay, kind):
    before = len(await relay.rows())
    assert (await post(relay, "/bulk/all", [{}], x_odd=kind)).status == 500
    assert len(await relay.rows()) == before


async def test_other_requests_run_while_many_events_are_made(relay: Relay):
    turns = 0

    async def count():
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    events = [Event(type="a", data={"n": n}) for n in range(5000)]
    extra = Extra(relay.app.ingest._budget, 0)
    task = asyncio.create_task(count())
    began = time.thread_time()
    match = SimpleNamespace(mount=relay.app.ingest.mounts["bulk"])
    call = SimpleNamespace(match=match, incoming=Incoming.of("POST", "/"), retry_of=None)
    found = await _acceptances_of(call, events, extra, None)
    took = time.thread_time() - began
    task.cancel()
    extra.release()
    assert len(found) == 5000
    assert turns >= took / 0.02  # a turn of the loop in twenty milliseconds at the latest


async def test_a_handler_with_both_event_and_events_is_a_fault_of_the_plugin(relay: Relay):
    assert (await post(relay, "/bulk/all", [{"n": 1}], x_extra="1")).status == 500


async def test_a_batch_sent_again_after_its_sender_disconnected_is_stored_once(relay: Relay, monkeypatch):
    original, gate = relay.app.store.events.append_all, asyncio.Event()

    async def append_all(acceptances):
        await gate.wait()
        return await original(acceptances)

    monkeypatch.setattr(relay.app.store.events, "append_all", append_all)
    opened = relay.app.ingest._unheard_replies._open
    items = json.dumps([{"subject": "twice", "n": 1}, {"subject": "twice", "n": 2}]).encode()
    async with await Wire.open(relay.addresses.public) as wire:
        await wire.send(request("POST", "/bulk/all", items, x_token="yes"))
        await until(lambda: opened)
    await until(lambda: all(entry.gone() for entry in opened.values()))
    gate.set()
    await until(lambda: not opened)
    answer = await relay.exchange(request("POST", "/bulk/all", items, x_token="yes"))
    rows = await relay.rows(subject="twice")
    assert (answer.status, answer.json["duplicate"], len(rows)) == (200, True, 2)
    assert answer.json["ids"] == [row["id"] for row in rows]
    assert answer.json["duplicates"] == [row["duplicate"] for row in rows] == [True, True]
    answer = await relay.exchange(request("POST", "/bulk/all", items, x_token="yes"))
    assert (answer.json["duplicate"], len(await relay.rows(subject="twice"))) == (False, 4)


async def test_the_store_appends_a_batch_completely_or_not_at_all(tmp_path):
    clock = FakeClock()
    store = make_store(tmp_path / "relay.db", clock)
    await store.open()

    def keyed(key, body=b"{}"):
        event = make_event(clock, body)
        return Acceptance(source="shop", event=event, key=key, path="/a", rejects_conflict=True)

    await store.events.append_all([keyed("a"), keyed("b")])
    with pytest.raises(KeyConflict):
        await store.events.append_all([keyed("c"), keyed("b", b"[]")])
    receipt = await store.events.append_all([keyed("c"), keyed("b")])
    assert [each.duplicate for each in receipt.each] == [False, True]
    page = await store.queries.page("events")
    assert len(page.rows) == 3
    await store.close()


# --- worker changes of plugins ------------------------------------------------------------------------


async def test_worker_changes_with_wrong_types_are_faults_of_the_plugin(relay: Relay):
    for number in range(15):
        answer = await post(relay, "/bulk/work", x_change=str(number))
        assert answer.status == (200 if number < 2 else 500), number
    [row] = [row for row in relay.app.store.workers.all() if row.source == "bulk"]
    assert (row.version, row.cpu, row.status, [each.id for each in row.sessions]) == ("2", 1, "ONLINE", ["s"])


async def test_worker_changes_of_refused_requests_are_checked_too(relay: Relay):
    await post(relay, "/limited/work", x_change="0")
    statuses = [(await post(relay, "/limited/work", x_change=str(n))).status for n in range(2, 15)]
    assert 429 in statuses
    assert set(statuses) <= {429, 500}
    [row] = [row for row in relay.app.store.workers.all() if row.source == "limited"]
    assert (row.id, row.version, row.status) == ("w", "", "ONLINE")


# --- handshakes, heads and replies --------------------------------------------------------------------


async def test_a_handshake_is_answered_before_the_sender_is_verified(relay: Relay):
    answer = await relay.exchange(request("GET", "/bulk/one?challenge=abc"))
    assert (answer.status, answer.body, answer.headers["content-type"]) == (200, b"abc", "text/plain")
    answer = await relay.exchange(request("GET", "/bulk/one", x_challenge="\udcff"))
    assert (answer.status, answer.body) == (200, b"\\udcff")
    answer = await relay.exchange(request("HEAD", "/bulk/one"))
    assert (answer.status, answer.body) == (200, b"")
    assert (await relay.exchange(request("POST", "/bulk/one", b"{}"))).status == 401


async def test_a_handshake_is_logged_at_level_debug(relay: Relay, caplog):
    caplog.set_level(logging.DEBUG, logger="relay.ingest")
    await relay.exchange(request("GET", "/bulk/one?challenge=abc", x_request_id="req_from_sender"))
    [record] = [record for record in caplog.records if getattr(record, "fields", {}).get("source") == "bulk"]
    assert (record.fields["request_id"], record.fields["status"]) == ("req_from_sender", 200)
    assert "abc" not in caplog.text


async def test_a_handshake_gets_the_body_where_the_source_needs_it(relay: Relay):
    assert (await post(relay, "/late/one", {"odd": 1})).status == 500  # its handshake returns no reply
    assert (await post(relay, "/bulk/one", {"odd": 1})).status == 200  # called with the head alone
    assert (await relay.exchange(request("POST", "/late/one", b"{}"))).status == 401


async def test_a_source_checks_heads_before_everything_else(relay: Relay):
    for method in ("GET", "POST"):
        assert (await relay.exchange(request(method, "/closed/one"))).status == 403
    assert (await relay.exchange(request("GET", "/closed/none"))).status == 404


async def test_a_source_gets_target_address_and_time_of_a_request(relay: Relay):
    answer = await post(relay, "/bulk/one?a=%20b")
    event = await relay.event(answer.json["id"])
    data = json.loads(event.data)
    assert data == {"target": "/bulk/one?a=%20b", "remote": "127.0.0.1", "at": event.received_at}


async def test_a_reply_may_be_empty_or_text(relay: Relay):
    answer = await post(relay, "/bulk/one", x_kind="empty")
    assert (answer.status, answer.body, answer.headers["content-length"]) == (202, b"", "0")
    assert "content-type" not in answer.headers
    answer = await post(relay, "/bulk/one", x_kind="text")
    assert (answer.status, answer.body, answer.headers["content-type"]) == (200, b"*ok*", "text/plain")
    assert (await post(relay, "/bulk/one", x_kind="typeless")).status == 500
    answer = await post(relay, "/bulk/one", x_kind="head")
    assert answer.status == 500
    assert "x-evil" not in answer.headers
