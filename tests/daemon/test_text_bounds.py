"""Every text that a sender chooses has a bound: it is refused in the envelope, or left out; never cut."""

import json
from urllib.parse import quote

import pytest
import pytest_asyncio
from daemons import SOURCES, running, write_config
from stores import change_rows, end, hooks, opened, send
from support import FakeClock
from wire import request

from relay.api.views import view_of
from relay.config.schema import SourceConfig
from relay.errors import Invalid
from relay.ingest.event import make_event
from relay.ingest.routes import Mount
from relay.model import Target
from relay.source import LONGEST_ID, Event, Incoming, Source

pytestmark = pytest.mark.asyncio(loop_scope="module")

ADORN = {"event_type": "x.y", "session_id": "s"}
TOKENS = {
    "lazychat": {"authorization": "Bearer dev-token"},
    "moddy": {"authorization": "Bearer dev-token"},
    "whatsapp": {"authorization": "Bearer worker-secret-token-12345"},
    "adorn": {},
}
WORKERS = "/api/v1/workers"


def adorn(**more):
    return request("POST", "/v1/events", json.dumps(ADORN | more).encode())


def moddy(id_):
    body = {"event_type": "member_left", "discord_id": id_}
    return request("POST", "/internal/event/notify", json.dumps(body).encode(), **TOKENS["moddy"])


def lazychat(shop):
    headers = {**TOKENS["lazychat"], "x_lazychat_shop_id": shop}
    return request("POST", "/api/woocommerce-plugin/events", b'{"event_type": "plugin.updated"}', **headers)


def whatsapp(method, path, body=None):
    raw = None if body is None else json.dumps(body).encode()
    return request(method, path, raw, **TOKENS["whatsapp"])


CASES = {
    "adorn session_id": lambda id_: adorn(session_id=id_),
    "adorn store_id": lambda id_: adorn(store_id=id_),
    "adorn seller_id": lambda id_: adorn(seller_id=id_),
    "adorn device_id": lambda id_: adorn(device_id=id_),
    "moddy discord_id": moddy,
    "lazychat shop": lazychat,
    "whatsapp register": lambda id_: whatsapp("POST", f"{WORKERS}/register", {"workerId": id_}),
    "whatsapp heartbeat": lambda id_: whatsapp("PUT", f"{WORKERS}/{quote(id_)}/heartbeat", {}),
    "whatsapp delete": lambda id_: whatsapp("DELETE", f"{WORKERS}/{quote(id_)}"),
    "whatsapp unregister": lambda id_: whatsapp("DELETE", f"{WORKERS}/unregister", {"workerId": id_}),
    "whatsapp assigned": lambda id_: whatsapp("GET", f"{WORKERS}/{quote(id_)}/sessions/assigned"),
    "whatsapp event": lambda id_: whatsapp(
        "POST", f"{WORKERS}/{quote(id_)}/events", {"event": "worker_error"}
    ),
    "whatsapp event's worker": lambda id_: whatsapp(
        "POST", "/api/webhooks/session-status", {"status": "X", "sessionId": "s", "workerId": id_}
    ),
    "whatsapp session": lambda id_: whatsapp(
        "POST", "/api/webhooks/session-status", {"status": "X", "sessionId": id_}
    ),
    "whatsapp session in path": lambda id_: whatsapp(
        "POST", f"/api/webhooks/session-status/{quote(id_)}", {"status": "X"}
    ),
    "whatsapp message": lambda id_: whatsapp("POST", "/api/webhooks/message-status", {"sessionId": id_}),
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def relay(tmp_path_factory):
    async with running(write_config(tmp_path_factory.mktemp("relay"), SOURCES)) as relay:
        yield relay


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("letter", ["x", "東", "😀"])
async def test_an_id_of_256_characters_is_accepted_and_a_longer_one_refused(relay, case, letter):
    fits = await relay.exchange(CASES[case](letter * LONGEST_ID))
    assert fits.status == 200, fits
    before = len(await relay.rows())
    answer = await relay.exchange(CASES[case](letter * (LONGEST_ID + 1)))
    kind = case.partition(" ")[0]
    assert answer.status == (422 if kind == "moddy" else 400)
    assert "256 characters" in answer.body.decode() or kind == "adorn"
    match kind:
        case "adorn":
            assert answer.json == {"status": "error", "message": f"Invalid {case.partition(' ')[2]}"}
        case "moddy":
            [detail] = answer.json["detail"]
            assert (detail["loc"], detail["type"]) == (["body", "discord_id"], "string_too_long")
        case "lazychat":
            assert answer.json == {
                "success": False,
                "error": "X-Lazychat-Shop-Id: expected at most 256 characters",
            }
        case "whatsapp":
            assert answer.json["code"] == "VALIDATION_ERROR"
    assert len(await relay.rows()) == before


@pytest.mark.parametrize(
    ("value", "status"),
    [
        (str(10**255), 200),
        (str(10**256), 400),
        ('"' + r"\u6771" * 256 + '"', 200),
        ('"' + r"\u6771" * 257 + '"', 400),
        (r'"half \ud83d"', 200),
        ("[" + "1," * 200 + "1]", 400),
    ],
)
async def test_an_id_is_measured_after_decoding(relay, value, status):
    body = json.dumps(ADORN)[:-1] + f', "store_id": {value}}}'
    assert (await relay.exchange(request("POST", "/v1/events", body.encode()))).status == status


async def test_the_content_type_of_every_source_is_bounded(relay):
    answer = await relay.exchange(
        request("POST", "/v1/events", json.dumps(ADORN).encode(), content_type="x" * 257)
    )
    assert (answer.status, answer.json["message"]) == (400, "Invalid Content-Type")


async def test_too_long_texts_of_a_worker_are_ignored_and_the_rest_counts(relay):
    long = "x" * 1025
    body = {"workerId": "w", "endpoint": long, "description": long, "version": long, "environment": long,
            "maxSessions": 5}  # fmt: skip
    assert (await relay.exchange(whatsapp("POST", f"{WORKERS}/register", body))).status == 200
    session = {
        "sessionId": "s",
        "status": long,
        "phoneNumber": long,
        "displayName": long,
        "lastActivity": long,
    }
    beat = {"version": long, "environment": long, "uptime": 5, "sessions": [session, {"sessionId": long}]}
    assert (await relay.exchange(whatsapp("PUT", f"{WORKERS}/w/heartbeat", beat))).status == 200
    [row] = [row for row in relay.app.store.workers.all() if row.id == "w"]
    assert (row.endpoint, row.description, row.version, row.environment) == ("", "", "", "")
    assert (row.max_sessions, row.uptime, [s.id for s in row.sessions]) == (5, 5.0, ["s"])
    assert [(s.status, s.phone, s.name, s.last_activity) for s in row.sessions] == [("", None, None, None)]
    counted = {"sessions": {long: 1, "connected": 2}}
    await relay.exchange(whatsapp("PUT", f"{WORKERS}/w/heartbeat", counted))
    [row] = [row for row in relay.app.store.workers.all() if row.id == "w"]
    assert row.counts == {"connected": 2}


async def test_texts_of_a_worker_within_the_bound_are_kept(relay):
    body = {"workerId": "v", "endpoint": "e" * 1024, "description": "d" * 1024, "version": "v" * 256}
    await relay.exchange(whatsapp("POST", f"{WORKERS}/register", body))
    [row] = [row for row in relay.app.store.workers.all() if row.id == "v"]
    assert (len(row.endpoint), len(row.description), len(row.version)) == (1024, 1024, 256)


async def test_an_event_with_an_enormous_time_is_kept_with_a_small_context(relay):
    body = {"event": "connected", "sessionId": "s", "workerId": "w", "timestamp": "9" * 100_000}
    assert (await relay.exchange(whatsapp("POST", "/api/webhooks/session-status", body))).status == 200
    newest = (await relay.app.store.queries.find("events", limit=1))[0]
    event = (await relay.app.store.events.load([newest["row"]]))[newest["row"]]
    assert json.loads(event.context) == {"worker_id": "w", "session_id": "s"}
    assert len(event.body) > 100_000


async def test_the_subject_of_every_plugin_is_bounded():
    incoming = Incoming.of("POST", "/")
    mount = Mount(name="own", source=Source(), config=SourceConfig(name="own", plugin="own"))
    assert make_event(mount, Event(type="t", subject="x" * 256), incoming, 0).subject == "x" * 256
    with pytest.raises(Invalid) as caught:
        make_event(mount, Event(type="t", subject="x" * 257), incoming, 0)
    assert (caught.value.field, caught.value.issue) == ("subject", "expected at most 256 characters")


async def test_a_list_loads_only_the_shown_part_of_a_subject(tmp_path):
    """The database is older than the bound, and an event was replayed very often."""
    clock = FakeClock()
    async with opened(tmp_path / "relay.db", clock) as store:
        hooks(store).route = lambda event: (Target("crm"),)
        event = await send(store, clock)
        await end(store, event, "delivered", "crm")
        for _ in range(50):
            await store.deliveries.repeat([(event, Target("erp"))])
            await end(store, event, "dead", "erp")
        long = "s" * 100_000
        await change_rows(store, "UPDATE events SET subject = ?", (long,))
        row = (await store.queries.find("events", id=event.id))[0]
        assert row["subject"] == "s" * 256
        assert len(row["deliveries"]) < 200
        assert json.loads(row["deliveries"]) == {
            "pending": 0, "delivered": 1, "dead": 50, "expired": 0, "cancelled": 0,
        }  # fmt: skip
        assert view_of(row)["deliveries"] == {"delivered": 1, "dead": 50}
