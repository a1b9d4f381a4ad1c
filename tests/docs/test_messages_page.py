"""docs/messages.md: its configurations load and send the messages on the page."""

import asyncio
import json
import re
import tomllib
from datetime import UTC, datetime
from pathlib import Path

import pytest
from commands import run
from daemons import SOURCES, running, write_config
from receivers import answers
from wire import request

from relay.base.template import FILTERS
from relay.config.message import MessageConfig
from relay.config.secrets import Secret
from relay.formats.message import MessageWriter
from relay.formats.services import SERVICES, _lines
from relay.formats.template import MOST_BYTES, compile_body
from relay.model import StoredEvent

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "messages.md").read_text()
TOML = re.findall(r"^```toml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
NAMES = re.findall(r'env = "(\w+)"', "".join(TOML))


def event(data, **changes):
    fields = {
        "id": 1,
        "public_id": "evt_018bcfe5-6800-7000-8000-000000000003",
        "source": "shop",
        "type": "shop.order.paid",
        "subject": None,
        "received_at": 1_700_000_000_123_456,
        "data": data,
        "context": b"{}",
        "body": b"",
        "content_type": "",
        "sha256": b"",
    }
    return StoredEvent(**fields | changes)


@pytest.mark.parametrize("number", range(len(TOML)))
def test_each_configuration_on_the_page_is_valid(number, tmp_path, monkeypatch):
    for name in NAMES:
        monkeypatch.setenv(name, "https://hooks.example/x" if name.endswith("URL") else "0" * 32)
    path = tmp_path / "config.toml"
    path.write_text(TOML[number])
    run("check-config", "-c", path)


def test_the_table_has_every_message_format_with_its_required_keys():
    table = PAGE.partition("| `format` |")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| `([a-z]+)` \| .*? \| (.*?) ?\|$", table, re.MULTILINE)
    assert {name: needs.strip("` ") for name, needs in rows} == {
        each.name: " ".join(each.required) for each in SERVICES
    }


def test_the_message_on_the_page_is_that_of_a_dead_delivery():
    shown, grouped = re.findall(r"^```\n(🔴.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    data = {
        "delivery": "dlv_018bcfe5-6800-7000-8000-000000000002",
        "event": "evt_018bcfe5-6800-7000-8000-000000000001",
        "type": "shop.order",
        "destination": "crm",
        "reason": "exhausted",
        "attempts": 11,
        "last_status": 500,
        "last_error": "HTTP 500 Internal Server Error",
    }
    given = event(json.dumps(data).encode(), source="relay", type="relay.delivery.dead")
    writer = MessageWriter(MessageConfig())
    assert "\n".join(_lines(writer.write(given))) + "\n" == shown
    begin, end = (
        int(datetime.fromisoformat(found).replace(tzinfo=UTC).timestamp()) * 1_000_000
        for found in re.findall(r"(2026-\S+ \S+) UTC", grouped)
    )
    errors = ["HTTP 503 Service Unavailable"] * 95 + ["no response within 15s"] * 2
    events = [
        event(
            json.dumps(data | {"last_error": error}).encode(),
            source="relay",
            type="relay.delivery.dead",
            received_at=end if number else begin,
        )
        for number, error in enumerate(errors)
    ]
    assert "\n".join(_lines(writer.write_group(events))) + "\n" == grouped


def test_the_chosen_message_of_the_page_has_its_title_fields_and_link():
    [table] = [tomllib.loads(each) for each in TOML if "destinations.sales.message" in each]
    data = b'{"order": {"id": "A-7", "total": 45000.00, "count": 2, "paid": true},'
    data += b'"customer": {"country": "de"}}'
    message = MessageWriter(MessageConfig(**table["destinations"]["sales"]["message"])).write(event(data))
    assert message.title == "Order A-7 over 45000.00 EUR"
    assert message.text == "A guest bought 2 items."
    assert message.fields == (("Country", "DE"), ("Paid", "true"))
    assert message.link == "https://shop.example/admin/orders/A-7"


async def test_the_apis_get_the_bodies_on_the_page(tmp_path):
    [given] = re.findall(r"^For `(\{.*?\})`, the API gets:$", PAGE, re.MULTILINE)
    [expected] = re.findall(r"^```json\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    [table] = [each for each in TOML if "[destinations.api.template]" in each]
    template = tomllib.loads(table)["destinations"]["api"]["template"]
    at = event(given.encode(), source="shop")
    assert compile_body(template, None).render(at) == expected.rstrip("\n").encode()
    async with answers() as api:
        config = table.replace("https://api.example.com/v2/orders", api.url)
        config = config.replace('["shop.order"]', '["compozy.*"]\nallow_private = true')
        path = write_config(tmp_path, SOURCES, config)
        async with running(path) as relay:
            body = json.dumps({"name": "order", "payload": json.loads(given)}).encode()
            headers = {"authorization": "Bearer test-token"}
            await relay.exchange(request("POST", "/api/v1/events", body, **headers))
            async with asyncio.timeout(30):
                await api.until(1)
    [arrived] = api.requests
    assert arrived.headers["content-type"] == "application/json"
    sent = json.loads(arrived.body)
    assert (sent["reference"], sent["total"], sent["test"]) == ("A-7", 45000.0, False)
    assert sent["note"].startswith("from compozy at ")


def test_the_filters_and_the_limit_on_the_page_are_true():
    section = PAGE.partition("| filter | effect |")[2].partition("\n\n")[0]
    named = {
        name for row in section.splitlines() for name in re.findall(r"`([a-z]+)", row.partition(" | ")[0])
    }
    assert named == FILTERS
    assert f"more than {MOST_BYTES // 2**20} MiB" in PAGE


async def test_a_message_with_its_secret_reaches_the_service(tmp_path, monkeypatch):
    monkeypatch.setenv("BOT_URL", "")
    async with answers() as service:
        monkeypatch.setenv("BOT_URL", service.url)
        config = (
            '[destinations.bot]\nurl = { env = "BOT_URL" }\nformat = "telegram"\nevents = ["adorn.*"]\n'
            'allow_private = true\nmessage = { chat_id = "-100", title = "Session {subject}" }\n'
        )
        async with running(write_config(tmp_path, SOURCES, config)) as relay:
            await relay.exchange(request("POST", "/v1/events", b'{"event_type":"a.b","session_id":"s-1"}'))
            async with asyncio.timeout(30):
                await service.until(1)
    body = json.loads(service.requests[0].body)
    assert body["chat_id"] == Secret("-100").reveal()
    assert body["text"].startswith("<b>Session s-1</b>")
