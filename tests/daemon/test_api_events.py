"""Lists and single events, deliveries, destinations and sources over the admin API."""

from hashlib import sha256
from urllib.parse import quote

import pytest
import pytest_asyncio
from daemons import SOURCES, Recorder, adorn, destination, running, write_config
from support import until
from wire import exchange, request

from relay.api.views import view_of

BODY = adorn("s-1", payload={"total": "45000.00"})


def configured(folder, recorder):
    return write_config(
        folder,
        SOURCES,
        destination("crm", recorder.url),
        destination("idle", recorder.url, "").replace('"*"', '"no.*"'),
    )


async def deliver(relay):
    """Send an event, wait until it is delivered, and return its id."""
    answer = await relay.exchange(request("POST", "/v1/events", BODY))
    await until(
        lambda: relay.counted("relay_deliveries_finished_total", destination="crm", outcome="delivered")
    )
    return answer.json["event_id"]


@pytest.fixture
async def relay(tmp_path, recorder):
    async with running(configured(tmp_path, recorder)) as relay:
        yield relay


@pytest.fixture
async def event(relay):
    """An event that has been delivered."""
    return await deliver(relay)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def filled(tmp_path_factory):
    """A relay with one delivered event, for tests that only read."""
    folder = tmp_path_factory.mktemp("filled")
    async with Recorder() as recorder, running(configured(folder, recorder)) as relay:
        await deliver(relay)
        yield relay


only_reads = pytest.mark.asyncio(loop_scope="module")


async def test_an_event_is_shown_with_its_deliveries(relay, event):
    for short in (event, event.removeprefix("evt_"), event[:-4]):
        shown = await relay.operator("GET", f"/api/events/{short}")
        assert shown["id"] == event
        assert shown["subject"] == "s-1"
        assert (shown["deliveries"], shown["duplicate"]) == ({"delivered": 1}, False)
        assert [each["destination"] for each in shown["owed"]] == ["crm"]
        assert (shown["sha256"], shown["intact"]) == (sha256(BODY).hexdigest(), True)
        [reply] = shown["replies"]
        assert (reply["status"], reply["heard"], reply["received_at"]) == (200, True, shown["received_at"])
        assert 0 < reply["duration_ms"] < 60_000
    cut = await relay.operator("GET", f"/api/events/{event}?payload=5")
    assert (cut["payload"], cut["payload_truncated"]) == (BODY[:5].decode(), True)
    for query in ("payload=0", "payload=1048577", "payloads=5"):
        answer = await exchange(relay.addresses.socket, request("GET", f"/api/events/{event}?{query}"))
        assert answer.status == 400


async def test_a_body_is_a_download_of_the_exact_bytes(relay, event):
    answer = await exchange(relay.addresses.socket, request("GET", f"/api/events/{event}/body"))
    assert answer.body == BODY
    assert answer.headers["content-type"] == "application/octet-stream"
    assert answer.headers["content-disposition"] == "attachment"


async def test_a_delivery_is_shown_with_its_attempts(relay, event):
    [delivery] = (await relay.operator("GET", f"/api/events/{event}"))["owed"]
    shown = await relay.operator("GET", f"/api/deliveries/{delivery['id'][:-3]}")
    assert shown["state"] == "delivered"
    assert [(each["result"], each["status"]) for each in shown["tries"]] == [("ok", 200)]


@pytest.mark.parametrize("path", ["/api/events/0190", "/api/events/0190/body", "/api/deliveries/0190"])
@only_reads
async def test_an_unknown_id_gets_404(filled, path):
    answer = await exchange(filled.addresses.socket, request("GET", path))
    assert (answer.status, answer.json["error"]["code"]) == (404, "not_found")


@pytest.mark.parametrize("kind", ["events", "deliveries", "attempts"])
@pytest.mark.parametrize("query", ["limit=0", "limit=x", "limit=", "cursor=-1", "colour=red"])
@only_reads
async def test_an_invalid_query_of_a_list_gets_400(filled, kind, query):
    answer = await exchange(filled.addresses.socket, request("GET", f"/api/{kind}?{query}"))
    assert (answer.status, answer.json["error"]["code"]) == (400, "bad_request")
    assert query.partition("=")[0] in answer.json["error"]["message"]
    assert answer.json["error"]["hint"]


@pytest.mark.parametrize(
    ("path", "status", "message", "hint"),
    [
        (
            "events?state=deaf",
            400,
            'delivered, dead, expired or cancelled, got "deaf", did you mean "dead"?',
            "omit it for every state",
        ),
        ("deliveries?state=deaf", 400, '"state": expected pending', "omit it for every state"),
        ("events?type=", 400, '"type": a pattern is empty', ""),
        ("events?since=noon", 400, '"since": expected "2h"', ""),
        ("deliveries?until=noon", 400, '"until": expected "2h"', ""),
        ("attempts?result=okay", 400, 'protocol or format, got "okay", did you mean "ok"?', ""),
        ("events?destination=cmr", 404, 'unknown destination "cmr"', "known: crm, idle"),
        ("deliveries?event_id=0190", 404, 'unknown event "0190"', "relay events list"),
        ("attempts?failed=yes", 400, '"failed": expected 0 or 1', "send 1 or 0"),
        ("attempts?event_id=0190", 404, 'unknown event "0190"', "relay events list"),
        ("attempts?delivery_id=0190", 404, 'unknown delivery "0190"', "relay deliveries list"),
        ("events?where=x", 400, '"where": ', "data.sale_made"),
        (f"events?where={'[' * 2000}", 400, '"where": ', "data.sale_made"),
        ("events?where={}", 400, "a table without conditions", "data.sale_made"),
        ('events?where={"data.x":{"like":1}}', 400, 'unknown operator "like"', "data.sale_made"),
    ],
)
@only_reads
async def test_an_invalid_filter_is_an_error_instead_of_an_empty_list(filled, path, status, message, hint):
    answer = await exchange(filled.addresses.socket, request("GET", f"/api/{quote(path, safe='?=&/')}"))
    assert (answer.status, answer.json["error"]["message"]) == (status, mentioning(message))
    assert hint in answer.json["error"]["hint"]


class mentioning(str):  # noqa: N801 - reads like a word in an assertion
    """Equals any text that contains it."""

    __slots__ = ()

    def __eq__(self, other):
        return str(self) in other

    __hash__ = str.__hash__


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("destination=crm", 1),
        ("destination=idle", 0),
        ("destination=crm&state=delivered", 1),
        ("state=dead", 0),
        ("type=adorn.*&source=adorn&subject=s-1&since=1h", 1),
        ("until=1h", 0),
        ('where={"data.total":"45000.00"}', 1),
        ('where={"data.total":"1"}', 0),
        ('where=[{"data.total":"1"},{"subject":"s-1"}]&type=*', 1),
    ],
)
@pytest.mark.parametrize("kind", ["events", "deliveries"])
@only_reads
async def test_events_and_deliveries_have_the_same_filters(filled, kind, query, found):
    page = await filled.operator("GET", f"/api/{kind}?{quote(query, safe='=&')}")
    assert (len(page["items"]), page["next_cursor"]) == (found, None)
    for each in page["items"]:
        short = each["id"][len("evt_") :].replace("-", "")[: page["id_digits"]]
        assert (await filled.operator("GET", f"/api/{kind}/{short}"))["id"] == each["id"]


async def test_attempts_are_filtered_by_result(relay, event):
    [delivery] = (await relay.operator("GET", f"/api/events/{event}"))["owed"]
    for query, found in (
        ("result=ok", 1),
        ("result=5xx", 0),
        ("destination=crm&since=1h", 1),
        ("until=1h", 0),
        ("failed=1", 0),
        ("failed=0", 1),
        (f"event_id={event}", 1),
        (f"event_id={event}&failed=1", 0),
        (f"event_id={event}&delivery_id={delivery['id']}", 1),
        (f"event_id={event}&delivery_id={delivery['id']}&failed=1", 0),
    ):
        assert len((await relay.operator("GET", f"/api/attempts?{query}"))["items"]) == found, query


async def test_an_event_in_a_list_has_exactly_these_fields(relay, event):
    [shown] = (await relay.operator("GET", f"/api/events?id={event[:-2]}"))["items"]
    assert shown == {
        "id": event,
        "source": "adorn",
        "type": "adorn.session.started",
        "subject": "s-1",
        "received_at": shown["received_at"],
        "size": len(BODY),
        "duplicate": False,
        "repetitions": 0,
        "deliveries": {"delivered": 1},
    }


async def test_a_list_of_attempts_may_leave_out_the_bodies_of_responses(relay, event):
    [whole] = (await relay.operator("GET", "/api/attempts"))["items"]
    [short] = (await relay.operator("GET", "/api/attempts?answer=0&destination=crm"))["items"]
    assert short == {**whole, "answer": None}
    assert isinstance(whole["answer"], str)
    answer = await exchange(relay.addresses.socket, request("GET", "/api/attempts?answer=x"))
    assert answer.status == 400


async def test_types_are_listed_with_the_most_frequent_one_first(relay, event):
    for session in ("s-2", "s-3"):
        await relay.exchange(request("POST", "/v1/events", adorn(session, event_type="image.made")))
    items = (await relay.operator("GET", "/api/types?source=adorn"))["items"]
    assert [(each["type"], each["events"]) for each in items] == [
        ("adorn.image.made", 2),
        ("adorn.session.started", 1),
    ]
    assert (await relay.operator("GET", "/api/types?limit=1"))["items"] == items[:1]
    assert (await relay.operator("GET", "/api/types?source=moddy&since=1h"))["items"] == []
    answer = await exchange(relay.addresses.socket, request("GET", "/api/types?source=adron"))
    assert answer.status == 404


async def test_a_list_of_destinations_shows_failures_and_their_reasons(relay, recorder):
    recorder.answers.extend([(500, {})] * 20)
    await relay.exchange(request("POST", "/v1/events", BODY))
    await until(lambda: relay.counted("relay_deliveries_finished_total", destination="crm", outcome="dead"))
    await relay.operator("POST", "/api/destinations/idle/disable")
    await relay.operator("POST", "/api/destinations/crm/pause")
    await relay.exchange(request("POST", "/v1/events", adorn("s-9")))
    await relay.app.ledger_check.check()
    items = {each["name"]: each for each in (await relay.operator("GET", "/api/destinations"))["items"]}
    crm, idle = items["crm"], items["idle"]
    assert "500" in crm["last_error"]
    assert crm["last_error_at"].endswith("Z")
    assert crm["circuit"] in ("open", "closed")
    assert (idle["last_error"], idle["circuit"], idle["oldest_pending"]) == (None, "closed", None)
    assert idle["disabled_at"].endswith("Z")
    shown = await relay.operator("GET", "/api/destinations/crm")
    assert shown["oldest_pending"] == crm["oldest_pending"] == shown["oldest"]["created_at"]


async def test_a_destination_is_shown_with_its_backlog_and_why_it_is_held(relay, event):
    shown = await relay.operator("GET", "/api/destinations/crm")
    assert (shown["created"], shown["pending"], shown["held"], shown["held_until"]) == (1, 0, None, None)
    assert shown["events"] == ["*"]
    assert shown["latest"]["event_id"] == event
    await relay.operator("POST", "/api/destinations/idle/disable")
    shown = await relay.operator("GET", "/api/destinations/idle")
    assert shown["held"] == "disabled: operator"
    assert shown["disabled_at"].endswith("Z")
    assert shown["latest"] is None
    answer = await exchange(relay.addresses.socket, request("GET", "/api/destinations/none"))
    assert answer.status == 404


async def test_sources_are_listed_with_their_pause(relay):
    await relay.operator("POST", "/api/sources/moddy/pause")
    items = (await relay.operator("GET", "/api/sources"))["items"]
    assert {each["name"]: each["paused"] for each in items} == {
        "adorn": False, "compozy": False, "lazychat": False, "moddy": True, "whatsapp": False,
    }  # fmt: skip
    assert items[0] == {
        "name": "adorn", "plugin": "adorn", "prefix": "", "paused": False, "last_event": None, "silent": False
    }  # fmt: skip


async def test_a_source_is_shown_with_its_settings_and_its_latest_event(relay, event):
    shown = await relay.operator("GET", "/api/sources/adorn")
    assert shown["latest"]["id"] == event
    shown = await relay.operator("GET", "/api/sources/compozy")
    assert (shown["plugin"], shown["latest"]) == ("compozy", None)
    assert shown["settings"]["max_body"] == "2 MiB"
    assert shown["settings"]["tokens"] == ["<secret>", "<secret>"]
    answer = await exchange(relay.addresses.socket, request("GET", "/api/sources/adorm"))
    assert answer.status == 404
    assert answer.json["error"]["message"] == 'unknown source "adorm", did you mean "adorn"?'


def test_a_binary_response_body_is_shown_as_text():
    shown = view_of({"row": 3, "started_at": 0, "answer": b"\xff!", "truncated": 1})
    assert shown == {"started_at": "1970-01-01T00:00:00.000Z", "answer": "\ufffd!", "truncated": True}


FAR = ["9999999999d", "9" * 400 + "d", "36501d"]


async def test_a_time_more_than_a_century_away_is_invalid(relay, event):
    asked = [
        request("GET", f"/api/{what}?{name}={text}")
        for what in ("events", "deliveries", "attempts", "stats")
        for name in ("since", "until")
        for text in FAR
    ]
    for verb in ("replays", "events/delete", "deliveries/retry", "deliveries/cancel"):
        for text in FAR:
            body = b'{"filter": {"since": "%s"}, "dry_run": true}' % text.encode()
            asked.append(request("POST", f"/api/{verb}", body))
    for raw in asked:
        answer = await exchange(relay.addresses.socket, raw)
        assert answer.status == 400, (raw, answer)
        assert "100 years" in answer.json["error"]["message"]


async def test_every_date_is_a_valid_filter(relay, event):
    for time in ("0001-01-01T00:00:00Z", "9999-12-31T23:59:59Z", "0001-01-01T00:00:00%2B23:59"):
        for name in ("since", "until"):
            answer = await exchange(relay.addresses.socket, request("GET", f"/api/events?{name}={time}"))
            assert answer.status == 200, (time, answer)
