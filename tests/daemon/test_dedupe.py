"""Idempotency keys: a repetition is a duplicate, a different request with the key is a separate event."""

import asyncio
import json
import logging
import sqlite3
from contextlib import closing

import pytest
import pytest_asyncio
from daemons import SOURCES, Relay, adorn, running, write_config
from stores import make_event, make_store, only_sqlite
from stores import rows as read_rows
from support import FakeClock, until
from wire import Wire, request

from relay.errors import KeyConflict
from relay.store import Acceptance
from relay.store.dedupe import identity
from relay.store.sqlite.schema import MIGRATIONS

PLUGIN = '''
from relay.hookspecs import hookimpl
from relay.source import Accepted, Event, Source, route

class Keyed(Source, kind="keyed", owns=("/keyed",)):
    """The handler names the key: the value of a header, or no key."""

    @route("POST", "/keyed/{place}")
    def post(self, incoming):
        key = {"number": 5, "surrogate": "\\ud83d", "long": "k" * 100_000}.get(incoming.header("X-Key"))
        event = Event(type="a", subject=incoming.header("X-Subject") or None, data={"q": incoming.query},
                      key=key or incoming.header("X-Key"))
        return Accepted(event=event, reply=lambda receipt: {"id": receipt.event_id})

@hookimpl
def relay_sources():
    return [Keyed]
'''
CONFIG = """
[plugins]
dirs = ["plugins"]
[sources.keyed]
plugin = "keyed"
[sources.strict]
plugin = "keyed"
prefix = "/strict"
key_conflict = "reject"
[sources.alone]
plugin = "keyed"
prefix = "/alone"
key_conflict = "duplicate"
[sources.two]
plugin = "compozy"
prefix = "/two"
tokens = ["old", "new"]
"""
STRICT = SOURCES.replace("]\nplugin", ']\nkey_conflict = "reject"\nplugin')
MEMBER = b'{"event_type":"member_joined","discord_id":"%s","metadata":{}}'
REJECTED = {
    "adorn": ("/v1/events", "", adorn("1"), adorn("2"), "message"),
    "compozy": (
        "/api/v1/events",
        "test-token",
        b'{"name":"a","payload":{"n":1}}',
        b'{"name":"a","payload":{"n":2}}',
        "error",
    ),
    "lazychat": (
        "/api/woocommerce-plugin/events",
        "dev-token",
        b'{"event_type":"a"}',
        b'{"event_type":"b"}',
        "error",
    ),
    "moddy": ("/internal/event/notify", "dev-token", MEMBER % b"1", MEMBER % b"2", "detail"),
    "whatsapp": (
        "/api/v1/workers/w1/events",
        "worker-secret-token-12345",
        b'{"event":"message","sessionId":"1","data":{}}',
        b'{"event":"message","sessionId":"2","data":{}}',
        "error",
    ),
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def relay(tmp_path_factory, listener):
    folder = tmp_path_factory.mktemp("relay")
    (folder / "plugins").mkdir()
    (folder / "plugins" / "keyed.py").write_text(PLUGIN)
    async with running(write_config(folder, SOURCES, CONFIG)) as relay:
        yield relay


async def send(relay, path, body=b"{}", **headers):
    answer = await relay.exchange(request("POST", path, body, **headers))
    assert answer.status == 200, answer
    return answer.json["id"]


# --- different requests with one key ------------------------------------------------------------------


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("header", ["X-Key", "Idempotency-Key", "webhook-id"])
@pytest.mark.parametrize(
    "other",
    [
        pytest.param(("/keyed/a", b"{ }", {}), id="body"),
        pytest.param(("/keyed/a", b"", {}), id="empty body"),
        pytest.param(("/keyed/b", b"{}", {}), id="path"),
        pytest.param(("/keyed/a", b"{}", {"x_subject": "other"}), id="subject by a header"),
        pytest.param(("/keyed/a?n=2", b"{}", {}), id="data by the query"),
    ],
)
async def test_a_different_request_with_the_key_is_a_separate_event(relay: Relay, header, other):
    path, body, more = other
    key = {header: f"{header} {path} {body!r} {more}"}
    conflicts = relay.counted("relay_events_key_conflicts_total", source="keyed")
    duplicates = relay.counted("relay_events_duplicate_total", source="keyed")
    first = await send(relay, "/keyed/a", b"{}", **key)
    other = await send(relay, path, body, **key, **more)
    assert other != first
    assert (await relay.event(other)).body == body
    assert relay.counted("relay_events_key_conflicts_total", source="keyed") == conflicts + 1
    # Each of them, repeated again, is a duplicate of its own first request.
    assert await send(relay, "/keyed/a", b"{}", **key) == first
    assert await send(relay, path, body, **key, **more) == other
    assert relay.counted("relay_events_key_conflicts_total", source="keyed") == conflicts + 1
    assert relay.counted("relay_events_duplicate_total", source="keyed") == duplicates + 2


@pytest.mark.asyncio(loop_scope="module")
async def test_a_rotated_token_does_not_change_the_identity_of_a_request(relay: Relay):
    raw = {"body": b'{"name":"a"}', "idempotency_key": "rotated"}
    old = await relay.exchange(request("POST", "/two/api/v1/events", authorization="Bearer old", **raw))
    new = await relay.exchange(request("POST", "/two/api/v1/events", authorization="Bearer new", **raw))
    assert old.status == 202
    assert new.json == old.json
    assert len(await relay.rows(source="two")) == 1


@pytest.mark.asyncio(loop_scope="module")
async def test_a_time_in_a_header_does_not_change_the_identity_of_a_request(relay: Relay):
    def lazychat(at):
        return request(
            "POST",
            "/api/woocommerce-plugin/events",
            b'{"event_type":"timed"}',
            authorization="Bearer dev-token",
            idempotency_key="timed",
            x_event_timestamp=at,
        )

    for at in ("1766399400", "1766399430"):
        assert (await relay.exchange(lazychat(at))).status == 200
    assert len(await relay.rows(type="lazychat.timed")) == 1


@pytest.mark.asyncio(loop_scope="module")
async def test_different_requests_with_one_key_in_one_transaction_are_all_stored(relay: Relay):
    bodies = [b'{"n":%d}' % (n % 10) for n in range(40)]
    ids = await asyncio.gather(*(send(relay, "/keyed/a", body, idempotency_key="1") for body in bodies))
    assert len(set(ids)) == 10
    assert all(ids[n] == ids[n % 10] for n in range(40))


@pytest.mark.asyncio(loop_scope="module")
async def test_a_conflict_is_logged_at_a_limited_rate_with_advice(tmp_path, caplog):
    caplog.set_level(logging.WARNING, "relay.ingest")
    async with running(write_config(tmp_path, SOURCES)) as relay:
        for number in range(20):
            raw = request("POST", "/v1/events", adorn(f"s{number}"), idempotency_key="constant")
            assert (await relay.exchange(raw)).status == 200
    [line] = [record.getMessage() for record in caplog.records if record.name == "relay.ingest"]
    assert line == (
        "adorn: the idempotency key 'constant' was used before for another request; stored as a new event."
        ' To refuse such requests set [sources.adorn] key_conflict = "reject"'
    )


# --- key_conflict -------------------------------------------------------------------------------------


@pytest.mark.asyncio(loop_scope="module")
async def test_a_source_may_reject_a_conflict_in_its_own_form(tmp_path):
    async with running(write_config(tmp_path, STRICT)) as relay:
        for source, (path, token, one, other, error_key) in REJECTED.items():
            head = {"idempotency_key": "k", "authorization": f"Bearer {token}"}
            first = await relay.exchange(request("POST", path, one, **head))
            again = await relay.exchange(request("POST", path, one, **head))
            refused = await relay.exchange(request("POST", path, other, **head))
            assert (first.status, again.status, refused.status) == (first.status, first.status, 422), source
            assert "This idempotency key has been used for another request" in json.dumps(
                refused.json[error_key]
            )
            assert len(await relay.rows(source=source)) == 1, source
            assert relay.counted("relay_events_key_conflicts_total", source=source) == 1
            labels = {"source": source, "reason": "key_conflict"}
            assert relay.counted("relay_events_rejected_total", **labels) == 1


@pytest.mark.asyncio(loop_scope="module")
async def test_a_rejected_request_does_not_take_the_key(relay: Relay):
    first = await send(relay, "/strict/keyed/a", b"1", idempotency_key="k")
    refused = await relay.exchange(request("POST", "/strict/keyed/a", b"2", idempotency_key="k"))
    assert refused.status == 422
    assert await send(relay, "/strict/keyed/a", b"1", idempotency_key="k") == first


@pytest.mark.asyncio(loop_scope="module")
async def test_with_key_conflict_duplicate_the_key_alone_decides(relay: Relay):
    conflicts = relay.counted("relay_events_key_conflicts_total", source="alone")
    first = await send(relay, "/alone/keyed/a", b'{"attempt": 1}', idempotency_key="k")
    assert await send(relay, "/alone/keyed/a", b'{"attempt": 2}', idempotency_key="k") == first
    assert await send(relay, "/alone/keyed/a", b'{"attempt": 1}', idempotency_key="other") != first
    assert relay.counted("relay_events_duplicate_total", source="alone") == 1
    assert relay.counted("relay_events_key_conflicts_total", source="alone") == conflicts


@pytest.mark.asyncio(loop_scope="module")
async def test_a_key_conflict_does_not_log_a_shop_out(tmp_path):
    def probe(number):
        return request(
            "POST",
            "/api/woocommerce-plugin/events",
            b'{"event_data":{"n":%d}}' % number,
            authorization="Bearer dev-token",
            x_event_type="settings.checking_connection",
            idempotency_key="k",
        )

    async with running(write_config(tmp_path, STRICT)) as relay:
        for number in range(2):
            answer = await relay.exchange(probe(number))
            assert (answer.status, answer.json) == (200, {"success": True})


# --- keys of handlers ---------------------------------------------------------------------------------


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("key", ["surrogate", "long", "plain"])
async def test_a_handler_may_return_any_text_as_key(relay: Relay, key):
    first = await send(relay, f"/keyed/{key}", x_key=key)
    assert await send(relay, f"/keyed/{key}", x_key=key) == first
    [[longest]] = await read_rows(relay.app.store, "SELECT max(length(key)) FROM dedupe")
    assert longest <= 256


@pytest.mark.asyncio(loop_scope="module")
async def test_a_key_that_is_not_text_is_a_fault_of_the_plugin(relay: Relay):
    answer = await relay.exchange(request("POST", "/keyed/number", b"{}", x_key="number"))
    assert answer.status == 500
    assert not [row for row in await relay.rows(source="keyed") if row["subject"] == "number"]


@pytest.mark.asyncio(loop_scope="module")
async def test_equal_requests_with_different_keys_are_two_events_after_a_disconnect(
    relay: Relay, monkeypatch
):
    original, gate = relay.app.store.events.append, asyncio.Event()

    async def append(acceptance):
        await gate.wait()
        return await original(acceptance)

    monkeypatch.setattr(relay.app.store.events, "append", append)
    opened = relay.app.ingest._unheard_replies._open
    async with await Wire.open(relay.addresses.public) as wire:
        await wire.send(request("POST", "/v1/events", adorn("hung up"), idempotency_key="1"))
        await until(lambda: opened)
    await until(lambda: all(entry.gone() for entry in opened.values()))
    gate.set()
    await until(lambda: not opened)
    answer = await relay.exchange(request("POST", "/v1/events", adorn("hung up"), idempotency_key="2"))
    assert answer.status == 200
    assert len(await relay.rows(subject="hung up")) == 2


# --- the store ----------------------------------------------------------------------------------------


def keyed(clock, key="k", path="/a", **fields):
    event = make_event(clock, **fields)
    return Acceptance(source=event.source, event=event, key=key, path=path)


async def test_a_conflict_ages_with_the_key(tmp_path):
    clock = FakeClock()
    store = make_store(tmp_path / "relay.db", clock)
    await store.open()
    await store.events.append(keyed(clock))
    clock.advance(6 * 86_400)
    other = await store.events.append(keyed(clock, path="/b"))
    clock.advance(2 * 86_400)  # the first is over
    third = await store.events.append(keyed(clock, path="/c"))
    again = await store.events.append(keyed(clock))
    clock.advance(8 * 86_400)
    late = await store.events.append(keyed(clock))
    assert [other.key_conflict, third.key_conflict, again.key_conflict, late.key_conflict] == [
        True, True, True, False,
    ]  # fmt: skip
    assert not any(receipt.duplicate for receipt in (other, third, again, late))
    await store.close()


async def test_an_acceptance_may_let_the_key_alone_decide(tmp_path):
    clock = FakeClock()
    for expected in ([False, True, True], [True, True, True]):
        store = make_store(tmp_path / "relay.db", clock)
        await store.open()
        sent = [keyed(clock, path="/a"), keyed(clock, path="/b"), keyed(clock, path="/a", body=b"[2]")]
        for acceptance in sent:
            acceptance.is_key_alone = True
        receipts = [await store.events.append(acceptance) for acceptance in sent]
        assert [receipt.duplicate for receipt in receipts] == expected
        assert len({receipt.event_id for receipt in receipts}) == 1
        other = keyed(clock, key="another", path="/a")
        other.is_key_alone = True
        assert (await store.events.append(other)).duplicate == expected[0]
        await store.close()


async def test_a_restart_remembers_which_request_had_a_key(tmp_path):
    clock = FakeClock()
    for _ in range(2):
        store = make_store(tmp_path / "relay.db", clock)
        await store.open()
        receipts = [await store.events.append(keyed(clock, path=path)) for path in ("/a", "/b")]
        await store.close()
    assert all(receipt.duplicate for receipt in receipts)


async def test_a_rejected_conflict_stores_nothing_and_does_not_fail_its_batch(tmp_path):
    clock = FakeClock()
    store = make_store(tmp_path / "relay.db", clock)
    await store.open()
    strict = keyed(clock, path="/b")
    strict.rejects_conflict = True
    sent = (keyed(clock), strict, keyed(clock, path="/c"))
    results = await asyncio.gather(*map(store.events.append, sent), return_exceptions=True)
    assert isinstance(results[1], KeyConflict)
    assert len(await store.queries.find("events")) == 2
    await store.close()


@only_sqlite("steps of its statements")
async def test_a_constant_key_costs_the_same_after_many_requests(tmp_path):
    """Each request is looked up directly, not among all requests with the key."""
    clock = FakeClock()
    store = make_store(tmp_path / "relay.db", clock)
    await store.open()
    steps = 0

    async def cost(path):
        nonlocal steps
        steps = 0
        await store.events.append(keyed(clock, path=path))
        return steps

    def count():
        nonlocal steps
        steps += 1

    await asyncio.gather(*(store.events.append(keyed(clock, path=f"/{n}")) for n in range(10)))
    await store.database.connection._execute(store.database.connection._conn.set_progress_handler, count, 1)
    few = await cost("/few")
    await asyncio.gather(*(store.events.append(keyed(clock, path=f"/{n}")) for n in range(10, 2000)))
    assert await cost("/many") < 2 * few
    await store.close()


def test_no_two_requests_have_the_same_identity():
    clock = FakeClock()
    identities = {
        identity(make_event(clock, type=type_, subject=subject), path)
        for path, type_, subject in [
            ("/a", "shop.b", "c"),
            ("/as", "hop.b", "c"),
            ("/a", "shop.bc", ""),
            ("/a", "shop.b", None),
        ]
    }
    assert len(identities) == 4


@only_sqlite("migrations of its file")
async def test_keys_of_a_migrated_database_still_work(tmp_path):
    clock = FakeClock()
    path, later = tmp_path / "relay.db", clock.steady() + 86_400_000_000
    event = make_event(clock)
    with closing(sqlite3.connect(path)) as db:
        db.executescript("".join(MIGRATIONS[:2]) + "PRAGMA user_version = 2;")
        db.execute(
            "INSERT INTO events VALUES (1, ?, 'shop', 'shop.order', 'a', ?, 'x', NULL, ?, 8, x'7b7d', 0, 8,"
            " NULL, ?)",
            (event.public_id, event.received_at, event.sha256, event.body),
        )
        rows = [("shop", "k", event.public_id, later), ("shop", "gone", "evt_gone", later)]
        db.executemany("INSERT INTO dedupe VALUES (?, ?, ?, ?)", rows)
        db.commit()
    store = make_store(path, clock)
    await store.open()
    again = await store.events.append(keyed(clock))
    elsewhere = await store.events.append(keyed(clock, path="/anywhere"))
    other = await store.events.append(keyed(clock, body=b'{"n": 2}'))
    gone = await store.events.append(keyed(clock, key="gone"))
    assert [receipt.duplicate for receipt in (again, elsewhere, other, gone)] == [True, True, False, False]
    assert again.event_id == elsewhere.event_id == event.public_id
    assert other.key_conflict
    clock.advance(2 * 86_400)
    assert not (await store.events.append(keyed(clock))).duplicate
    await store.close()
