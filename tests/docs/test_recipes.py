"""The recipes of docs/recipes.md, run with their own tables against a receiver on this machine."""

import hmac
import json
import re
import time
import tomllib
from pathlib import Path

import pytest
import standardwebhooks
from aiohttp import web
from daemons import running, write_config
from support import until
from vendors import Sent, presets, signed
from wire import raw_request

PAGE = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text()
RECIPES = {
    part.partition("\n")[0]: re.findall(r"```toml\n(.*?)```", part, re.DOTALL)[0]
    for part in PAGE.split("\n## ")[1:]
}
PRESETS = presets()


class Receiver:
    """A receiver that records requests and answers with the statuses that the test sets."""

    def __init__(self):
        self.requests = []  # (path, headers, body)
        self.statuses = {}  # by path: the next ones, then 200

    async def __aenter__(self):
        self._runner = web.ServerRunner(web.Server(self._handle))
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        host, port = self._runner.addresses[0]
        self.url = f"http://{host}:{port}"
        return self

    async def __aexit__(self, *_):
        await self._runner.cleanup()

    def of(self, path):
        return [(headers, body) for place, headers, body in self.requests if place == path]

    async def _handle(self, request):
        self.requests.append((request.path, request.headers, await request.read()))
        statuses = self.statuses.get(request.path)
        return web.Response(status=statuses.pop(0) if statuses else 200)


@pytest.fixture
async def receiver():
    async with Receiver() as receiver:
        yield receiver


def configured(tmp_path, receiver, monkeypatch, title, **environment):
    """Write the configuration of a recipe; its destinations are the receiver."""
    table = RECIPES[title]
    for name in re.findall(r'env = "(\w+)"', table):
        monkeypatch.setenv(name, environment.get(name, f"value-of-{name}"))
    table = re.sub(r'url = "https://[^/"]+(/[^"]*)"', rf'url = "{receiver.url}\1"', table)
    table = re.sub(
        r"(\[destinations\.\w+\]\n)", r'\1allow_private = true\nretry = { schedule = ["0.1s"] }\n', table
    )
    return write_config(tmp_path, table.replace('group_wait = "10s"', 'group_wait = "1s"'))


async def send(relay, preset, body, headers, secret):
    """Post a request with the signature of the preset's vendor."""
    target = PRESETS[preset]["preset"]["default_path"]
    sent = Sent("POST", target, headers, body, int(time.time()))
    answer = await relay.exchange(raw_request("POST", target, body, signed(preset, sent, secret)))
    assert answer.status == 200, answer


def test_every_recipe_is_tested():
    assert list(RECIPES) == [
        "GitHub to Slack",
        "Stripe to two services in order",
        "Alertmanager to Discord, grouped",
        "Any JSON to your API",
    ]
    for recipe in RECIPES.values():
        tomllib.loads(recipe)


async def test_github_to_slack(tmp_path, receiver, monkeypatch):
    url = f"{receiver.url}/services/T000/B000/XXXX"
    config = configured(tmp_path, receiver, monkeypatch, "GitHub to Slack", SLACK_WEBHOOK_URL=url)
    async with running(config) as relay:
        for sample in PRESETS["github"]["samples"]:
            await send(
                relay, "github", sample["body"].encode(), sample["headers"], "value-of-GITHUB_WEBHOOK_SECRET"
            )
        await until(lambda: len(receiver.requests) == 2)  # the ping is not selected
    bodies = [json.loads(body) for _, body in receiver.of("/services/T000/B000/XXXX")]
    texts = sorted(json.dumps(body, ensure_ascii=False) for body in bodies)
    assert "octocat/Hello-World: github.issues.opened" in texts[0] + texts[1]
    assert "Found a bug" in texts[0] + texts[1]
    assert "refs/heads/main" in texts[0] + texts[1]


async def test_stripe_to_two_services_in_order(tmp_path, receiver, monkeypatch):
    secret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
    config = configured(
        tmp_path,
        receiver,
        monkeypatch,
        "Stripe to two services in order",
        SHOP_SIGNING_SECRET=secret,
        ACCOUNTING_SIGNING_SECRET=secret,
        ONCALL_SLACK_URL=f"{receiver.url}/oncall",
    )
    receiver.statuses["/hooks/payments"] = [503]
    types = ["payment_intent.created", "payment_intent.processing", "payment_intent.succeeded"]
    async with running(config) as relay:
        for at, type_ in enumerate([*types, "invoice.paid"]):
            object_ = "in_1" if type_ == "invoice.paid" else "pi_1"
            body = {"id": f"evt_{at}", "type": type_, "created": 1, "data": {"object": {"id": object_}}}
            for _ in range(2):  # Stripe repeats each event
                await send(relay, "stripe", json.dumps(body).encode(), {}, "value-of-STRIPE_WEBHOOK_SECRET")
        await until(lambda: len(receiver.of("/hooks/payments")) == 4)
        await until(lambda: len(receiver.of("/hooks/stripe")) == 2)
    shop = [
        standardwebhooks.Webhook(secret).verify(body, headers)["type"]
        for headers, body in receiver.of("/hooks/payments")
    ]
    assert shop == [f"stripe.{type_}" for type_ in (types[0], *types)]  # the first one failed once
    accounting = {json.loads(body)["type"] for _, body in receiver.of("/hooks/stripe")}
    assert accounting == {"stripe.payment_intent.succeeded", "stripe.invoice.paid"}
    assert receiver.of("/oncall") == []


async def test_alertmanager_to_discord_grouped(tmp_path, receiver, monkeypatch):
    config = configured(
        tmp_path,
        receiver,
        monkeypatch,
        "Alertmanager to Discord, grouped",
        DISCORD_WEBHOOK_URL=f"{receiver.url}/api/webhooks/1/token",
    )
    alerts = [
        {
            "status": "firing",
            "labels": {"alertname": "HighLatency", "instance": f"api-{at}", "severity": "page"},
            "annotations": {"summary": f"Requests take {at} s"},
            "startsAt": "2025-03-14T09:26:53.589Z",
            "generatorURL": "https://prometheus.example/graph",
        }
        for at in range(30)
    ]
    alerts.append({**alerts[0], "labels": {"alertname": "Unimportant", "severity": "info"}})
    body = json.dumps({"receiver": "relay", "status": "firing", "alerts": alerts}).encode()
    async with running(config) as relay:
        headers = {"Content-Type": "application/json"}
        await send(relay, "alertmanager", body, headers, "value-of-ALERTMANAGER_TOKEN")
        await until(lambda: receiver.requests)
        assert len(await relay.rows()) == 31
    [(_, message)] = receiver.of("/api/webhooks/1/token")
    assert "HighLatency" in message.decode()
    assert "30" in message.decode()
    assert "Unimportant" not in message.decode()


async def test_any_json_to_your_api(tmp_path, receiver, monkeypatch):
    config = configured(
        tmp_path, receiver, monkeypatch, "Any JSON to your API", API_AUTHORIZATION="Bearer token-of-the-api"
    )
    body = b'{"delivery_id":"d1","order":{"id":"A-17","total":45000.00,"customer":{"name":"Ada \\"L\\""}}}'
    signature = hmac.new(b"value-of-SHOP_SECRET", body, "sha256").hexdigest()
    headers = {
        "Content-Type": "application/json",
        "X-Shop-Topic": "order.created",
        "X-Shop-Signature": f"sha256={signature}",
    }
    async with running(config) as relay:
        for _ in range(2):
            answer = await relay.exchange(raw_request("POST", "/hooks/shop/berlin", body, headers))
            assert answer.status == 200, answer
        await until(lambda: receiver.requests)
        [event] = await relay.rows()
        assert (event["type"], event["subject"]) == ("shop.order.created", "A-17")
    [(sent, received)] = receiver.of("/v2/orders")
    assert sent["Authorization"] == "Bearer token-of-the-api"
    assert json.loads(received) == {
        "reference": "A-17",
        "store": "berlin",
        "amount": 45000.0,
        "note": 'Order A-17 of Ada "L"',
    }
    assert b"45000.00" in received
