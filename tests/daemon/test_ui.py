"""The dashboard: its pages, the headers of each answer, and hostile payloads, which stay text."""

import asyncio
import json
import re
import socket
import sys
from html.parser import HTMLParser
from urllib.parse import urljoin

import pytest
from daemons import SOURCES, adorn, destination, running, write_config
from wire import exchange, following, request

from relay.api.auth import POLICY
from relay.base.clock import rfc3339
from relay.ui.page import STATIC

TOKENS = """[
  { secret = "looks", name = "grafana", scope = "read" },
  { secret = "acts", name = "on-call", scope = "operate" },
]"""
HOSTILE = '"><img src=x onerror=alert(1)><script>alert(1)</script>\u202e\x1b[31m'
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}


class Document(HTMLParser):
    """A page as a browser reads it."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.text = [], ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def all(self, name):
        return [attributes for tag, attributes in self.elements if tag == name]


@pytest.fixture
def config(tmp_path):
    hook = destination("crm", "http://127.0.0.1:9/x", "paused = true")
    other = destination(
        "bi", "http://127.0.0.1:9/y", 'paused = true\nwhere = { "data.total" = { gte = 100 } }'
    )
    path = write_config(tmp_path, SOURCES, hook, other)
    path.write_text(path.read_text().replace("[admin]", f"[admin]\ntokens = {TOKENS}"))
    return path


async def get(relay, path, **headers):
    return await exchange(relay.addresses.socket, request("GET", path, **headers))


async def page(relay, path):
    answer = await get(relay, path)
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    return answer.status, Document(answer.body.decode())


async def store(relay, **fields):
    """Send an event and return its id."""
    answer = await relay.exchange(request("POST", "/v1/events", adorn(**fields)))
    assert answer.status == 200, answer
    return answer.json["event_id"]


async def test_each_answer_has_the_policy_and_is_not_stored(relay):
    paths = [
        "/ui/",
        "/ui",
        "/ui/events",
        "/ui/events/evt_0",
        "/ui/unknown/x",
        "/ui/events?state=x",
        "/ui/static/x.js",
    ]
    for path in paths:
        answer = await get(relay, path)
        assert HEADERS.items() <= answer.headers.items(), path
        assert answer.headers["cache-control"] == "no-store"
        assert "server" not in answer.headers
    for name in STATIC:
        answer = await get(relay, f"/ui/static/{name}")
        assert HEADERS.items() <= answer.headers.items()
        assert (answer.status, answer.headers["cache-control"]) == (
            200,
            "public, max-age=31536000, immutable",
        )
    answer = await get(relay, "/api/status")
    assert answer.headers["content-security-policy"] == "default-src 'none'; frame-ancestors 'none'; sandbox"
    assert answer.headers["cross-origin-resource-policy"] == "same-origin"
    assert "content-security-policy" not in (await get(relay, "/health")).headers


async def test_the_listener_needs_a_token_and_its_own_name(relay):
    async def status(token, host):
        raw = request("GET", "/ui/", host=host, authorization=f"Bearer {token}")
        answer = await exchange(relay.addresses.admin, raw)
        assert HEADERS.items() <= answer.headers.items()
        return answer.status

    assert await status("looks", "localhost") == 200
    assert await status("unknown", "localhost") == 401
    assert await status("looks", "evil.example") == 403


async def test_pages_link_only_inside_the_dashboard_and_load_at_most_four_files(relay):
    id_ = await store(relay, total=45)
    for path in ("/a/b/ui/", "/a/b/ui/events", f"/a/b/ui/events/{id_}"):
        answer = await get(relay, path.removeprefix("/a/b"))
        assert answer.status == 200
        assert len(answer.body) < 60_000
        found = Document(answer.body.decode())
        for name in ("a", "link", "script", "img", "form"):
            for attributes in found.all(name):
                for key in ("href", "src"):
                    if key in attributes:
                        assert urljoin(path, attributes[key]).startswith("/a/b/ui/"), attributes
        assert len(found.all("link") + found.all("script") + found.all("img")) + 1 <= 4
        [body] = found.all("body")
        assert urljoin(path, body["data-api"]) == "/a/b/api/"
        assert urljoin(path, body["data-root"]) == "/a/b/ui/"
        assert not [each for _, each in found.elements if "style" in each]
    for path in ("/ui", "/"):
        moved = await get(relay, path)
        assert (moved.status, urljoin(f"/a/b{path}", moved.headers["location"])) == (308, "/a/b/ui/")


def test_the_files_of_the_dashboard_are_small_and_contain_no_foreign_address():
    sizes = {name.rpartition(".")[2]: len(each.content) for name, each in STATIC.items()}
    assert sizes["js"] <= 25_000
    assert sizes["css"] <= 12_000
    for each in STATIC.values():
        text = each.content.decode().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(
            r"https?://|url\(|@import|innerHTML|insertAdjacentHTML|\beval\b|new Function", text
        )
    # No payload stays in the browser.
    [script] = [each.content.decode() for name, each in STATIC.items() if name.endswith(".js")]
    assert set(re.findall(r"localStorage\W+\w+\W+(\w+)", script)) == {"zone"}


async def test_an_old_name_of_a_static_file_gets_the_present_file(relay):
    answer = await get(relay, "/ui/static/app.0123456789ab.js")
    assert (answer.status, answer.headers["cache-control"]) == (200, "no-store")
    assert (await get(relay, "/ui/static/other.js")).status == 404


async def test_hostile_payloads_stay_texts(relay):
    id_ = await store(relay, session=HOSTILE, event_type=HOSTILE[:20], note=HOSTILE)
    harmless = await store(relay)
    before = len((await page(relay, f"/ui/events/{harmless}"))[1].all("script"))
    for path in ("/ui/events", f"/ui/events/{id_}", "/ui/"):
        status, found = await page(relay, path)
        assert status == 200
        assert len(found.all("script")) == before
        assert found.all("img") == []
        assert not [each for _, each in found.elements if any(key.startswith("on") for key in each)]
        assert "\x1b" not in found.text
        assert "\u202e" not in found.text
    status, found = await page(relay, f"/ui/events/{id_}")
    assert json.dumps(HOSTILE)[1:-1] in found.text
    for query in ("?subject=", "?where=", "?state=", "?cursor=", "?<b>="):
        answer = await get(relay, f"/ui/events{query}%22%3E%3Cscript%3Ealert(1)%3C/script%3E")
        found = Document(answer.body.decode())
        assert len(found.all("script")) == before, query
        assert answer.status in (200, 400)


async def test_the_list_takes_the_filters_of_the_api_and_shows_its_command(relay):
    first = await store(relay, session="s-1")
    second = await store(relay, session="s-2")
    status, found = await page(relay, "/ui/events?subject=s-2")
    links = [each["href"] for each in found.all("a")]
    assert (f"./events/{second}" in links, f"./events/{first}" in links) == (True, False)
    assert "relay events list --subject s-2" in found.text
    status, found = await page(relay, "/ui/events?limit=1")
    [more] = [each["href"] for each in found.all("a") if each.get("rel") == "next"]
    status, found = await page(relay, f"/ui/events{more}")
    assert f"./events/{first}" in [each["href"] for each in found.all("a")]
    status, found = await page(relay, "/ui/events?sourc=x")
    assert (status, 'did you mean "source"' in found.text) == (400, True)
    status, found = await page(relay, "/ui/events?source=adron")
    assert status == 404


async def test_events_between_a_list_and_its_stream_are_counted_once(relay):
    shown = [await store(relay, session=f"s-{number}") for number in range(3)]
    for query in ("", "?limit=1", "?type=adorn.none.*"):
        _, found = await page(relay, f"/ui/events{query}")
        [place] = [each for each in found.all("p") if "data-tail" in each]
        assert place["data-known"].split()[:1] == ([] if "none" in query else shown[-1:])
        later = await store(relay, session="later")
        async with following(relay.addresses.socket, f"/api/tail?{place['data-tail']}") as reader:
            live = await store(relay, session="live")
            wanted, counted, stored = (0 if "none" in query else 2), 0, []
            while len(stored) + counted < wanted:
                name, item = await reader.next()
                if name == "event":
                    stored += [] if item["id"] in place["data-known"] else [item["id"]]
                else:
                    counted += item["events"]
                assert name in ("event", "count")
            assert stored[:1] == [later][:wanted]
        shown += [later, live]
    for query in ("?destination=crm", "?cursor=9", "?since=1h"):
        _, found = await page(relay, f"/ui/events{query}")
        assert not [each for each in found.all("p") if "data-tail" in each]


async def test_an_event_shows_its_deliveries_and_why_others_get_none(relay):
    id_ = await store(relay, total=45)
    status, found = await page(relay, f"/ui/events/{id_[:20]}")
    assert status == 200
    assert id_ in found.text
    assert "pending" in found.text
    assert "data.total" in found.text
    assert "45" in found.text
    buttons = {each["data-call"]: each for each in found.all("button") if "data-call" in each}
    [delivery] = await relay.rows("deliveries")
    assert json.loads(buttons["POST deliveries/retry"]["data-body"]) == {"ids": [delivery["id"]]}
    assert buttons["POST deliveries/cancel"]["data-command"] == f"relay deliveries cancel {delivery['id']}"
    raw = request("GET", f"/ui/events/{id_}", host="localhost", authorization="Bearer looks")
    answer = await exchange(relay.addresses.admin, raw)
    assert b"data-call" not in answer.body


async def test_empty_pages_name_the_next_step(relay):
    for path, command in (
        ("", "relay send adorn"),
        ("events", "relay send SOURCE --list"),
        ("deliveries", "relay explain --help"),
        ("attempts", "relay destinations test NAME"),
        ("refused", "relay verify --help"),
        ("replays", "relay deliveries retry --help"),
        ("sources/adorn", "relay send adorn"),
    ):
        _, found = await page(relay, f"/ui/{path}")
        assert command in {each.get("data-copy") for each in found.all("code")}, path
    _, found = await page(relay, "/ui/events?source=adorn")
    assert "No event matches. Remove the filters" in found.text
    await store(relay)
    _, found = await page(relay, "/ui/")
    assert "No event has arrived yet" not in found.text


async def test_pages_of_one_thing_show_times_in_full(relay):
    id_ = await store(relay)
    [event] = await relay.rows()
    stored = rfc3339(event["received_at"])
    _, found = await page(relay, f"/ui/events/{id_}")
    assert f"{stored[:10]} {stored[11:-1]} UTC" in found.text
    assert {"datetime": stored, "data-exact": None} in found.all("time")
    _, found = await page(relay, "/ui/events")
    assert f"{stored[:10]} {stored[11:19]} UTC" in {each["title"] for each in found.all("time")}


async def test_now_shows_problems_with_their_causes_and_commands(config):
    alone = "[cluster]\nenabled = false\n"  # a node does not mark workers as silent in its first seconds
    config.write_text(config.read_text().replace("paused = true", "", 1) + alone)
    async with running(config) as relay:
        await check_problems(relay)


async def check_problems(relay):
    await store(relay)
    await relay.operator("POST", "/api/sources/adorn/pause")
    await relay.operator("POST", "/api/destinations/crm/disable")
    register = json.dumps({"workerId": "w-7", "endpoint": "http://x"}).encode()
    token = {"authorization": "Bearer worker-secret-token-12345"}
    assert (await relay.exchange(request("POST", "/api/v1/workers/register", register, **token))).status < 300
    await relay.app.store.workers.sweep(at=2**62)
    relay.app.dispatcher.lanes["crm"].last_failure = (1, f"cannot connect {HOSTILE}")
    status, found = await page(relay, "/ui/")
    assert status == 200
    for text in (
        "relay sources resume adorn", "the worker w-7 of whatsapp is silent",
        "crm is disabled", "cannot connect", "relay destinations enable crm", "0 unaccounted",
    ):  # fmt: skip
        assert text in found.text, text
    calls = {each.get("data-call") for each in found.all("button")}
    names = {each.get("aria-label") for name in ("a", "button") for each in found.all(name)}
    assert {"Resume: adorn", "Why: adorn", "Enable: crm", "Why: crm", "Why: w-7"} <= names
    assert {
        "POST sources/adorn/resume",
        "POST destinations/crm/enable",
        "POST destinations/crm/test",
        "POST workers/whatsapp/w-7/maintenance",
    } <= calls
    named = re.match(r"\(([0-9]+)\) Now · (\S+)", found.text)
    assert named is not None
    assert (int(named[1]) >= 3, named[2]) == (True, socket.gethostname())  # a database may add cautions
    assert f"{named[1]} problems" in found.text
    assert "No event has arrived yet" not in found.text
    links = {each["href"] for each in found.all("a")}
    assert {"./workers/whatsapp/w-7", "./destinations/crm", "./sources/adorn"} <= links
    assert {"crm", "bi"} <= {each.get("data-live") for each in found.all("a")}
    assert {"sources adorn", "destinations crm"} <= {each.get("data-rate") for each in found.all("span")}


async def test_no_page_changes_anything(relay):
    await store(relay)
    for path in ("/ui/", "/ui/events"):
        for method in ("POST", "PUT", "DELETE", "PATCH"):
            answer = await exchange(relay.addresses.socket, request(method, path, b"{}"))
            assert answer.status == 405


async def test_without_the_dashboard_nothing_of_it_is_served_or_imported(config):
    config.write_text(config.read_text().replace("[admin]", "[admin]\nui = false"))
    async with running(config) as relay:
        for path in ("/", "/ui", "/ui/", "/ui/events", "/ui/login", "/ui/static/app.js"):
            assert (await get(relay, path)).status == 404
    code = (
        "import sys; from pathlib import Path; "
        "from relay.app import App; from relay.plugin_loading.loader import load; "
        f"App(load(Path({str(config)!r}))); "
        "print([each for each in sys.modules if each.startswith('relay.ui')])"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", f"import asyncio\nasync def main():\n {code}\nasyncio.run(main())",
        stdout=asyncio.subprocess.PIPE, cwd=config.parent,
    )  # fmt: skip
    out, _ = await asyncio.wait_for(process.communicate(), 30)
    assert (process.returncode, out.decode().strip()) == (0, "[]")
