"""The pages of an event and a delivery: the timeline, every destination, and bodies of any shape."""

import asyncio
import hashlib
import json

import msgspec
import pytest
import receivers
from daemons import SOURCES, destination, running, write_config
from test_ui import HOSTILE, Document, get, page, store
from test_ui_screens import HELD, PAGE, buttons, post
from wire import request


@pytest.fixture
async def relay(tmp_path):
    """Run a relay with a destination that accepts, one that fails with a hostile page, and a paused one."""
    async with (
        receivers.answers(status="201 Created") as good,
        receivers.answers(status="404 Not Found", body=PAGE) as bad,
    ):
        shop = destination("shop", bad.url).replace('["0.1s", "0.1s", "0.1s", "0.1s"]', "[]")
        bi = destination("bi", good.url, HELD)
        config = write_config(tmp_path, SOURCES, destination("crm", good.url), shop, bi)
        async with running(config) as relay:
            yield relay


async def settled(relay, event, number=1, **states):
    """Return an event with a number of deliveries when the latest to each destination has its state."""
    async with asyncio.timeout(30):
        while True:
            found = await relay.operator("GET", f"/api/events/{event}")
            latest = {each["destination"]: each["state"] for each in reversed(found["owed"])}
            if len(found["owed"]) >= number and states.items() <= latest.items():
                return found
            await asyncio.sleep(0.01)


def check_order(text, *parts):
    """Check that a text contains these parts in this order."""
    at = 0
    for part in parts:
        assert part in text[at:], (part, text[at:])
        at = text.index(part, at) + len(part)


async def test_an_event_shows_its_way_from_its_sender_to_every_destination(relay, monkeypatch):
    body = json.dumps({"event_type": "sale", "session_id": "s-1"}).encode()
    raw = request("POST", "/v1/events", body, **{"idempotency-key": "once"})
    event = (await relay.exchange(raw)).json["event_id"]
    await settled(relay, event, crm="delivered", shop="dead", bi="pending")
    assert (await relay.exchange(raw)).json["event_id"] == event
    status, found = await page(relay, f"/ui/events/{event}")
    assert status == 200
    check_order(
        found.text, "as received", "Reply", "✔ HTTP 200 in ", "Timeline", "Received", "Stored",
        "Answered", "✔ HTTP 200", "Repeated", "once by its sender, answered with this id", "✔ HTTP 200 in ",
        "Goes to 3 of 3 destinations", "crm", "delivered", "1st attempt: HTTP 201 in ", "after receipt",
        "shop", "dead", "1st attempt: HTTP 404 Not Found", "all attempts failed", "1 attempt",
        "✖ 4xx: HTTP 404 Not Found in", "bi", "pending", "no attempt yet · paused in config.toml",
    )  # fmt: skip
    assert len(found.all("ol")) == 4  # the line, the repetitions, the destinations, the attempts of one
    texts = {each.get("data-copy") for each in found.all("button")}
    assert {event, f"relay events show {event}"} <= texts

    [dead] = [each["id"] for each in await relay.rows("deliveries") if each["destination"] == "shop"]
    await post(relay, "deliveries/retry", {"ids": [dead]})
    await settled(relay, event, 4, shop="dead")
    _, found = await page(relay, f"/ui/events/{event}")
    check_order(found.text, "shop", "1 attempt, sent again", "4xx: HTTP 404", "sent again", "4xx: HTTP 404")

    queries = relay.app.store.queries
    load = queries.load

    async def damaged(ids):
        return {id_: msgspec.structs.replace(each, body=b"x") for id_, each in (await load(ids)).items()}

    monkeypatch.setattr(queries, "load", damaged)
    _, found = await page(relay, f"/ui/events/{event}")
    assert "✖ damaged: its SHA-256 differs; the relay does not send it" in found.text


async def test_an_event_shows_which_destinations_do_not_get_it_and_why(tmp_path):
    hook = "http://127.0.0.1:9/x"
    others = [
        destination(f"other-{number}", hook, "").replace('"*"', f'"adorn.no-{number}.*"')
        for number in range(4)
    ]
    gone = destination("gone", hook, "paused = true").replace('"*"', '"*", "!adorn.x"')
    vip = destination("vip", hook, 'paused = true\nwhere = { "data.total" = { gte = 100 } }')
    many = [destination(f"many-{number}", hook, "paused = true") for number in range(60)]
    config = write_config(tmp_path, SOURCES, gone, *others, vip, *many)
    async with running(config) as relay:
        event = await store(relay, total=45)
        answer = await get(relay, f"/ui/events/{event}")
        assert len(answer.body) < 60_000
        found = Document(answer.body.decode())
        assert f"../deliveries?event_id={event}" in {each["href"] for each in found.all("a")}
        assert "Send now: gone" in {each.get("aria-label") for each in found.all("button")}
        check_order(
            found.text, "Goes to 61 of 66 destinations", "gone", "pending", "paused in config.toml",
            "11 others", "vip", "not sent", "data.total", "4 others", "not sent", "subscribe to other types",
            "other-0",
            "other-3",
        )  # fmt: skip
        config.write_text(config.read_text().replace("gte = 100", "exists = false"))
        await relay.operator("POST", "/api/reload")
        _, found = await page(relay, f"/ui/events/{event}")
        assert "matches the event now, but did not when the event arrived" in found.text
        button = buttons(found)[f"relay events replay {event} --to vip"]
        await post(relay, "replays", json.loads(button["data-body"]))
        shown = await settled(relay, event, vip="pending")
        assert len({each["destination"] for each in shown["owed"]}) == 62


async def test_a_body_is_shown_as_a_tree_as_text_and_as_each_destination_gets_it(relay):
    items = [{"sku": f"A-{number}"} for number in range(150)]
    fields = {"event_type": "sale", "session_id": "s-1", "items": items, "note": "4711"}
    body = json.dumps(fields).replace('"4711"', '12345678901234567890, "b": 1.50, "a": "caf\\u00e9"')
    event = (await relay.exchange(request("POST", "/v1/events", body.encode()))).json["event_id"]
    owed = (await settled(relay, event, crm="delivered"))["owed"]
    [delivery] = [each["id"] for each in owed if each["destination"] == "crm"]
    _, found = await page(relay, f"/ui/events/{event}")
    check_order(found.text, "items: [150 items]", "note: 12345678901234567890", "b: 1.50", 'a: "café"')
    _, found = await page(relay, f"/ui/events/{event}?find=a-14")
    check_order(found.text, '11 matches for "a-14"', "items[14].sku", "items[149].sku")
    place = [each["href"] for each in found.all("a") if "at=" in each["href"]][-2]
    assert "skip" not in place
    _, found = await page(relay, f"/ui/events/{event}?at={body.index('[')}&skip=100")
    check_order(found.text, "Part items", "100: {1 key}", "149: {1 key}")
    _, found = await page(relay, f"/ui/events/{event}?view=text")
    assert body in found.text
    _, found = await page(relay, f"/ui/events/{event}?as={delivery}")
    check_order(found.text, "Headers sent", "POST http", "webhook-id: ", "Body sent", f'id: "{event}"')
    assert "curl -X POST http" in found.text
    for query in ("?as=dlv_0", "?at=x&skip=-1", "?at=99999999999999", "?skip=9999&view=text", "?find=%22%00"):
        status, found = await page(relay, f"/ui/events/{event}{query}")
        assert (status, "150 items" in found.text or "view" in query) == (200, True), query
    _, found = await page(relay, f"/ui/deliveries/{delivery}")
    check_order(found.text, "Attempts", "Created", "✔ ok: HTTP 201", "Headers sent", "webhook-id")


BODIES = {
    "deep": b"[" * 900 + b"]" * 900,
    "numbers": b'{"a": [' + b"1," * 100_000 + b"1]}",
    "text": json.dumps({"a": HOSTILE * 12_000}).encode(),
    "keys": json.dumps({f"{HOSTILE}{number}": {HOSTILE: number} for number in range(1000)}).encode(),
    "markup": b"<script>alert(1)</script>" * 10_000,
    "binary": b"\xff\x00" * 10_000,
    "empty": b"",
    "quote": b'"',
}


async def test_bodies_of_any_shape_are_shown_within_bounds(relay, monkeypatch):
    event = await store(relay)
    queries, body = relay.app.store.queries, b""
    load = queries.load

    async def other(ids):
        digest = hashlib.sha256(body).digest()
        return {
            id_: msgspec.structs.replace(each, body=body, sha256=digest)
            for id_, each in (await load(ids)).items()
        }

    monkeypatch.setattr(queries, "load", other)
    sizes = {}
    for name, each in BODIES.items():
        body = each
        for query in ("", "?find=a", "?view=text", "?view=text&skip=16384"):
            answer = await get(relay, f"/ui/events/{event}{query}")
            found = Document(answer.body.decode())
            assert answer.status == 200, name
            assert len(found.all("script")) == 1, (name, query)
            assert found.all("img") == [], (name, query)
            assert not {"\x1b", "\u202e"} & set(found.text), (name, query)
            sizes[name, query] = len(answer.body)
    assert max(sizes.values()) < 100_000, sizes
