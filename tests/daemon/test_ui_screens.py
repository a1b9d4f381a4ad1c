"""The screens of the dashboard: their content, the requests of their buttons, and hostile data."""

import asyncio
import json
import re
from datetime import datetime, timedelta
from urllib.parse import quote

import pytest
import receivers
from daemons import SOURCES, destination, running, write_config
from stores import KINDS, watch_statements
from test_ui import HEADERS, HOSTILE, get, page, store
from test_workers import register
from wire import exchange, request

from relay.base.clock import SECOND
from relay.ui.app import SCREENS

HELD = 'paused = true\norder_by = "subject"\nttl = "1h"'
WORKER = '"><img src=x onerror=alert(1)>'
PAGE = f"<h1>Bad gateway</h1><script>alert(1)</script>{HOSTILE}".encode()


@pytest.fixture
async def relay(tmp_path):
    """Run a relay with a destination that accepts, one that fails with a hostile page, and a paused one."""
    async with (
        receivers.answers(status="201 Created") as good,
        receivers.answers(status="404 Not Found", body=PAGE) as bad,
    ):
        shop = destination("shop", bad.url).replace('["0.1s", "0.1s", "0.1s", "0.1s"]', "[]")
        config = write_config(
            tmp_path, SOURCES, destination("crm", good.url), shop, destination("bi", good.url, HELD)
        )
        async with running(config) as relay:
            yield relay


async def ended(relay, name, state):
    """Store a hostile event; return its delivery to this destination when it has this state."""
    event = await store(relay, session=HOSTILE, total=45)
    async with asyncio.timeout(30):
        while True:
            for row in await relay.rows("deliveries"):
                if row["event_id"] == event and row["destination"] == name and row["state"] == state:
                    return row
            await asyncio.sleep(0.01)


COUNTS_ALL = re.compile(
    r"count\(\*\)\s+FROM\s+(events|deliveries|attempts|ends|owed)\b(?!.*LIMIT)", re.IGNORECASE | re.DOTALL
)
"""A statement that counts a whole table. No page may use one, because it slows down with more events."""


def buttons(found):
    """Return the buttons of a page by their commands, without those for selected rows."""
    found = [each for each in found.all("button") if "data-call" in each and "data-selected" not in each]
    return {each["data-command"]: each for each in found}


async def post(relay, path, body):
    """Ask the API for a change, and return the result."""
    raw = request("POST", f"/api/{path}", json.dumps(body).encode())
    return (await exchange(relay.addresses.socket, raw)).json


async def refuse(relay, path="/nowhere"):
    """Send a request that no source accepts; return its id among the refused ones."""
    await relay.exchange(request("POST", path, b"{}"))
    await relay.app.ingest.refused.flush()
    [[refused], _] = await relay.app.store.refused.page(limit=1)
    return refused.id


async def test_every_screen_shows_hostile_data_as_text(relay):
    dead = await ended(relay, "shop", "dead")
    refused = await refuse(relay, f"/%22%3E%3Cscript%3Ealert(1)%3C/script%3E?a={'<img/src=x>'}")
    replay = {"filter": {"state": "dead", "destination": "shop"}}
    answer = await exchange(
        relay.addresses.socket, request("POST", "/api/deliveries/retry", json.dumps(replay).encode())
    )
    await relay.exchange(register(WORKER, description=HOSTILE, endpointUrl="http://x"))
    places = {
        "/events/{id}": f"/events/{dead['event_id']}", "/deliveries/{id}": f"/deliveries/{dead['id']}",
        "/refused/{id}": f"/refused/{refused}", "/replays/{id}": f"/replays/{json.loads(answer.body)['id']}",
        "/destinations/{name}": "/destinations/shop", "/sources/{name}": "/sources/adorn",
        "/workers/{source}/{id:[^/]+}": f"/workers/whatsapp/{quote(WORKER, safe='')}",
    }  # fmt: skip
    statements = await watch_statements(relay.app.store)
    for path in SCREENS:
        address = places.get(path, path)
        answer = await get(relay, f"/ui{address}")
        assert HEADERS.items() <= answer.headers.items()
        status, found = await page(relay, f"/ui{address}")
        assert status == 200, address
        assert len(found.all("script")) == 1, address
        assert found.all("img") == []
        assert not [each for _, each in found.elements if any(key.startswith("on") for key in each)]
        assert not {"\x1b", "\u202e"} & set(found.text)
        assert len(answer.body) < 60_000
    assert [each for each in statements if "events" in each]
    assert not [each for each in statements if COUNTS_ALL.search(each) and "CASE WHEN" not in each]


async def test_a_destination_shows_its_failures_and_ledger(relay):
    await ended(relay, "shop", "dead")
    status, found = await page(relay, "/ui/destinations/shop")
    assert status == 200
    assert "4xx: HTTP 404 Not Found" in found.text
    assert "1 created = ended + pending: ✔ balanced" in found.text
    again = buttons(found)["relay deliveries retry --destination shop --state dead"]
    assert json.loads(again["data-body"]) == {"filter": {"destination": "shop", "state": "dead"}}
    links = [each["href"] for each in found.all("a")]
    assert "../attempts?destination=shop&result=4xx&status=404&since=1h" in links
    _, listed = await page(relay, "/ui/attempts?destination=shop&result=4xx&status=404&since=1h")
    assert "4xx: HTTP 404 Not Found" in listed.text
    _, listed = await page(relay, "/ui/attempts?destination=shop&result=4xx&status=none&since=1h")
    assert "No attempt matches." in listed.text
    for flag, options in (("1", "--failed"), ("0", "--result ok")):
        _, listed = await page(relay, f"/ui/attempts?destination=shop&failed={flag}")
        assert f"relay attempts list --destination shop {options}" in listed.text
    attempts = "../attempts?destination=shop&since=1h"
    assert {f"{attempts}&failed=0", f"{attempts}&failed=1", attempts} <= set(links)
    assert "../deliveries?destination=shop&state=dead" in links
    _, now = await page(relay, "/ui/")
    assert ("./deliveries?destination=shop&state=dead", "bad") in {
        (each["href"], each.get("class")) for each in now.all("a")
    }
    counts = {
        f"./deliveries?state={word}" for word in ("delivered", "dead", "expired", "cancelled", "pending")
    }
    assert counts <= {each["href"] for each in now.all("a")}
    assert "127.0.0.1" in found.text
    status, found = await page(relay, "/ui/destinations/ship")
    assert (status, 'did you mean "shop"' in found.text) == (404, True)


async def test_figures_are_those_of_the_last_hour_or_day(relay):
    await relay.app.jobs.run("history")
    await ended(relay, "shop", "dead")
    relay.app.history._ran_at -= 10 * SECOND  # ten seconds pass
    await relay.app.history.run()
    for path, counted in (
        ("/ui/", "./attempts?destination=shop&failed=1&since={}"),
        ("/ui/destinations/shop", "../attempts?destination=shop&result=4xx&status=404&since={}"),
        ("/ui/sources/adorn", None),
    ):
        for query, name, since, start in (("", "hour", "1h", "60 min"), ("?last=day", "day", "24h", "24 h")):
            status, found = await page(relay, path + query)
            assert status == 200
            links = {each["href"]: each.get("aria-current") for each in found.all("a")}
            assert (links["?"], links["?last=day"]) == (("true", None) if name == "hour" else (None, "true"))
            assert counted is None or counted.format(since) in links
            assert start in found.text
    bars = [each["aria-label"] for each in (await page(relay, "/ui/?last=day"))[1].all("svg")]
    assert "Attempts in 1 h, at most 1" in bars


async def test_destinations_are_sorted_and_show_their_own_settings(relay):
    await ended(relay, "shop", "dead")
    orders = {
        "": "crm shop bi",
        "?sort=dead": "shop crm bi",
        "?sort=destination": "bi crm shop",
        "?sort=-destination": "shop crm bi",
        "?sort=x": "crm shop bi",
    }
    for query, names in orders.items():
        _, found = await page(relay, f"/ui/destinations{query}")
        links = [each["href"].rpartition("/")[2] for each in found.all("a")]
        assert [each for each in links if each in ("crm", "shop", "bi")] == names.split()
    _, found = await page(relay, "/ui/destinations/bi")
    own, _, every = found.text.partition("All settings")
    assert ("paused = true" in own, "concurrency" in own, "concurrency" in every) == (True, False, True)


async def test_the_buttons_of_a_destination_fit_its_state(relay):
    await store(relay)
    _, found = await page(relay, "/ui/destinations/bi")
    assert "relay destinations resume bi" not in buttons(found)
    assert "paused = false" in found.text
    assert "1 pending" in found.text
    _, found = await page(relay, "/ui/destinations/crm")
    assert {"relay destinations test crm", "relay destinations pause crm"} <= buttons(found).keys()
    await relay.operator("POST", "/api/destinations/crm/pause")
    _, found = await page(relay, "/ui/destinations/crm")
    assert buttons(found)["relay destinations resume crm"]["data-call"] == "POST destinations/crm/resume"
    await relay.operator("POST", "/api/destinations/crm/resume")
    await relay.operator("POST", "/api/destinations/crm/disable")
    _, found = await page(relay, "/ui/destinations/crm")
    assert "relay destinations enable crm" in buttons(found)
    assert "relay destinations pause crm" not in buttons(found)


async def test_a_destination_shows_the_limits_of_its_backlog_before_a_change(relay):
    event = await store(relay, session="one")
    await store(relay, session="one")
    await store(relay, session="two")
    shown = await relay.operator("GET", "/api/destinations/bi")
    assert shown["order"] == {"keys": 2, "longest": 2, "is_whole": True}
    stored = await relay.operator("GET", f"/api/events/{event}")
    left = datetime.fromisoformat(shown["expires_next"]) - datetime.fromisoformat(stored["received_at"])
    assert abs(left - timedelta(hours=1)) < timedelta(seconds=30)
    _, found = await page(relay, "/ui/destinations/bi")
    assert "2 with pending deliveries, at most 2 of one key" in found.text
    assert "Next expiry" in found.text
    assert "in 59 min" in found.text
    crm = await relay.operator("GET", "/api/destinations/crm")
    assert (crm["order"], crm["expires_next"]) == (None, None)


async def test_the_list_of_deliveries_shows_running_replays(relay):
    for _ in range(2):
        await store(relay)
    replay = await post(relay, "replays", {"filter": {"source": "adorn"}, "to": "bi", "rate": "1/h"})
    path = f"/api/replays/{replay['id']}"
    done = 0
    async with asyncio.timeout(30):
        while done != 1:
            await asyncio.sleep(0.01)
            done = (await relay.operator("GET", path))["done"]
    _, found = await page(relay, "/ui/deliveries?destination=crm")
    assert "a replay is running: 1 of 2 events" in found.text
    assert f"./replays/{replay['id']}" in [each["href"] for each in found.all("a")]
    assert "a replay is" not in (await page(relay, f"/ui/replays/{replay['id']}"))[1].text
    await relay.operator("DELETE", path)
    _, found = await page(relay, "/ui/deliveries?destination=crm")
    assert "a replay is" not in found.text


async def test_changes_of_a_list_apply_to_its_filter(relay):
    await ended(relay, "shop", "dead")
    query = "destination=shop&state=dead&since=2h&where=type~adorn.*+and+subject"
    status, found = await page(relay, f"/ui/deliveries?{query}")
    assert status == 200
    words = (
        "relay deliveries retry --since 2h --destination shop --state dead"
        " --where 'type~adorn.*' --where subject"
    )
    button = buttons(found)[words]
    assert button["data-call"] == "POST deliveries/retry"
    body = json.loads(button["data-body"])
    assert body == {
        "filter": {
            "destination": "shop", "state": "dead", "since": "2h",
            "where": {"type": {"glob": "adorn.*"}, "subject": {"exists": True}},
        }
    }  # fmt: skip
    assert "relay deliveries list --since 2h" in found.text
    counted = await exchange(
        relay.addresses.socket,
        request("POST", "/api/deliveries/retry", json.dumps({**body, "dry_run": True}).encode()),
    )
    shown = [each["href"] for each in found.all("a") if each["href"].startswith("./deliveries/dlv_")]
    assert json.loads(counted.body) == {"count": len(shown)} == {"count": 1}
    _, found = await page(relay, "/ui/deliveries?state=dead")
    assert "To change all entries at once, add a filter" in found.text
    _, found = await page(relay, "/ui/deliveries?where=data.total%3E%3D100&state=dead")
    assert "add a filter" not in found.text
    assert "No deliver" in found.text
    status, found = await page(relay, "/ui/deliveries?where=%3E%3D")
    assert (status, "data.total>=100 and data.sale_made=true" in found.text) == (400, True)


async def test_a_list_marks_deliveries_that_were_sent_again(relay):
    dead = await ended(relay, "shop", "dead")
    await post(relay, "deliveries/retry", {"filter": {"destination": "shop", "state": "dead"}})
    rows = []
    async with asyncio.timeout(30):
        while len(rows) < 2 or rows[0]["state"] == "pending":
            await asyncio.sleep(0.01)
            rows = (await relay.operator("GET", "/api/deliveries?destination=shop"))["items"]
    query = "?destination=shop&state=dead"
    _, found = await page(relay, f"/ui/deliveries{query}")
    assert "1 of the deliveries on this page was sent again later" in found.text
    assert f"./deliveries/{rows[0]['id']}" in [each["href"] for each in found.all("a")]
    [others] = {each["href"] for each in found.all("a") if "replayed=no" in each["href"]}
    _, found = await page(relay, f"/ui/deliveries{others}")
    assert "relay deliveries list --destination shop --state dead --replayed no" in found.text
    shown = {each["href"] for each in found.all("a") if each["href"].startswith("./deliveries/dlv_")}
    [button] = [each for each in buttons(found).values() if each["data-call"] == "POST deliveries/retry"]
    counted = await post(relay, "deliveries/retry", {**json.loads(button["data-body"]), "dry_run": True})
    assert counted == {"count": len(shown)} == {"count": 1}
    _, found = await page(relay, f"/ui/deliveries{query}&replayed=yes")
    assert f"./deliveries/{dead['id']}" in [each["href"] for each in found.all("a")]
    assert not buttons(found)
    _, found = await page(relay, f"/ui/deliveries/{dead['id']}")
    assert f"../deliveries/{rows[0]['id']}" in [each["href"] for each in found.all("a")]


async def test_filters_are_added_by_links_with_the_values_of_the_page(relay):
    await ended(relay, "shop", "dead")
    _, found = await page(relay, "/ui/deliveries?state=dead&limit=20&cursor=")
    links = {each["href"] for each in found.all("a")}
    given = "?state=dead&limit=20"
    added = ("destination=shop", "type=adorn.session.started", "since=1h", "replayed=no", "source=adorn")
    assert {f"{given}&{each}" for each in added[:4]} <= links
    assert f"{given}&{added[4]}" not in links  # a delivery does not name its source
    assert "?limit=20" in links  # removes the state
    assert not [link for link in links if link.startswith(given) and "state=dead&state" in link]
    assert "condition on the event" in found.text
    _, found = await page(relay, "/ui/attempts?failed=1")
    assert "failed yes" in found.text
    assert {"?failed=1&result=4xx", "?failed=1&status=404"} <= {each["href"] for each in found.all("a")}


async def test_only_operators_with_the_scope_to_change_rows_can_select_them(relay):
    dead = await ended(relay, "shop", "dead")
    _, found = await page(relay, "/ui/deliveries?destination=shop")
    boxes = [each for each in found.all("input") if each.get("type") == "checkbox"]
    assert [(each["name"], each["value"]) for each in boxes] == [("id", dead["id"])]
    selected = {each["data-selected"]: each for each in found.all("button") if "data-selected" in each}
    assert {name: each["data-call"] for name, each in selected.items()} == {
        "Retry": "POST deliveries/retry", "Cancel": "POST deliveries/cancel",
    }  # fmt: skip
    assert all("disabled" in each for each in selected.values())
    _, found = await page(relay, "/ui/deliveries?state=dead")
    assert [each["data-selected"] for each in found.all("button") if "data-selected" in each] == ["Retry"]
    counted = await post(relay, "deliveries/retry", {"ids": [boxes[0]["value"]], "dry_run": True})
    assert counted == {"count": 1}


@pytest.mark.parametrize("query", ["", "?state=dead", "?event_id=evt_0&state=dead", "?id=dlv_0"])
async def test_no_button_changes_all_deliveries_of_a_list_without_a_destination(relay, query):
    _, found = await page(relay, f"/ui/deliveries{query}")
    assert not buttons(found)


async def test_a_delivery_shows_attempts_response_and_request(relay):
    dead = await ended(relay, "shop", "dead")
    _, found = await page(relay, f"/ui/deliveries/{dead['id']}")
    assert "dead, all attempts failed" in found.text
    assert "<h1>Bad gateway</h1><script>alert(1)</script>" in found.text
    assert "webhook-id: " in found.text
    assert "relay deliveries request" in found.text
    assert json.loads(buttons(found)[f"relay deliveries retry {dead['id']}"]["data-body"]) == {
        "ids": [dead["id"]]
    }


async def test_a_refused_request_shows_its_diagnosis_and_the_next_step(relay):
    await store(relay)
    await relay.exchange(request("POST", "/v1/eventz", b"{}"))
    id_ = await refuse(relay, "/v1x/events")
    _, found = await page(relay, "/ui/refused")
    links = [each["href"] for each in found.all("a")]
    counts = {f"./refused?source=adorn&{each}" for each in ("since=1h", "reason=not_found")}
    assert {*counts, "./events?source=adorn"} <= set(links)
    assert "did you mean /v1/events?" in found.text
    assert f"./refused/{id_}" in [each["href"] for each in found.all("a")]
    _, found = await page(relay, f"/ui/refused/{id_}")
    assert "unknown path; did you mean /v1/events?" in found.text
    assert "Have the sender post to /v1/events." in found.text
    assert "relay sources list" in found.text
    assert not buttons(found)


async def test_a_worker_shows_its_heartbeats_and_maintenance(relay):
    await relay.exchange(register("w/1", version="2.1"))
    worker = await relay.operator("GET", "/api/workers/whatsapp/w%2F1")
    assert (len(worker["heard_minutes"]), worker["heard_minutes"].count("1")) == (60, 1)
    _, found = await page(relay, "/ui/workers")
    assert "1 of 60 minutes with a heartbeat" in [each.get("aria-label") for each in found.all("span")]
    assert "1 ONLINE · versions: 2.1: 1" in found.text
    assert {"?status=ONLINE", "?version=2.1"} <= {each["href"] for each in found.all("a")}
    assert worker["queued_commands"] == 0
    await post(relay, "workers/whatsapp/w%2F1/commands", {"command": {"type": "restart"}})
    [worker] = (await relay.operator("GET", "/api/workers"))["items"]
    assert worker["queued_commands"] == 1
    _, found = await page(relay, "/ui/workers/whatsapp/w%2F1")
    begin = buttons(found)["relay workers maintenance whatsapp w/1 on --for 2h"]
    assert begin["data-call"] == "POST workers/whatsapp/w%2F1/maintenance"
    answer = await exchange(
        relay.addresses.socket,
        request("POST", f"/api/{begin['data-call'].partition(' ')[2]}", begin["data-body"].encode()),
    )
    assert answer.status == 200
    _, found = await page(relay, "/ui/workers/whatsapp/w%2F1")
    assert "in maintenance, ends in 1 h 59 min" in found.text
    assert "relay workers maintenance whatsapp w/1 off" in buttons(found)
    status, found = await page(relay, "/ui/workers/whatsapp/w2")
    assert status == 404


async def test_a_source_shows_its_tokens_and_settings(relay):
    _, found = await page(relay, "/ui/sources/moddy")
    assert "tokens[0]" in found.text
    assert "dev-token" not in found.text
    assert "[sources.moddy]" in found.text
    assert "relay sources pause moddy" in buttons(found)
    await relay.operator("POST", "/api/sources/moddy/pause")
    _, found = await page(relay, "/ui/sources/moddy")
    assert "relay sources resume moddy" in buttons(found)


async def test_jobs_configuration_doctor_and_nodes(relay):
    _, found = await page(relay, "/ui/jobs")
    assert "relay jobs run retention" in buttons(found)
    assert "GET db" in [each.get("data-ask") for each in found.all("button")]
    counted, uncounted = [await relay.operator("GET", f"/api/db{query}") for query in ("", "?counts=0")]
    assert (counted["events"], counted["pending"]) == (0, 0)
    assert uncounted == {**counted, "events": None}
    assert ("relay db backup" in buttons(found)) is (KINDS[0] == "sqlite")
    _, found = await page(relay, "/ui/config")
    assert "[destinations.crm]" in found.text
    assert re.search(r"(?m)^listen = .*  # config.toml:[0-9]+$", found.text)
    assert re.search(r"(?m)^concurrency = [0-9]+$", found.text)  # a default
    assert "whsec_" not in found.text
    asked = {
        each["data-ask"]: json.loads(each["data-body"]) for each in found.all("button") if "data-ask" in each
    }
    assert asked == {"POST reload": {"dry_run": True}}
    _, found = await page(relay, "/ui/doctor")
    assert "GET doctor" in [each.get("data-ask") for each in found.all("button")]
    _, found = await page(relay, "/ui/nodes")
    assert "(this node)" in found.text
