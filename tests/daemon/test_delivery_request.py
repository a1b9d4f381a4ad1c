"""`relay deliveries request`: the request that the next attempt would send, with secrets masked."""

import base64
import shlex
from types import SimpleNamespace

import pytest
from daemons import SOURCES, Recorder, adorn, destination, running, write_config
from support import until
from wire import request

ADORN = "/v1/events"
HEADERS = 'headers = { authorization = "Bearer hidden" }'
HIDDEN = """
[destinations.hidden]
url = { env = "HIDDEN_URL", development = "http://127.0.0.1:9/hook/abcdef0123456789" }
events = ["*"]
allow_private = true
format = "raw"
method = "PUT"
paused = true
"""


class Keeper(Recorder):
    """A receiver that keeps each request."""

    def __init__(self):
        super().__init__()
        self.requests = []

    async def _handle(self, request):
        self.requests.append((dict(request.headers), await request.read()))
        return await super()._handle(request)


@pytest.fixture
async def recorder():
    async with Keeper() as keeper:
        yield keeper


@pytest.fixture
async def relay(tmp_path, recorder):
    path = write_config(tmp_path, SOURCES, destination("crm", recorder.url, HEADERS), HIDDEN)
    async with running(path) as relay:
        yield relay


async def deliveries(relay, commands, body):
    """Send an event; return the ids of its deliveries by destination."""
    answer = await relay.exchange(request("POST", ADORN, body))
    assert answer.status == 200, answer
    shown = (await commands("events", "show", answer.json["event_id"], "--json")).json
    return {each["destination"]: each["id"] for each in shown["owed"]}


async def test_the_request_is_shown_as_sent_with_secrets_masked(relay, commands, recorder):
    ids = await deliveries(relay, commands, adorn("café"))
    await until(lambda: recorder.requests)
    [(headers, body)] = recorder.requests
    shown = (await commands("deliveries", "request", ids["crm"], "--json")).json
    assert shown["body"].encode() == body
    assert (shown["method"], shown["url"], shown["body_base64"]) == ("POST", recorder.url, None)
    sent = {name.lower(): value for name, value in headers.items()}
    assert shown["headers"].keys() <= sent.keys()
    assert shown["headers"]["authorization"] == "<secret>"
    assert shown["headers"]["webhook-signature"] == "<signature>"
    for name in ("content-type", "webhook-id"):
        assert shown["headers"][name] == sent[name]


async def test_people_see_a_request_without_secrets(relay, commands):
    ids = await deliveries(relay, commands, adorn("a\x1b[31m"))
    text = (await commands("deliveries", "request", ids["hidden"])).out
    assert text.startswith("PUT http://127.0.0.1:9\n")
    assert "abcdef0123456789" not in text
    assert "\x1b" not in text
    assert "session.started" in text


async def test_a_curl_command_has_every_part(relay, commands, recorder):
    ids = await deliveries(relay, commands, adorn("it's"))
    text = (await commands("deliveries", "request", ids["crm"], "--curl")).out
    words = shlex.split(text)
    assert words[:4] == ["curl", "-X", "POST", recorder.url]
    shown = (await commands("deliveries", "request", ids["crm"], "--json")).json
    assert words[-2:] == ["--data-raw", shown["body"]]
    headers = [words[at + 1] for at, word in enumerate(words) if word == "-H"]
    given = dict(header.split(": ", 1) for header in headers)
    assert given.keys() == shown["headers"].keys()
    assert given["authorization"] == "<secret>"
    lane, body = relay.app.dispatcher.lanes["hidden"], b"\x1b[2J\r\n"
    lane._runner._format = SimpleNamespace(name="text", content_type="text/plain", render=lambda _event: body)
    text = (await commands("deliveries", "request", ids["hidden"], "--curl")).out
    assert text.startswith(f"echo {base64.b64encode(body).decode()} | base64 -d | curl -X PUT ")
    assert text.endswith("--data-binary @-\n")


async def test_a_body_that_is_not_text_is_base64(relay, commands):
    ids = await deliveries(relay, commands, adorn("x"))
    lane = relay.app.dispatcher.lanes["hidden"]
    content = b"\xff\x00"

    class Binary:
        name, content_type = "binary", "application/octet-stream"

        def render(self, _event):
            return content

    lane._runner._format = Binary()
    shown = (await commands("deliveries", "request", ids["hidden"], "--json")).json
    assert (shown["body"], base64.b64decode(shown["body_base64"])) == (None, content)
    assert "2 bytes that are not text" in (await commands("deliveries", "request", ids["hidden"])).out
    curl = (await commands("deliveries", "request", ids["hidden"], "--curl")).out
    assert curl.startswith(f"echo {shown['body_base64']} | base64 -d | curl -X PUT ")
    assert curl.endswith("--data-binary @-\n")


async def test_a_format_that_fails_is_reported(relay, commands):
    ids = await deliveries(relay, commands, adorn("x"))
    lane = relay.app.dispatcher.lanes["hidden"]

    class Broken:
        name, content_type = "broken", "text/plain"

        def render(self, _event):
            raise KeyError("total")

    lane._runner._format = Broken()
    failed = await commands("deliveries", "request", ids["hidden"], code=1)
    assert "the format broken failed: KeyError: 'total'" in failed.err


async def test_unknown_deliveries_and_removed_destinations_are_named(relay, commands):
    assert "unknown delivery" in (await commands("deliveries", "request", "dlv_0000", code=4)).err
    ids = await deliveries(relay, commands, adorn("x"))
    del relay.app.dispatcher.lanes["hidden"]
    missing = await commands("deliveries", "request", ids["hidden"], code=4)
    assert 'the destination "hidden" is not in config.toml' in missing.err
