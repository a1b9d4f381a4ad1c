"""Replays, retries and cancellations over the unix socket of a running daemon."""

import asyncio
import json

import pytest
import pytest_asyncio
from daemons import SOURCES, Recorder, adorn, destination, running, write_config
from stores import refuse_writes
from support import until
from wire import exchange, request


@pytest.fixture
async def receiver():
    async with Recorder() as receiver:
        yield receiver


@pytest.fixture
async def relay(tmp_path, receiver):
    async with running(write_config(tmp_path, SOURCES, destination("crm", receiver.url))) as relay:
        yield relay
        for name, books in (await relay.app.store.ledger.audit()).items():
            assert books.unaccounted == 0, name


async def send(relay, session="s"):
    answer = await relay.exchange(request("POST", "/v1/events", adorn(session)))
    return answer.json["event_id"]


async def ask(relay, method, path, body=None):
    raw = None if body is None else json.dumps(body).encode()
    answer = await exchange(relay.addresses.socket, request(method, path, raw))
    return answer.status, answer.json


async def accepted(relay, path, **body):
    status, reply = await ask(relay, "POST", path, body)
    assert status in (200, 201), reply
    return reply


async def over(relay, replay):
    """Wait for the end of a replay."""
    async with asyncio.timeout(30):
        while replay["ended_at"] is None:
            replay = await relay.operator("GET", f"/api/replays/{replay['id']}")
    return replay


def finished(relay, outcome, name="crm"):
    return relay.counted("relay_deliveries_finished_total", destination=name, outcome=outcome)


async def deliveries(relay, **filters):
    return [
        (row["state"], row["reason"], row["attempts"]) for row in await relay.rows("deliveries", **filters)
    ]


async def test_a_replay_keeps_the_webhook_id(relay, receiver):
    event_id = await send(relay)
    await until(lambda: finished(relay, "delivered") == 1)
    replay = await accepted(relay, "/api/replays", events=[event_id])
    await until(lambda: finished(relay, "delivered") == 2)
    assert receiver.ids == [event_id] * 2
    assert receiver.arrived[0] == receiver.arrived[1]
    replay = await over(relay, replay)
    assert (replay["state"], replay["count"], replay["done"], replay["created"]) == ("done", 1, 1, 1)
    first, second = await relay.rows("deliveries")
    assert (first["replay_of"], second["replay_of"]) == (None, first["id"])


async def test_a_filter_is_counted_and_replayed(relay, receiver):
    sent = [await send(relay, session) for session in ("a", "b", "a")]
    await until(lambda: finished(relay, "delivered") == 3)
    wish = {"filter": {"subject": "a", "since": "1h", "type": "adorn.*"}, "to": "crm", "rate": "50/s"}
    assert await accepted(relay, "/api/replays", dry_run=True, **wish) == {"count": 2}
    assert (await relay.operator("GET", "/api/replays"))["items"] == []
    replay = await over(relay, await accepted(relay, "/api/replays", **wish))
    assert (replay["count"], replay["done"], replay["created"], replay["skipped"]) == (2, 2, 2, 0)
    assert (replay["to"], replay["rate"], replay["error"]) == ("crm", "50/s", None)
    await until(lambda: finished(relay, "delivered") == 5)
    assert receiver.ids[3:] == [sent[0], sent[2]]
    listed = (await relay.operator("GET", "/api/replays"))["items"]
    assert [one["id"] for one in listed] == [replay["id"]]


async def test_a_filter_matches_payloads(relay, receiver):
    sent = []
    for total in (1, 7, 9):
        body = adorn("s", payload={"total": total})
        sent.append((await relay.exchange(request("POST", "/v1/events", body))).json["event_id"])
    await until(lambda: finished(relay, "delivered") == 3)
    wish = {"filter": {"where": {"data.total": {"gte": 7}}}}
    assert await accepted(relay, "/api/replays", dry_run=True, **wish) == {"count": 2}
    await over(relay, await accepted(relay, "/api/replays", **wish))
    await until(lambda: finished(relay, "delivered") == 5)
    assert receiver.ids[3:] == sent[1:]
    await relay.operator("POST", "/api/destinations/crm/pause")
    await over(relay, await accepted(relay, "/api/replays", filter={"source": "adorn"}))
    cancelled = await accepted(
        relay, "/api/deliveries/cancel", filter={"where": [{"data.total": 1}, {"data.total": 9}]}
    )
    assert cancelled == {"cancelled": 2, "in_flight": 0}
    [left] = (await relay.operator("GET", "/api/deliveries?state=pending"))["items"]
    assert left["event_id"] == sent[1]


async def test_a_cancelled_replay_reports_its_progress(relay, receiver):
    for number in range(3):
        await send(relay, f"{number}")
    await until(lambda: finished(relay, "delivered") == 3)
    replay = await accepted(relay, "/api/replays", filter={"source": "adorn"}, rate="1/h")
    await until(lambda: finished(relay, "delivered") == 4)
    status, reply = await ask(relay, "DELETE", f"/api/replays/{replay['id']}")
    assert (status, reply["state"], reply["done"]) == (200, "cancelled", 1)
    [event] = await relay.rows(id=receiver.ids[3])
    assert reply["reached"] is not None
    assert event["subject"] == "0"


async def test_a_new_event_overtakes_a_replay(relay, receiver):
    sent = [await send(relay, f"{number}") for number in range(30)]
    await until(lambda: finished(relay, "delivered") == 30)
    replay = await accepted(relay, "/api/replays", filter={"source": "adorn"}, rate="1/s")
    fresh = await send(relay, "fresh")
    await until(lambda: fresh in receiver.ids)
    assert len(receiver.ids) < 2 * len(sent)
    assert (await relay.operator("GET", f"/api/replays/{replay['id']}"))["state"] == "running"


async def test_deliveries_of_a_replay_survive_a_restart(tmp_path, receiver):
    config = write_config(tmp_path, SOURCES, destination("crm", receiver.url))
    async with running(config) as relay:
        event_id = await send(relay)
        await until(lambda: finished(relay, "delivered") == 1)
        await relay.operator("POST", "/api/destinations/crm/pause")
        replay = await over(relay, await accepted(relay, "/api/replays", events=[event_id]))
    async with running(config) as relay:
        assert (await ask(relay, "GET", f"/api/replays/{replay['id']}"))[0] == 404
        again = await over(relay, await accepted(relay, "/api/replays", events=[event_id]))
        assert (again["created"], again["skipped"]) == (0, 1)
        await relay.operator("POST", "/api/destinations/crm/resume")
        await until(lambda: finished(relay, "delivered") == 1)
    assert receiver.ids == [event_id] * 2


async def test_dead_deliveries_are_retried_at_their_destination(relay, receiver):
    receiver.answers.extend([(500, {"webhook-delivery": "abort-message"})] * 3)
    for number in range(3):
        await send(relay, f"{number}")
    await until(lambda: finished(relay, "dead") == 3)
    first = (await relay.rows("deliveries", destination="crm"))[0]
    one = await accepted(relay, "/api/deliveries/retry", ids=[first["id"]])
    assert one == {"created": 1, "hurried": 0, "skipped": 0}
    await until(lambda: finished(relay, "delivered") == 1)
    dead = {"state": "dead", "destination": "crm"}
    assert await accepted(relay, "/api/deliveries/retry", filter=dead, dry_run=True) == {"count": 2}
    await over(relay, await accepted(relay, "/api/deliveries/retry", filter=dead))
    await until(lambda: finished(relay, "delivered") == 3)
    assert await accepted(relay, "/api/deliveries/retry", filter=dead, dry_run=True) == {"count": 0}
    assert sorted(receiver.ids[:3]) == sorted(receiver.ids[3:])


@pytest.fixture
async def waiting(tmp_path, receiver):
    """A relay with an event whose second attempt is an hour away."""
    receiver.answers.append((500, {}))
    crm = destination("crm", receiver.url).replace('["0.1s", "0.1s", "0.1s", "0.1s"]', '["1h"]')
    async with running(write_config(tmp_path, SOURCES, crm)) as relay:
        await send(relay)
        await until(lambda: relay.counted("relay_delivery_attempts_total", destination="crm", result="5xx"))
        yield relay


@pytest.mark.parametrize("by", ["ids", "filter"])
async def test_a_pending_delivery_is_retried_now(waiting, receiver, by):
    [delivery] = await waiting.rows("deliveries")
    wish = {"ids": [delivery["id"][4:]]} if by == "ids" else {"filter": {"state": "pending"}}
    assert await accepted(waiting, "/api/deliveries/retry", dry_run=True, **wish) == {"count": 1}
    reply = await accepted(waiting, "/api/deliveries/retry", **wish)
    assert reply == {"created": 0, "hurried": 1, "skipped": 0}
    await until(lambda: finished(waiting, "delivered") == 1)
    assert await deliveries(waiting) == [("delivered", None, 2)]
    assert len(receiver.ids) == 2


@pytest.mark.parametrize("by", ["ids", "filter"])
async def test_a_pending_delivery_is_cancelled(waiting, by):
    [delivery] = await waiting.rows("deliveries")
    wish = {"ids": [delivery["id"]]} if by == "ids" else {"filter": {"destination": "crm", "source": "adorn"}}
    assert await accepted(waiting, "/api/deliveries/cancel", dry_run=True, **wish) == {"count": 1}
    assert await accepted(waiting, "/api/deliveries/cancel", **wish) == {"cancelled": 1, "in_flight": 0}
    assert await deliveries(waiting) == [("cancelled", "operator", 1)]
    assert await accepted(waiting, "/api/deliveries/cancel", **wish) == {"cancelled": 0, "in_flight": 0}
    assert finished(waiting, "cancelled") == 1


@pytest.mark.parametrize(("status", "state"), [(200, "delivered"), (500, "cancelled")])
async def test_the_outcome_decides_for_a_cancelled_delivery_in_flight(relay, receiver, status, state):
    receiver.open.clear()
    receiver.answers.append((status, {}))
    await send(relay)
    await until(lambda: receiver.busy)
    reply = await accepted(relay, "/api/deliveries/cancel", filter={"destination": "crm"})
    assert reply == {"cancelled": 0, "in_flight": 1}
    receiver.open.set()
    await until(lambda: finished(relay, state) == 1)
    assert await deliveries(relay) == [(state, None if state == "delivered" else "operator", 1)]
    assert len(receiver.ids) == 1


async def test_a_lane_drops_cancelled_deliveries_from_its_window(relay, receiver):
    receiver.open.clear()
    for number in range(20):
        await send(relay, f"{number}")
    await until(lambda: receiver.busy == 8)
    reply = await accepted(relay, "/api/deliveries/cancel", filter={"destination": "crm"})
    assert reply == {"cancelled": 12, "in_flight": 8}
    receiver.open.set()
    await until(lambda: finished(relay, "delivered") == 8)
    assert len(receiver.ids) == 8


async def test_an_event_is_explained(tmp_path, receiver):
    picky = destination("picky", receiver.url, 'where = { "subject" = "vip" }')
    other = destination("other", receiver.url).replace('["*"]', '["moddy.*"]')
    config = write_config(tmp_path, SOURCES, destination("crm", receiver.url), picky, other)
    async with running(config) as relay:
        event_id = await send(relay)
        reply = await relay.operator("GET", f"/api/events/{event_id[4:]}/explain")
    assert (reply["id"], reply["type"]) == (event_id, "adorn.session.started")
    assert {one["name"]: (one["matches"], one["lines"]) for one in reply["destinations"]} == {
        "crm": (True, ['yes: "*" matches']),
        "picky": (False, ['no: subject is "s", expected "vip"']),
        "other": (False, ["no: no pattern matches this type"]),
    }


REPLAYS, RETRY, CANCEL = "/api/replays", "/api/deliveries/retry", "/api/deliveries/cancel"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tmp_path_factory):
    """A relay without events, for requests that it refuses."""
    crm = destination("crm", "http://127.0.0.1:9/")
    async with running(write_config(tmp_path_factory.mktemp("relay"), SOURCES, crm)) as relay:
        yield relay


on_shared_loop = pytest.mark.asyncio(loop_scope="module")


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        (REPLAYS, {}, 400, 'send either "events" or "filter"'),
        (
            REPLAYS,
            {"events": ["evt_0"], "filter": {"source": "adorn"}},
            400,
            'send either "events" or "filter"',
        ),
        (REPLAYS, {"filter": {}}, 400, "the filter is empty"),
        (REPLAYS, {"filter": {"sauce": "adorn"}}, 400, "unknown field `sauce`"),
        (REPLAYS, {"filter": {"state": "lost"}}, 400, "Invalid enum value 'lost'"),
        (REPLAYS, {"filter": {"since": "yesterday"}}, 400, '"since": expected "2h"'),
        (REPLAYS, {"filter": {"until": "2026-01-31T12:00:00"}}, 400, "has no time zone"),
        (REPLAYS, {"filter": {"type": "!adorn.*"}}, 400, '"type": '),
        (REPLAYS, {"filter": {"source": "adorn"}, "rate": "fast"}, 400, '"rate": expected a rate'),
        (REPLAYS, {"filter": {"source": "adorn"}, "to": "cmr"}, 404, 'unknown destination "cmr"'),
        (REPLAYS, {"events": ["evt_00000000"]}, 404, 'unknown event "evt_00000000"'),
        (REPLAYS, {"events": ["evt_00000000"], "pace": 1}, 400, "unknown field `pace`"),
        (RETRY, {"filter": {"destination": "crm"}}, 400, "the filter needs a state"),
        (RETRY, {"ids": ["evt_00000000"]}, 400, "is not a valid delivery id"),
        (CANCEL, {"filter": {"state": "dead"}}, 400, "dead deliveries have already ended"),
        (CANCEL, {"ids": ["dlv_00000000"]}, 404, 'unknown delivery "dlv_00000000"'),
        (CANCEL, {"ids": "all"}, 400, "Expected `array | null`, got `str`"),
    ],
)
@on_shared_loop
async def test_an_invalid_request_gets_an_error_message(shared, path, body, status, message):
    found, reply = await ask(shared, "POST", path, body)
    assert found == status, reply
    assert message in reply["error"]["message"]
    assert reply["error"]["code"] == ("bad_request" if status == 400 else "not_found")


async def test_an_unknown_replay_may_have_ended_with_a_restart(relay):
    for method in ("GET", "DELETE"):
        status, reply = await ask(relay, method, "/api/replays/rpl_0")
        assert (status, reply["error"]["code"]) == (404, "not_found")
        assert "a restart ends all replays" in reply["error"]["hint"]


@pytest.mark.parametrize(
    "body",
    [b"{", b'{"filter":{"subject":"\xff"}}', b'{"filter":{"where":{"a":' + b"[" * 5000],
    ids=["cut short", "no UTF-8", "too deep"],
)
@on_shared_loop
async def test_an_invalid_json_body_is_refused(shared, body):
    answer = await exchange(shared.addresses.socket, request("POST", REPLAYS, body))
    assert (answer.status, answer.json["error"]["code"]) == (400, "bad_request")


async def test_a_failing_store_is_answered_with_503(relay, monkeypatch):
    count = 60  # more than fit into the pages that SQLite already has
    for number in range(count):
        await send(relay, f"s{number}")
    await until(lambda: finished(relay, "delivered") == count)
    before = await relay.rows("deliveries")
    await refuse_writes(relay.app.store, now=True)
    status, reply = await ask(relay, "POST", RETRY, {"ids": [each["id"] for each in before]})
    await refuse_writes(relay.app.store, now=False)
    assert (status, reply["error"]["code"]) == (503, "unavailable")
    await until(lambda: relay.app.store.failure is None)
    assert await relay.rows("deliveries") == before
