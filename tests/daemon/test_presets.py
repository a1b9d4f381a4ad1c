"""Every preset through a running relay: its samples, tampered requests, challenges, duplicates and batches.

`vendors.py` signs the requests by the vendors' documents; `vectors.toml` has requests that vendors
published with their signatures.
"""

import asyncio
import hmac
import json
import random
import time
import tomllib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple
from urllib.parse import parse_qsl, urlencode

import msgspec
import pytest
import pytest_asyncio
import standardwebhooks
from commands import run
from daemons import Recorder, destination, running, write_config
from support import until
from vendors import PUBLIC, Sent, presets, secret_of, sha256, signed, unsigned_query
from wire import raw_request

from relay.base.clock import SECOND
from relay.base.units import parse_duration
from relay.cli import send
from relay.ingest.event import make_event
from relay.ingest.routes import mounts_of
from relay.plugin_loading.loader import load
from relay.source import Incoming, Refusal, Reply, Unauthenticated

PRESETS = presets()
SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"  # of the destination
VERIFY_TOKEN = "verify-token-of-meta"
VECTORS = tomllib.loads((Path(__file__).parents[1] / "helpers" / "vectors.toml").read_text())["vectors"]

# The events of each sample: type and subject.
EVENTS = {
    "alertmanager": {"firing": [("firing", "HighLatency"), ("resolved", "HighLatency")]},
    "azure-event-grid": {
        "batch": [
            ("Microsoft.Storage.BlobCreated", "/blobServices/default/containers/in/blobs/new.txt"),
            ("Microsoft.Storage.BlobDeleted", "/blobServices/default/containers/in/blobs/old.txt"),
        ]
    },
    "bitbucket": {"repo:push": [("repo:push", "team_name/repo_name")]},
    "calendly": {"invitee.created": [("invitee.created", "test@example.com")]},
    "chargebee": {"subscription_created": [("subscription_created", "16BHbhF4s42tO2lJ")]},
    "discord-events": {"ENTITLEMENT_CREATE": [("ENTITLEMENT_CREATE", None)]},
    "discord-interactions": {"interaction.2": [("interaction.2", "786008729715212338")]},
    "dropbox": {"changed": [("changed", "dbid:AAH4f99T0taONIb-OurWxbNQ6ywGRopQngc")]},
    "gitea": {"push": [("push", "gitea/webhooks")]},
    "github": {
        "ping": [("ping", "octocat/Hello-World")],
        "push": [("push", "octocat/Hello-World")],
        "issues.opened": [("issues.opened", "octocat/Hello-World")],
    },
    "gitlab": {
        "push": [("push", "mike/diaspora")],
        "merge_request.open": [("merge_request.open", "gitlab-org/gitlab-test")],
    },
    "grafana": {"firing": [("firing", "High memory usage"), ("firing", "High CPU usage")]},
    "hubspot": {"batch": [("contact.creation", "123"), ("contact.propertyChange", "123")]},
    "intercom": {"conversation.user.created": [("conversation.user.created", "1065")]},
    "jira": {"jira:issue_updated": [("jira:issue_updated", "JRA-20002")]},
    "line": {
        "batch": [
            ("message", "U4af4980629aaaaaaaaaaaaaaaaaaaaaa"),
            ("follow", "U4af4980629bbbbbbbbbbbbbbbbbbbbbb"),
        ],
        "empty": [],
    },
    "linear": {"Comment.create": [("Comment.create", "2174add1-f7c8-44e3-bbf3-2d60b5ea8bc9")]},
    "mandrill": {"batch": [("send", "example@example.com"), ("open", "example@example.com")]},
    "meta": {
        "page.feed": [("page.feed", "101")],
        "whatsapp_business_account.messages": [
            ("whatsapp_business_account.messages", "102290129340398"),
            ("whatsapp_business_account.messages", "102290129340399"),
        ],
    },
    "microsoft-graph": {
        "batch": [
            ("created", "users/ba3b0b5e/messages/AAMkAGUwNjQ4"),
            ("updated", "users/ba3b0b5e/messages/AAMkAGUwNjQ5"),
        ]
    },
    "okta": {
        "batch": [("user.session.start", "admin@example.com"), ("user.session.end", "admin@example.com")]
    },
    "paddle": {"customer.created": [("customer.created", "ctm_01hs0tqf76sxmp7ba5e4mw1sc8")]},
    "pagerduty": {"incident.triggered": [("incident.triggered", "PGR0VU2")]},
    "postmark": {"Delivery": [("Delivery", "883953f4-6105-42a2-a16a-77a8eac79483")]},
    "razorpay": {"payment.captured": [("payment.captured", "pay_DESlfW9H8K9uqM")]},
    "sendgrid": {"batch": [("processed", "example@example.com"), ("delivered", "example@example.com")]},
    "sentry": {"issue.created": [("issue.created", "1170820242")]},
    "shopify": {"orders/create": [("orders/create", "example.myshopify.com")]},
    "slack": {
        "event_callback.app_mention": [("event_callback.app_mention", "T061EG9R6")],
        "block_actions": [("block_actions", "T9TK3CUKW")],
        "slash_command": [("slash_command", "T0001")],
    },
    "square": {"payment.updated": [("payment.updated", "KkAkhdMsgzn59SM8A89WgKwekxLZY")]},
    "standard-webhooks": {"contact.created": [("contact.created", None)]},
    "stripe": {
        "invoice.paid": [("invoice.paid", "in_1NG8Du2eZvKYlo2Cv7gXhd3a")],
        "payment_intent.succeeded": [("payment_intent.succeeded", "pi_3MtwBwLkdIwHu7ix28a3tqPa")],
    },
    "svix": {"user.created": [("user.created", None)]},
    "telegram": {"update": [("update", "1111111")]},
    "terraform": {"run:created": [("run:created", "run-FwnENkvDnrpyFC7M")]},
    "trello": {"updateCard": [("updateCard", "4d5ea62fd76aa1136000000c")]},
    "twilio": {
        "message.received": [("message.received", "SM00000000000000000000000000000001")],
        "message.delivered": [("message.delivered", "SM00000000000000000000000000000002")],
    },
    "twilio-voice": {"call.completed": [("call.completed", "CA00000000000000000000000000000001")]},
    "twitch": {"channel.follow": [("channel.follow", "1337")]},
    "typeform": {"form_response": [("form_response", "lT4Z3j")]},
    "vercel": {"deployment.created": [("deployment.created", "prj_Qmexample")]},
    "woocommerce": {"order.created": [("order.created", "https://shop.example/")]},
    "zoom": {"meeting.started": [("meeting.started", "1234567890")]},
}

# The replies that vendors expect: status, content type and body. All others get the default.
REPLIES = {
    "azure-event-grid": (200, None, b""),
    "discord-events": (204, "application/json", b""),
    "discord-interactions": (200, "application/json", b'{"type":5}'),
    "dropbox": (200, None, b""),
    "hubspot": (204, None, b""),
    "meta": (200, None, b""),
    "microsoft-graph": (202, None, b""),
    "okta": (200, None, b""),
    "shopify": (200, None, b""),
    "slack": (200, None, b""),
    "telegram": (200, None, b""),
    "twilio": (200, "text/xml", b"<Response/>"),
    "twilio-voice": (200, "text/xml", b"<Response/>"),
    "twitch": (204, None, b""),
}
DEFAULT_REPLY = (200, "application/json", b'{"status":"accepted"')

JSON = {"Content-Type": "application/json"}
FORM = {"Content-Type": "application/x-www-form-urlencoded"}
META = f"?hub.mode=subscribe&hub.challenge=1158201444&hub.verify_token={VERIFY_TOKEN}"
ZOOM_TOKEN = "qgg8vlvZRS6UYooatFL8Aw"


class Challenge(NamedTuple):
    """A request that a preset answers without an event."""

    preset: str
    reply: bytes
    body: bytes = b""
    headers: Mapping[str, str] = MappingProxyType({})
    query: str = ""
    method: str = "POST"
    status: int = 200
    content_type: str | None = "application/json"
    is_signed: bool = True

    def __str__(self):
        return f"{self.preset} {self.method} {self.body[:20]!r}"


CHALLENGES = [
    Challenge(
        "slack", b"3eZb", b'{"type":"url_verification","challenge":"3eZb"}', JSON, content_type="text/plain"
    ),
    Challenge("meta", b"1158201444", query=META, method="GET", content_type="text/plain", is_signed=False),
    Challenge("discord-interactions", b'{"type":1}', b'{"type":1}', JSON),
    Challenge("discord-interactions", b'{"type":8,"data":{"choices":[]}}', b'{"type":4,"id":"1"}', JSON),
    Challenge("discord-events", b"", b'{"version":1,"type":0}', JSON, status=204),
    Challenge("okta", b'{"verification":"c1"}', b"", {"X-Okta-Verification-Challenge": "c1"}, method="GET"),
    Challenge(
        "dropbox",
        b"abc123",
        query="?challenge=abc123",
        method="GET",
        content_type="text/plain",
        is_signed=False,
    ),
    Challenge(
        "twitch",
        b"pogchamp",
        b'{"challenge":"pogchamp","subscription":{"id":"1"}}',
        {
            "Twitch-Eventsub-Message-Id": "m1",
            "Twitch-Eventsub-Message-Type": "webhook_callback_verification",
            "Twitch-Eventsub-Subscription-Type": "channel.follow",
        },
        content_type="text/plain",
    ),
    Challenge(
        "microsoft-graph",
        b"Validation: Testing",
        query="&validationToken=Validation%3A+Testing",
        content_type="text/plain",
    ),
    Challenge(
        "azure-event-grid",
        b'{"validationResponse":"512d"}',
        b'[{"id":"1","eventType":"Microsoft.EventGrid.SubscriptionValidationEvent","data":{"validationCode":"512d"}}]',
        {**JSON, "aeg-event-type": "SubscriptionValidation"},
    ),
    Challenge(
        "zoom",
        json.dumps(
            {
                "plainToken": ZOOM_TOKEN,
                "encryptedToken": hmac.new(
                    secret_of("zoom").encode(), ZOOM_TOKEN.encode(), "sha256"
                ).hexdigest(),
            },
            separators=(",", ":"),
        ).encode(),
        json.dumps({"event": "endpoint.url_validation", "payload": {"plainToken": ZOOM_TOKEN}}).encode(),
        JSON,
    ),
    Challenge("woocommerce", b'{"ok":true}', b"webhook_id=7", FORM, is_signed=False),
    Challenge("trello", b"", method="HEAD", content_type=None, is_signed=False),
    Challenge("intercom", b"", method="HEAD", content_type=None, is_signed=False),
    Challenge("mandrill", b"", method="HEAD", content_type=None, is_signed=False),
]

# The changes by a retry of a sample, where the key alone makes a duplicate.
RETRIES = {
    "chargebee": (b'"webhook_status":"scheduled"', b'"webhook_status":"re_scheduled"'),
    "hubspot": (b'"attemptNumber":0', b'"attemptNumber":1'),
    "intercom": (b'"delivery_attempts":1', b'"delivery_attempts":2'),
    "line": (b'"isRedelivery":false', b'"isRedelivery":true'),
    "stripe": (b'"pending_webhooks": ', b'"pending_webhooks": 1'),
}


# Samples whose sender does not repeat them, so they have no id.
WITHOUT_KEY = {("slack", "block_actions"), ("slack", "slash_command")}


class Verifying(Recorder):
    """A receiver that checks the signature of each delivery."""

    async def _handle(self, request):
        self.verifier.verify(await request.read(), request.headers)
        return await super()._handle(request)

    verifier = standardwebhooks.Webhook(SECRET)

    def of(self, source):
        """Return the envelopes of a source's events, in order of arrival."""
        return [envelope for _, envelope in self.arrived if envelope["type"].startswith(f"{source}.")]


def configured(name):
    """Render the table of a source with a preset, as `relay sources add` writes it."""
    preset = PRESETS[name]
    verify = preset["verify"]
    key = "public_keys" if {"ed25519", "ecdsa"} & set(verify) else "secrets"
    lines = [f"[sources.{name}]", f'plugin = "{name}"', f'{key} = ["{secret_of(name)}"]']
    if "{url}" in str(verify):
        lines.append(f'public_url = "{PUBLIC}"')
    if any("token" in each for each in preset.get("handshakes", ())):
        lines.append(f'verify_tokens = ["{VERIFY_TOKEN}"]')
    return "\n".join(lines) + "\n"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def receiver():
    async with Verifying() as receiver:
        yield receiver


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def relay(tmp_path_factory, receiver):
    folder = tmp_path_factory.mktemp("relay")
    config = write_config(folder, *map(configured, PRESETS), destination("all", receiver.url))
    async with running(config) as relay:
        yield relay


SAMPLES = [(name, sample["name"]) for name, preset in PRESETS.items() for sample in preset["samples"]]


def sample_of(name, which):
    [sample] = [sample for sample in PRESETS[name]["samples"] if sample["name"] == which]
    return sample


def target_of(name, query=""):
    return PRESETS[name]["preset"]["default_path"] + unsigned_query(name) + query


async def post(relay, name, body, headers, *, at=None, method="POST", target=None, signs=None):
    """Send a request with the vendor's signature, which is of the body unless `signs` is another one."""
    target = target or target_of(name)
    at = int(time.time()) if at is None else at
    headers = signed(name, Sent(method, target, headers, body if signs is None else signs, at))
    return await relay.exchange(raw_request(method, target, body, headers), bodiless=method == "HEAD")


def rejected(relay, name, reason="auth"):
    return relay.counted("relay_events_rejected_total", source=name, reason=reason)


def duplicates(relay, name):
    return relay.counted("relay_events_duplicate_total", source=name)


def test_every_preset_has_its_expected_events():
    assert [(name, which) for name, samples in EVENTS.items() for which in samples] == SAMPLES


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(("name", "which"), SAMPLES)
async def test_a_sample_becomes_events_that_a_receiver_verifies(relay, receiver, name, which):
    sample = sample_of(name, which)
    body, headers, expected = sample["body"].encode(), sample["headers"], EVENTS[name][which]
    before = len(receiver.of(name))
    answer = await post(relay, name, body, headers)
    status, content_type, reply = REPLIES.get(name, DEFAULT_REPLY)
    assert (answer.status, answer.headers.get("content-type", "").partition(";")[0] or None) == (
        status,
        content_type,
    )
    assert answer.body.startswith(reply) if name not in REPLIES else answer.body == reply
    await until(lambda: len(receiver.of(name)) == before + len(expected))
    arrived = receiver.of(name)[before:]
    found = sorted((each["type"].removeprefix(f"{name}."), each["subject"]) for each in arrived)
    assert found == sorted(expected)

    # The vendor sends it again, at another time.
    counted = duplicates(relay, name)
    again = body.replace(*RETRIES[name]) if name in RETRIES else body
    answer = await post(relay, name, again, headers, at=int(time.time()) - 1)
    assert answer.status == status
    if PRESETS[name].get("key") and (name, which) not in WITHOUT_KEY:
        assert duplicates(relay, name) == counted + len(expected)
        assert len(receiver.of(name)) == before + len(expected)
    else:
        await until(lambda: len(receiver.of(name)) == before + 2 * len(expected))
        assert duplicates(relay, name) == counted


SIGNABLE = [(name, which) for name, which in SAMPLES if not name.startswith(("discord", "sendgrid"))]


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(("name", "which"), SIGNABLE)
async def test_relay_send_signs_a_sample_and_makes_it_new_each_time(relay, receiver, name, which):
    source = relay.app.config.sources[name]
    sample = send.samples_of(source)[which]
    expected, before = EVENTS[name][which], len(receiver.of(name))
    for sent in (1, 2):
        request = msgspec.structs.replace(
            sample, target=source.prefix + sample.path, received_at=time.time_ns() // 1000
        )
        request = source.settings.sign(request)
        raw = raw_request(request.method, request.target, request.body, dict(request.headers))
        answer = await relay.exchange(raw)
        assert answer.status < 300, answer
        count = before + sent * len(expected)
        await until(lambda count=count: len(receiver.of(name)) == count)
    found = sorted(each["type"].removeprefix(f"{name}.") for each in receiver.of(name)[before:])
    assert found == sorted(2 * [type_ for type_, _ in expected])


VALUES = [
    None,
    [],
    {},
    "",
    0,
    -1,
    True,
    "x" * 300,
    "\ud83d",
    ["a"],
    {"a": 1},
    "{body:type}",
    "\n",
    10**30,
    "é",
]


def changed(value, chance):
    """Return a JSON value with one part of it removed or replaced."""
    if isinstance(value, dict) and value and chance.random() < 0.85:
        key, copy = chance.choice(list(value)), dict(value)
        if chance.random() < 0.2:
            del copy[key]
        else:
            copy[key] = changed(value[key], chance)
        return copy
    if isinstance(value, list) and value and chance.random() < 0.7:
        at = chance.randrange(len(value))
        return [changed(item, chance) if number == at else item for number, item in enumerate(value)]
    return chance.choice(VALUES)


def other_sample(sample, chance):
    """Return a sample with another body and other headers, of which some are malformed."""
    body, headers = sample.body, dict(sample.headers)
    if body[:1] in b"{[":
        body = json.dumps(changed(json.loads(body), chance)).encode()
    else:
        fields = dict(parse_qsl(body.decode(), keep_blank_values=True))
        fields[chance.choice(list(fields))] = chance.choice(["", "{", "[]", "x" * 300, "null"])
        body = urlencode(fields).encode()
    if chance.random() < 0.15:
        body = body[: chance.randrange(len(body) + 1)]
    if chance.random() < 0.3:
        headers[chance.choice(list(headers))] = chance.choice(["", "x" * 300, "\udcff", "a/b;c"])
    sent = Incoming.of(sample.method, sample.path, headers, body, **dict(sample.params))
    return msgspec.structs.replace(sent, target=sample.path, received_at=time.time_ns() // 1000)


@pytest.mark.parametrize("name", PRESETS)
def test_a_genuine_sender_of_odd_requests_gets_no_server_error(relay, name):
    """The preset accepts or refuses each request; it raises no other exception."""
    source, chance, accepted = relay.app.config.sources[name], random.Random(name), 0
    [mount] = mounts_of({name: source})
    can_sign, refused = name in {each for each, _ in SIGNABLE}, []
    for sample in source.settings.samples():
        for _ in range(60):
            try:
                request = source.settings.sign(other_sample(sample, chance))
                if source.settings.handshake(request) is None:
                    if can_sign:
                        source.settings.verify(request)
                    answer = source.settings.receive(request)
                    if not isinstance(answer, Reply):
                        events = answer.events or [answer.event]
                        is_item = bool(answer.events)
                        _ = [
                            make_event(mount, event, request, 0, is_item=is_item) for event in events if event
                        ]
            except Refusal as refusal:
                refused.append((refusal.status, refusal.__cause__, request.body))
            else:
                accepted += 1
    assert accepted
    assert [each for each in refused if each[0] >= 500] == []


@pytest.mark.asyncio(loop_scope="module")
async def test_relay_send_works_on_the_command_line(relay, receiver):
    config, to = relay.app.config.path, relay.addresses.public
    before = len(receiver.of("stripe"))
    result = await asyncio.to_thread(run, "send", "stripe", "invoice.paid", "-c", config, "--to", to)
    assert result.out.startswith("200\t")
    await until(lambda: len(receiver.of("stripe")) == before + 1)
    result = await asyncio.to_thread(run, "send", "sendgrid", "-c", config, "--to", to, code=1)
    assert "only the sender of sendgrid can sign requests" in result.err


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("name", PRESETS)
async def test_a_tampered_or_unsigned_request_is_refused(relay, receiver, name):
    sample = PRESETS[name]["samples"][0]
    body, headers, target = sample["body"].encode(), sample["headers"], target_of(name)
    before, refused = len(receiver.of(name)), rejected(relay, name)
    good = signed(name, Sent("POST", target, headers, body, int(time.time())))
    credentials = set(good) - set(headers)
    if credentials:
        wrong = {each: value[:-3] + ("aaa" if value[-3:] != "aaa" else "bbb") for each, value in good.items()}
        tried = [
            (target, body, {**headers, **{each: wrong[each] for each in credentials}}),
            (target, body, headers),
        ]
        if not credentials & {"Authorization", "X-Gitlab-Token", "X-Telegram-Bot-Api-Secret-Token"}:
            form = headers["Content-Type"].startswith("application/x-www")
            tried.append((target, body + (b"&more=1" if form else b" "), good))
    else:
        tried = [(target.partition("?")[0], body, headers), (target + "x", body, headers)]
    for place, content, fields in tried:
        answer = await relay.exchange(raw_request("POST", place, content, fields))
        assert answer.status == 401, (place, fields, answer)
    assert rejected(relay, name) == refused + len(tried)
    assert len(receiver.of(name)) == before


def tolerance_of(name):
    verify = PRESETS[name]["verify"]
    if verify == "standard-webhooks":
        return "5m"
    scheme = next(iter(verify.values())) if isinstance(verify, dict) else {}
    return scheme.get("tolerance", "5m" if "timestamp_header" in scheme else None)


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("name", [name for name in PRESETS if tolerance_of(name)])
async def test_an_old_request_is_refused(relay, name):
    sample, refused = PRESETS[name]["samples"][0], rejected(relay, name)
    now, age = int(time.time()), int(parse_duration(tolerance_of(name)))
    for at in (now - age - 60, now + age + 60):
        answer = await post(relay, name, sample["body"].encode(), sample["headers"], at=at)
        assert answer.status == 401, answer
    assert rejected(relay, name) == refused + 2


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("case", CHALLENGES, ids=str)
async def test_a_challenge_is_answered_without_an_event(relay, receiver, case):
    name, target = case.preset, target_of(case.preset, case.query)
    before, is_bodiless = len(receiver.of(name)), case.method == "HEAD"
    if case.is_signed:
        answer = await post(relay, name, case.body, case.headers, method=case.method, target=target)
    else:
        raw = raw_request(case.method, target, case.body, case.headers)
        answer = await relay.exchange(raw, bodiless=is_bodiless)
    assert (answer.status, answer.body) == (case.status, case.reply)
    if case.content_type is not None:
        assert answer.headers["content-type"].partition(";")[0] == case.content_type
    if case.is_signed:
        token = unsigned_query(name)
        place = target.replace(token, "?token=wrong") if token else target
        answer = await relay.exchange(raw_request(case.method, place, case.body, case.headers))
        assert answer.status == 401
        assert case.reply not in answer.body or not case.reply
    assert len(receiver.of(name)) == before


@pytest.mark.asyncio(loop_scope="module")
async def test_twilio_signs_a_json_body_by_its_digest_in_the_url(relay, receiver):
    body, before = b'{"SmsStatus":"read","MessageSid":"SM7"}', len(receiver.of("twilio"))
    # The signature covers the URL alone, so without the digest anybody could change the body.
    assert (await post(relay, "twilio", body, JSON, signs=b"")).status == 401
    wrong = target_of("twilio", f"?bodySHA256={sha256(b'{}')}")
    assert (await post(relay, "twilio", body, JSON, target=wrong, signs=b"")).status == 401
    right = target_of("twilio", f"?bodySHA256={sha256(body)}")
    assert (await post(relay, "twilio", body, JSON, target=right, signs=b"")).status == 200
    await until(lambda: len(receiver.of("twilio")) == before + 1)
    assert receiver.of("twilio")[-1]["type"] == "twilio.message.read"


@pytest.mark.asyncio(loop_scope="module")
async def test_a_wrong_verify_token_gets_no_challenge(relay):
    wrong = target_of("meta", META.replace(VERIFY_TOKEN, "guessed"))
    answer = await relay.exchange(raw_request("GET", wrong, b"", {}))
    assert answer.status in (401, 403)
    assert b"1158201444" not in answer.body


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: f"{vector['preset']} {vector['source']}")
def test_a_published_signature_verifies(vector, tmp_path):
    path, _, query = vector.get("target", "/hook").partition("?")
    key = "public_keys" if "public_key" in vector else "secrets"
    lines = [
        "development = true",
        "[sources.x]",
        f'plugin = "{vector["preset"]}"',
        f'path = "{path}"',
        f"{key} = [{json.dumps(vector.get('secret') or vector['public_key'])}]",
    ]
    if "public_url" in vector:
        lines.append(f'public_url = "{vector["public_url"]}"')
    (tmp_path / "config.toml").write_text("\n".join(lines))
    source = load(tmp_path / "config.toml").config.sources["x"].settings
    incoming = Incoming.of("POST", path, vector["headers"], vector["body"].encode())
    at = vector.get("at", time.time()) * SECOND
    incoming = msgspec.structs.replace(incoming, query=query, received_at=at)
    source.verify(incoming)
    with pytest.raises(Unauthenticated):
        source.verify(msgspec.structs.replace(incoming, body=incoming.body + b" "))


def test_a_key_that_decides_alone_is_covered_by_the_signature():
    """Otherwise, a request replayed under another key could suppress the event with that key."""
    for name, preset in PRESETS.items():
        if preset.get("key_conflict") == "duplicate":
            assert "{header:" not in preset["key"], name
            assert set(preset["verify"]) <= {"hmac", "ed25519", "ecdsa", "basic"}, name
            assert "{body}" in next(iter(preset["verify"].values())).get("signed", "{body}"), name


def test_every_published_vector_belongs_to_a_preset():
    assert {vector["preset"] for vector in VECTORS} <= set(PRESETS)
