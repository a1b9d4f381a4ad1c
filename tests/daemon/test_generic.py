"""Generic sources in a running relay: from a signed request to a receiver that verifies the delivery."""

import hmac
import json
import time

import pytest
import pytest_asyncio
import receivers
from daemons import destination, running, write_config
from standardwebhooks import Webhook
from support import until
from wire import request

SECRET = b"shop-secret"
SHOP = """
[sources.shop]
plugin = "generic"
path = "/hooks/shop/{store}"
secrets = ["old-secret", "shop-secret"]
type = "{header:X-Shop-Topic}"
subject = "{path:store}"
key = "{body:id}"
context = { store = "{path:store}" }
data = "{body:payload}"
reply = { status = 202, json = { ok = true } }
[sources.shop.verify.hmac]
algorithm = "sha256"
header = "X-Shop-Signature"
prefix = "sha256="
encoding = "hex"
"""
"""The example of docs/sources.md."""

OTHERS = """
[sources.chat]
plugin = "generic"
path = "/hooks/chat"
secrets = ["chat-secret"]
verify = { hmac = { header = "X-Chat-Signature", prefix = "v0=", timestamp_header = "X-Chat-Time", signed = "v0:{timestamp}:{body}" } }
type = "{body:event.type}"
form_field = "payload"
verify_tokens = ["verify-me"]
handshakes = [
  { method = "POST", when = { "{body:type}" = "url_verification" }, reply = { text = "{body:challenge}" } },
  { method = "GET", when = { "{query:hub.mode}" = "subscribe" }, token = "{query:hub.verify_token}", verified = false, reply = { text = "{query:hub.challenge}" } },
  { method = "HEAD", verified = false, reply = { empty = true } },
]
[sources.mail]
plugin = "generic"
prefix = "/v2"
path = "/hooks/mail"
secrets = ["mail-key"]
verify = { api_key = { header = "X-Key" } }
events = "{body}"
type = "{item:event}"
key = "{item:id}"
max_events = 50
reply = { status = 204, empty = true }
[sources.lan]
plugin = "generic"
path = "/hooks/lan"
verify = "none"
networks = ["192.0.2.0/24"]
type = "ping"
[sources.calls]
plugin = "generic"
path = ["/hooks/calls", "/hooks/calls/{id}"]
methods = ["GET", "POST"]
verify = "bearer"
secrets = ["calls-token"]
type = "call"
subject = "{path:id}"
body = "raw"
"""  # noqa: E501 - lines of TOML


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running_relay(tmp_path_factory, listener):
    folder = tmp_path_factory.mktemp("relay")
    async with receivers.answers() as receiver:
        config = write_config(folder, SHOP, OTHERS, destination("crm", str(receiver.url)))
        async with running(config) as relay:
            yield relay, receiver


def signed(body, secret=SECRET, **headers):
    signature = hmac.digest(secret, body, "sha256").hex()
    fields = {"x_shop_topic": "order.paid", "x_shop_signature": f"sha256={signature}", **headers}
    return request("POST", "/hooks/shop/berlin", body, **fields)


def received(receiver, id_):
    """Return the delivery of an event, verified by the library of Standard Webhooks."""
    found = [each for each in receiver.requests if each.headers["webhook-id"] == id_]
    if not found:
        return None
    Webhook("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw").verify(found[0].body, found[0].headers)
    return found[0].body


@pytest.mark.asyncio(loop_scope="module")
async def test_the_shop_of_the_documentation_delivers_a_verified_event(running_relay):
    relay, receiver = running_relay
    huge = b"9" * 4000
    body = b'{"id": 7, "payload": {"total": 45000.00, "huge": %b, "name": "Bob \\ud83d"}}' % huge
    answer = await relay.exchange(signed(body))
    assert (answer.status, answer.json) == (202, {"ok": True})
    [row] = await relay.rows(source="shop")
    delivered = await until(lambda: received(receiver, row["id"]))
    assert b'"data":{"total": 45000.00, "huge": %b, "name": "Bob \\ud83d"}' % huge in delivered
    envelope = json.loads(delivered)
    assert envelope["type"] == "shop.order.paid"
    assert (envelope["subject"], envelope["context"]) == ("berlin", {"store": "berlin"})
    again = await relay.exchange(signed(body, b"old-secret"))
    assert (again.status, again.json) == (202, {"ok": True})
    assert len(await relay.rows(source="shop")) == 1  # a repetition, signed with the other secret


@pytest.mark.asyncio(loop_scope="module")
async def test_refusals_are_json_and_store_nothing(running_relay):
    relay, _ = running_relay
    before = len(await relay.rows(source="shop"))
    body = b'{"id": 8, "payload": {}}'
    for raw, status, message in (
        (signed(body, b"wrong"), 401, "The signature does not match"),
        (signed(body, x_shop_signature=""), 401, "The signature is malformed"),
        (request("POST", "/hooks/shop/berlin", body), 401, "Missing signature (header X-Shop-Signature)"),
        (signed(b"{"), 400, "The body is not valid JSON"),
        (signed(b'{"id": 8}'), 400, "payload: field is required"),
        (signed(body, x_shop_topic=""), 400, "type: missing: header X-Shop-Topic"),
        (request("GET", "/hooks/shop/berlin"), 405, "Method not allowed"),
        (request("POST", "/hooks/shop", body), 404, "No such path"),
        (
            request("POST", "/hooks/lan", b"{}"),
            403,
            "The sender's address is not in the permitted networks",
        ),
        (request("GET", "/hooks/calls"), 401, "Missing or invalid token"),
    ):
        answer = await relay.exchange(raw)
        assert (answer.status, answer.json["error"]["message"]) == (status, message), raw
    assert len(await relay.rows(source="shop")) == before


@pytest.mark.asyncio(loop_scope="module")
async def test_handshakes_are_answered_and_never_stored(running_relay):
    relay, _ = running_relay
    now = str(int(time.time()))

    def chat(body, secret=b"chat-secret", content_type="application/json"):
        signature = hmac.digest(secret, f"v0:{now}:".encode() + body, "sha256").hex()
        return request(
            "POST",
            "/hooks/chat",
            body,
            x_chat_time=now,
            x_chat_signature=f"v0={signature}",
            content_type=content_type,
        )

    asked = json.dumps({"type": "url_verification", "challenge": "abc"}).encode()
    answer = await relay.exchange(chat(asked))
    assert (answer.status, answer.body, answer.headers["content-type"]) == (
        200,
        b"abc",
        "text/plain; charset=utf-8",
    )
    assert (await relay.exchange(chat(asked, b"wrong"))).status == 401
    meta = "/hooks/chat?hub.mode=subscribe&hub.challenge=42&hub.verify_token="
    answer = await relay.exchange(request("GET", f"{meta}verify-me"))
    assert (answer.status, answer.body) == (200, b"42")
    assert (await relay.exchange(request("GET", f"{meta}wrong"))).status == 403
    assert (await relay.exchange(request("GET", "/hooks/chat"))).status == 401
    assert (await relay.exchange(request("HEAD", "/hooks/chat"), bodiless=True)).status == 200
    assert await relay.rows(source="chat") == []
    form = b"payload=%7B%22event%22%3A%7B%22type%22%3A%22clicked%22%7D%7D"
    assert (await relay.exchange(chat(form, content_type="application/x-www-form-urlencoded"))).status == 200
    [row] = await relay.rows(source="chat")
    assert row["type"] == "chat.clicked"


@pytest.mark.asyncio(loop_scope="module")
async def test_a_batch_is_stored_whole_and_each_item_has_its_own_key(running_relay):
    relay, _ = running_relay

    async def post(items):
        body = json.dumps(items).encode()
        return await relay.exchange(request("POST", "/v2/hooks/mail", body, x_key="mail-key"), bodiless=True)

    assert (await post([{"event": "open", "id": 1}, {"event": "click", "id": 2}])).status == 204
    assert (await post([{"event": "open", "id": 1}, {"event": "bounce", "id": 3}])).status == 204
    assert (await post([])).status == 204
    assert [row["type"] for row in await relay.rows(source="mail")] == [
        "mail.open",
        "mail.click",
        "mail.bounce",
    ]
    answer = await relay.exchange(
        request("POST", "/v2/hooks/mail", b'[{"event": "a"}, {"id": 4}]', x_key="mail-key")
    )
    assert (answer.status, answer.json["error"]["code"]) == (400, "validation_error")
    many = json.dumps([{"event": "a"}] * 51).encode()
    assert (await relay.exchange(request("POST", "/v2/hooks/mail", many, x_key="mail-key"))).status == 413
    assert len(await relay.rows(source="mail")) == 3


@pytest.mark.asyncio(loop_scope="module")
async def test_a_source_has_several_paths_and_methods_and_keeps_bytes(running_relay):
    relay, _ = running_relay
    bearer = {"authorization": "Bearer calls-token"}
    answer = await relay.exchange(request("GET", "/hooks/calls/7?from=%2B49", **bearer))
    event = await relay.event(answer.json["event_id"])
    assert (event.subject, event.data) == ("7", b'{"from":"+49"}')
    answer = await relay.exchange(
        request("POST", "/hooks/calls", b"\x00\xff", content_type="audio/wav", **bearer)
    )
    event = await relay.event(answer.json["event_id"])
    assert (event.subject, event.data) == (None, b'{"content_type":"audio/wav","base64":"AP8="}')


@pytest.mark.asyncio(loop_scope="module")
async def test_operators_see_the_settings_without_secrets(running_relay):
    relay, _ = running_relay
    shown = await relay.operator("GET", "/api/sources/shop")
    settings = shown["settings"]
    assert settings["secrets"] == ["<secret>", "<secret>"]
    assert settings["verify"] == {
        "hmac": {
            "header": "X-Shop-Signature", "prefix": "sha256=", "separator": "", "signed": "{body}",
            "timestamp_unit": "s", "algorithm": "sha256", "encoding": "hex", "key_encoding": "text",
            "key_prefix": "",
        }
    }  # fmt: skip
    assert settings["reply"]["json"] == {"ok": True}
    assert "shop-secret" not in json.dumps(shown)
    listed = await relay.operator("GET", "/api/sources")
    assert {each["plugin"] for each in listed["items"]} == {"generic"}
