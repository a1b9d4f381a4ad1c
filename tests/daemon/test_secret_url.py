"""A destination's URL that is a secret: nothing that the relay prints or stores has more than its host."""

import asyncio
import json
import re
from html import escape
from urllib.parse import unquote

import pytest
from aiohttp import web
from commands import run
from daemons import SOURCES, Daemon, Recorder, adorn, write_config
from support import until
from wire import Wire, exchange, request

from relay.config.secrets import Url

WORDS = ("T0XSECRETPATH", "a%20b%26cdef", "QUERYSECRET")
PATH = f"/services/{WORDS[0]}/{WORDS[1]}?token={WORDS[2]}"
CONFIG = """\
[destinations.chat]
url = {{ env = "CHAT_URL" }}
events = ["adorn.*"]
allow_private = true
secrets = ["whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"]
retry = {{ schedule = ["0.1s"] }}
circuit = {{ failures = 1, probe = "0.1s" }}
[destinations.own]
url = "{own}"
events = ["relay.*"]
allow_private = true
"""


class Talkative(Recorder):
    """Repeats the URL of each request in its answer, in every form, and redirects to the same path."""

    async def _handle(self, request):
        await super()._handle(request)
        path = request.raw_path
        forms = (path, unquote(path), escape(unquote(path)), path.replace("/", r"\/"))
        text = f"Cannot POST {' or '.join(forms)}"
        location = {"Location": f"https://elsewhere.example{path}"}
        return web.Response(status=503 if len(self.arrived) == 1 else 302, text=text, headers=location)


@pytest.fixture
async def chat(monkeypatch):
    async with Talkative() as there:
        monkeypatch.setenv("CHAT_URL", there.url.replace("/hook", PATH))
        yield there


async def every_answer(socket):
    """Return the answers of all GET requests without arguments, and of those about the destination."""
    document = (await exchange(socket, request("GET", "/api/openapi.json"))).json
    paths = [path for path, item in document["paths"].items() if "get" in item and "{" not in path]
    found = {}
    for path in (*paths, "/api/destinations/chat"):
        item = document["paths"].get(path, {}).get("get", {})
        if "text/event-stream" not in json.dumps(item) and path not in ("/api/top", "/api/events/export"):
            found[path] = (await exchange(socket, request("GET", path))).body.decode()
    return found


async def test_a_secret_url_is_printed_and_stored_as_its_host_only(tmp_path, chat, recorder):
    config = write_config(tmp_path, SOURCES, CONFIG.format(own=recorder.url))
    config.write_text(config.read_text().replace("[log]", '[log]\nlevel = "debug"'))
    host = chat.url.removesuffix("/hook")
    async with Daemon(config) as daemon:
        socket = tmp_path / "state" / "relay.sock"
        async with await Wire.open(socket) as tail:
            await tail.send(request("GET", "/api/tail"))
            await exchange(daemon.url, request("POST", "/v1/events", adorn()))
            await until(lambda: len(recorder.arrived) >= 2)  # its circuit opened, a delivery is dead
            tested = (await exchange(socket, request("POST", "/api/destinations/chat/test"))).body.decode()
            printed = await every_answer(socket)
            printed["tail"] = (await tail.reader.read(2**20)).decode("latin-1")
        commands = (
            ("config", "show", "--origins"),
            ("config", "show", "--json"),
            ("check-config",),
            ("check-config", "--json"),
        )
        for words in commands:
            result = await asyncio.to_thread(run, *words, "-c", config)
            printed[" ".join(words)] = result.out + result.err
        assert await daemon.stop() == 0
    printed |= {"test": tested, "log": daemon.output, "operator events": json.dumps(recorder.arrived)}
    for file in (tmp_path / "state").rglob("*"):
        if file.is_file():
            printed[str(file)] = file.read_bytes().decode("latin-1")
    assert "event: attempt" in printed["tail"]
    for place, text in printed.items():
        for word in (*WORDS, *map(unquote, WORDS), *map(escape, map(unquote, WORDS))):
            assert word not in text, (place, word)
    assert chat.arrived, "the relay sends to the whole URL"
    assert re.search(r"(?m)^url = .*  # config.toml:[0-9]+", printed["config show --origins"])
    assert "  # default" in printed["config show --origins"]
    shown = json.loads(printed["config show --json"])["destinations"]["chat"]["url"]
    assert shown == host
    [opened] = [each for _, each in recorder.arrived if each["type"] == "relay.destination.circuit_opened"]
    assert opened["data"]["url"] == host
    assert "HTTP 302 Found to https://elsewhere.example<secret>" in printed["/api/attempts"]
    assert "Cannot POST <secret> or <secret> or <secret> or" in printed["/api/attempts"]
    assert "Cannot POST <secret>" in tested


def test_a_url_that_is_text_prints_whole():
    assert str(Url("https://hooks.example/a/b?c=d")) == "https://hooks.example/a/b?c=d"
    assert Url("https://hooks.example/a/bcdefgh").hide(b"at /a/bcdefgh") == b"at /a/bcdefgh"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://hooks.slack.com/services/T0/B0/xyz", "https://hooks.slack.com"),
        ("http://[::1]:8080/a?b=c", "http://[::1]:8080"),
        ("https://Example.com", "https://Example.com"),
        ("hunter2", "<secret>"),
        ("https://[broken/hunter2", "<secret>"),
    ],
)
def test_a_secret_url_prints_scheme_and_host(url, shown):
    assert str(Url(url, is_hidden=True)) == repr(Url(url, is_hidden=True)) == shown


def test_a_response_that_ends_within_the_secret_shows_no_part_of_it():
    url = Url("https://api.example/bot12345:abcdefgh/sendMessage", is_hidden=True)
    assert url.hide(b"no such path /bot12345:abc") == b"no such path <secret>"
    assert url.hide(b"no such token bot12345") == b"no such token <secret>"
    assert url.hide(b"no such host") == b"no such host"


def test_a_url_that_becomes_a_secret_is_a_change():
    assert Url("https://a.example/x") != Url("https://a.example/x", is_hidden=True)
    assert Url("https://a.example/x") == Url("https://a.example/x")


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("ftp://hunter2.example/hunter2", "expected a URL that starts with http:// or https://"),
        ("https://hunter2:hunter2@a.example/", "a URL must not contain a user name or a password"),
        ("https://a.example/ hunter2", "the URL contains spaces"),
        ("hunter2", "expected a URL"),
    ],
)
def test_a_wrong_secret_url_is_a_problem_that_does_not_show_it(tmp_path, monkeypatch, value, problem):
    monkeypatch.setenv("CHAT_URL", value)
    config = write_config(tmp_path, CONFIG.format(own="http://127.0.0.1:9/"))
    result = run("check-config", "-c", config, code=1)
    assert f"destinations.chat.url: {problem}" in result.out + result.err
    assert "hunter2" not in result.out + result.err


def test_commands_that_need_no_secret_work_without_it(tmp_path, monkeypatch):
    monkeypatch.delenv("CHAT_URL", raising=False)
    config = write_config(tmp_path, CONFIG.format(own="http://127.0.0.1:9/"))
    result = run("config", "show", "-c", config, "--json")
    assert result.json["destinations"]["chat"]["url"] == "<secret>"
    assert "CHAT_URL is not set" in run("check-config", "-c", config, code=1).err
