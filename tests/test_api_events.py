"""One event, one delivery, one destination over the admin API, with what belongs to it."""

import pytest
from daemon import SOURCES, Recorder, adorn, destination, running, write_config
from support import until
from wire import exchange, request

from relay.items import item

BODY = adorn("s-1", payload={"total": "45000.00"})


@pytest.fixture
async def recorder():
    async with Recorder() as recorder:
        yield recorder


@pytest.fixture
async def relay(tmp_path, recorder):
    config = write_config(
        tmp_path,
        SOURCES,
        destination("crm", recorder.url),
        destination("idle", recorder.url, "").replace('"*"', '"no.*"'),
    )
    async with running(config) as relay:
        yield relay


@pytest.fixture
async def event(relay, recorder):
    """An event that has been delivered."""
    answer = await relay.exchange(request("POST", "/v1/events", BODY))
    await until(
        lambda: relay.counted("relay_deliveries_finished_total", destination="crm", outcome="delivered")
    )
    return answer.json["event_id"]


async def test_an_event_comes_with_its_deliveries_and_their_states(relay, event):
    for short in (event, event.removeprefix("evt_"), event[:-4]):
        shown = await relay.operator("GET", f"/api/events/{short}")
        assert shown["id"] == event
        assert shown["subject"] == "s-1"
        assert shown["states"] == {"delivered": 1}
        assert [each["destination"] for each in shown["deliveries"]] == ["crm"]


async def test_a_body_is_the_sender_s_own_bytes_and_no_page_of_ours(relay, event):
    answer = await exchange(relay.addresses.socket, request("GET", f"/api/events/{event}/body"))
    assert answer.body == BODY
    assert answer.headers["content-type"] == "application/octet-stream"
    assert answer.headers["content-disposition"] == "attachment"


async def test_a_delivery_comes_with_its_tries(relay, event):
    [delivery] = (await relay.operator("GET", f"/api/events/{event}"))["deliveries"]
    shown = await relay.operator("GET", f"/api/deliveries/{delivery['id'][:-3]}")
    assert shown["state"] == "delivered"
    assert [(each["result"], each["status"]) for each in shown["tries"]] == [("ok", 200)]


@pytest.mark.parametrize("path", ["/api/events/0190", "/api/events/0190/body", "/api/deliveries/0190"])
async def test_what_there_is_not_is_404(relay, path):
    answer = await exchange(relay.addresses.socket, request("GET", path))
    assert (answer.status, answer.json["error"]["code"]) == (404, "not_found")


@pytest.mark.parametrize("kind", ["events", "deliveries", "attempts"])
@pytest.mark.parametrize("query", ["limit=0", "limit=x", "limit=", "cursor=-1", "colour=red"])
async def test_a_list_says_what_is_wrong_with_a_question(relay, event, kind, query):
    answer = await exchange(relay.addresses.socket, request("GET", f"/api/{kind}?{query}"))
    assert (answer.status, answer.json["error"]["code"]) == (400, "bad_request")
    assert query.partition("=")[0] in answer.json["error"]["message"]
    assert answer.json["error"]["hint"]


async def test_a_destination_says_what_it_is_owed_and_why_it_does_not_move(relay, event):
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


async def test_sources_are_listed_with_what_is_paused(relay):
    await relay.operator("POST", "/api/sources/moddy/pause")
    items = (await relay.operator("GET", "/api/sources"))["items"]
    assert {each["name"]: each["paused"] for each in items} == {
        "adorn": False, "compozy": False, "lazychat": False, "moddy": True, "whatsapp": False,
    }  # fmt: skip
    assert items[0] == {"name": "adorn", "plugin": "adorn", "prefix": "", "paused": False}


async def test_a_source_comes_with_its_settings_and_its_latest_event(relay, event):
    shown = await relay.operator("GET", "/api/sources/adorn")
    assert shown["latest"]["id"] == event
    shown = await relay.operator("GET", "/api/sources/compozy")
    assert (shown["plugin"], shown["latest"]) == ("compozy", None)
    assert shown["settings"]["max_body"] == "2 MiB"
    assert shown["settings"]["tokens"] == ["<secret>", "<secret>"]
    answer = await exchange(relay.addresses.socket, request("GET", "/api/sources/adorm"))
    assert answer.status == 404
    assert answer.json["error"]["message"] == "no source 'adorm', did you mean \"adorn\"?"


def test_an_answer_that_is_no_text_is_shown_all_the_same():
    shown = item({"row": 3, "started_at": 0, "answer": b"\xff!", "truncated": 1})
    assert shown == {"started_at": "1970-01-01T00:00:00.000Z", "answer": "\ufffd!", "truncated": True}
