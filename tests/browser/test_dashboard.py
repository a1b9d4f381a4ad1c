"""The dashboard in a real Chromium: hostile data, keyboard, narrow screens, accessibility and actions."""

import asyncio
import json
import re
from contextlib import AsyncExitStack
from socket import socket
from urllib.parse import quote

import pytest
import pytest_asyncio
import receivers
from axe_playwright_python.async_playwright import Axe
from axe_playwright_python.base import AxeResults
from browsers import chromium, needs_chromium, opened
from daemons import SOURCES, adorn, destination, running, write_config
from playwright.async_api import expect
from postgres import database_of, drop_databases, maybe_pooled, needs_postgres
from proxies import proxy_at
from samples import read_samples
from support import until
from wire import exchange, request

from relay.ui.app import SCREENS
from tests.browser.screenshots import IMAGES, KEPT, take

pytestmark = [needs_chromium, pytest.mark.asyncio(loop_scope="module")]

TOKEN = "looks-and-acts"
HOSTILE = (
    "\"'><img src=x onerror=alert(1)><script>alert(2)</script><svg onload=alert(3)>\u202ejavascript:alert(4)"
)
PAGE = f"<!doctype html><base href=//evil.example><script>alert(5)</script>{HOSTILE}".encode()


AXE = Axe().axe_script
NARROW = ["color-contrast", "target-size", "empty-table-header", "scrollable-region-focusable"]
ALL, CONTRAST, OTHER = ({"resultTypes": ["violations"], "preload": False, **rules} for rules in (
    {"rules": {"target-size": {"enabled": True}}}, {"runOnly": ["color-contrast"]}, {"runOnly": NARROW},
))  # fmt: skip
ALIKE = ":is(tbody tr, .tree li, .settings b, .ways > li, .filters label):nth-of-type(n+4)"
"""Parts of a page after the third of a kind."""
LOOKS = ((1440, "light", ALL), (1440, "dark", CONTRAST), (390, "dark", OTHER))
"""Width, colours and options of each run of axe: the colours and the layout decide only about some rules."""


def spoilt(raw, done):
    """Yield a recorded request once for each text of its JSON body, with hostile data in its place.

    `done` has the places of former requests to the same path, and gets those of this one.
    """
    head, _, body = raw.partition(b"\r\n\r\n")
    document = json.loads(body)
    lines = [line for line in head.split(b"\r\n") if not line.lower().startswith(b"content-length")]
    for place in texts(document):
        known = (lines[0], *(0 if isinstance(key, int) else key for key in place))
        if known in done:
            continue
        done.add(known)
        inner = document
        *way, last = place
        for key in way:
            inner = inner[key]
        before, inner[last] = inner[last], HOSTILE
        made = json.dumps(document).encode()
        inner[last] = before
        yield b"\r\n".join([*lines, b"Content-Length: %d" % len(made), b"", made])


def texts(value, place=()):
    """Yield the places of all texts in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in items:
        if isinstance(each, str):
            yield (*place, key)
        else:
            yield from texts(each, (*place, key))


async def ended(relay, **filters):
    """Return the dead deliveries to the failing destination, as soon as there are any."""
    async with asyncio.timeout(60):
        while True:
            rows = [row for row in await relay.rows("deliveries", **filters) if row["destination"] == "shop"]
            if rows and all(row["state"] == "dead" for row in rows):
                return rows
            await asyncio.sleep(0.01)


async def followers(relay, count):
    """Wait for a number of open streams."""
    streams = (relay.app.api._top._followers, relay.app.api._tail._followers)
    await until(lambda: sum(map(len, streams)) == count, 30)


async def post(relay, path, body):
    """Ask the API for a change, and return the result."""
    raw = request("POST", f"/api/{path}", json.dumps(body).encode())
    return json.loads((await exchange(relay.addresses.socket, raw)).body)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("dashboard")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def relay(folder):
    """Run a relay with a destination that accepts, one that answers with hostile pages, and a paused one."""
    async with (
        receivers.answers(status="201 Created") as good,
        receivers.answers(status="404 Not Found", body=PAGE) as bad,
    ):
        config = write_config(
            folder,
            SOURCES,
            destination("crm", good.url),
            destination("shop", bad.url).replace('["0.1s", "0.1s", "0.1s", "0.1s"]', "[]"),
            destination("bi", good.url, "paused = true"),
        )
        tokens = f'tokens = [{{ secret = "{TOKEN}", name = "on-call", scope = "admin" }}]'
        config.write_text(config.read_text().replace("[admin]", f"[admin]\n{tokens}"))
        async with running(config) as relay:
            yield relay


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser():
    async with chromium() as browser:
        yield browser


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def opened_once(relay, browser):
    async with opened(browser, relay.addresses.admin, TOKEN) as both:
        yield both


@pytest_asyncio.fixture(loop_scope="module")
async def operator(opened_once):
    """The page of an operator and its watch: one page for many tests, since each new one starts a process."""
    page, watch = opened_once
    await page.set_viewport_size({"width": 1280, "height": 720})
    await page.emulate_media(color_scheme="light")
    yield page, watch
    await page.goto("about:blank")  # ends the streams
    watch.clear()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def addresses(relay):
    """Store hostile data from every source, and return the path of each screen."""
    stored, done = set(), set()
    for sample in read_samples():
        if sample.expect.status < 300 and sample.expect.event is not None:
            for raw in spoilt(sample.request, done):
                answer = await relay.exchange(raw)
                stored |= {sample.kind} if answer.status < 300 else set()
    assert stored == {"adorn", "compozy", "lazychat", "moddy", "whatsapp"}
    await relay.exchange(request("POST", f"/{quote(HOSTILE)}", HOSTILE.encode()))
    await relay.exchange(request("POST", "/v1/events", f'{{"session_id": {HOSTILE}'.encode()))
    await relay.app.ingest.refused.flush()
    [[refused], _] = await relay.app.store.refused.page(limit=1)

    dead = await ended(relay)
    replay = await post(relay, "deliveries/retry", {"filter": {"state": "dead", "destination": "shop"}})
    delivery = dead[-1]
    worker = json.dumps({"workerId": HOSTILE, "description": HOSTILE, "version": HOSTILE}).encode()
    token = {"authorization": "Bearer worker-secret-token-12345"}
    await relay.exchange(request("POST", "/api/v1/workers/register", worker, **token))
    filled = {
        "/events/{id}": f"/events/{delivery['event_id']}",
        "/deliveries/{id}": f"/deliveries/{delivery['id']}",
        "/refused/{id}": f"/refused/{refused.id}", "/replays/{id}": f"/replays/{replay['id']}",
        "/destinations/{name}": "/destinations/shop", "/sources/{name}": "/sources/adorn",
        "/workers/{source}/{id:[^/]+}": f"/workers/whatsapp/{quote(HOSTILE, safe='')}",
    }  # fmt: skip
    keys = {"event_type": "keys", "session_id": "keys", HOSTILE: {HOSTILE: [HOSTILE, {HOSTILE: HOSTILE}]}}
    stored = await relay.exchange(request("POST", "/v1/events", json.dumps(keys).encode()))
    event, other = f"/events/{delivery['event_id']}", f"/events/{stored.json['event_id']}"
    parts = [
        f"{event}?as={delivery['id']}", f"{event}?view=text", f"{other}?find={quote(HOSTILE)}",
        f"{other}?at={json.dumps(keys).index('[')}",
    ]  # fmt: skip
    return [*(filled.get(path, path) for path in SCREENS), *parts]


async def test_every_screen_shows_hostile_data_as_text_fits_its_window_and_satisfies_axe(
    relay, operator, addresses
):
    """Axe gets three rows of each table, and so on: the rest is alike."""
    origin, faults = relay.addresses.admin, []
    page, watch = operator
    for path in addresses:
        answer = await page.goto(f"{origin}/ui{path}", wait_until="load")
        assert answer.status == 200, path
        foreign = "img, svg:not(.spark), iframe, base, object, embed, form[action]"
        assert await page.locator(foreign).count() == 0, path
        assert await page.evaluate("document.scripts.length") == 1
        for width in (360, 768, 1440):
            await page.set_viewport_size({"width": width, "height": 800})
            assert await page.evaluate("document.documentElement.scrollWidth <= innerWidth"), (
                path,
                width,
            )
        if "view=" in path or "at=" in path:
            continue  # axe has seen such a page
        await page.evaluate("(alike) => document.querySelectorAll(alike).forEach((e) => e.remove())", ALIKE)
        await page.evaluate(AXE)
        for width, scheme, options in LOOKS:
            await page.set_viewport_size({"width": width, "height": 800})
            await page.emulate_media(color_scheme=scheme)
            found = AxeResults(await page.evaluate("(options) => axe.run(options)", options))
            if found.violations_count:
                faults.append(f"{path} {width} {scheme}\n{found.generate_report()}")
    assert faults == []
    await page.goto(f"{origin}/ui/")
    async with page.expect_response("**/api/tail*"):  # later events are counted
        await page.goto(f"{origin}/ui/events")
    await relay.exchange(request("POST", "/v1/events", adorn(session=HOSTILE)))
    await page.get_by_text(re.compile("[0-9]+ new: show")).wait_for()
    watch.check()


async def test_the_keyboard_alone_finds_an_event_and_sends_it_again(relay, operator, addresses):
    origin = relay.addresses.admin
    answer = await relay.exchange(request("POST", "/v1/events", adorn(session="keyboard")))
    assert answer.status == 200
    page, watch = operator
    await page.goto(f"{origin}/ui/")
    await page.keyboard.press("/")
    await page.keyboard.type("keyboard")
    await page.keyboard.press("Enter")
    await page.wait_for_url("**/ui/events?subject=keyboard")
    await page.keyboard.press("j")
    await page.keyboard.press("Enter")
    await page.wait_for_url("**/ui/events/evt_*")
    await page.locator("button[data-call]").first.focus()
    await page.keyboard.press("Enter")
    await page.get_by_role("dialog").wait_for()
    assert "relay deliveries" in await page.get_by_role("dialog").inner_text()
    await page.keyboard.press("Tab")
    async with page.expect_response("**/api/deliveries/retry") as asked:
        await page.keyboard.press("Enter")
    assert (await asked.value).status == 200
    await page.get_by_role("status").get_by_text("done").wait_for()
    assert await page.evaluate("document.activeElement.matches('button[data-call], main')")
    watch.check()


async def test_now_reloads_when_its_state_changes_and_shows_times_of_the_chosen_zone(
    relay, browser, addresses
):
    origin = relay.addresses.admin
    async with opened(browser, origin, TOKEN, timezone_id="Asia/Kolkata") as (page, watch):
        async with page.expect_response("**/api/top"):
            await page.goto(f"{origin}/ui/")
        await page.locator("[data-rate]", has_text=re.compile("^[0-9]")).first.wait_for()
        before = await page.title()
        await post(relay, "destinations/crm/disable", {})
        await page.get_by_text("crm is disabled").wait_for()
        assert re.fullmatch(r"\([0-9]+\) Now · .+", await page.title())
        assert await page.title() != before
        await page.locator("[data-rate]", has_text=re.compile("^[0-9]")).first.wait_for()
        await page.get_by_role("button", name="Test").first.focus()
        await post(relay, "destinations/crm/enable", {})
        await page.get_by_role("link", name="The state has changed: show").click()
        await page.get_by_text("crm is disabled").wait_for(state="detached")

        await page.goto(f"{origin}/ui/destinations/crm")
        await page.get_by_role("button", name="Test").first.click()
        await page.get_by_role("dialog").get_by_role("button", name="Test").click()
        await page.get_by_role("status").get_by_text(re.compile("would be delivered .HTTP 2..")).wait_for()
        await page.goto(f"{origin}/ui/destinations/shop")
        await page.get_by_role("button", name="Test").first.click()
        await page.get_by_role("dialog").get_by_role("button", name="Test").click()
        await page.get_by_role("status").get_by_text(re.compile("Test: .*HTTP 404 Not Found")).wait_for()
        await page.goto(f"{origin}/ui/destinations/crm")
        time = page.locator("time[data-exact]").first
        assert (await time.inner_text()).endswith(" UTC")
        await page.get_by_role("button", name="Show local times").click()
        assert (await time.inner_text()).endswith(" +05:30")
        await page.reload()
        assert (await time.inner_text()).endswith(" +05:30")
        watch.check()


@pytest.mark.parametrize("scripts", [True, False], ids=["scripts", "no-scripts"])
async def test_the_navigation_is_one_line_on_a_phone(relay, browser, operator, addresses, scripts):
    async with AsyncExitStack() as stack:
        page, watch = operator
        if not scripts:
            other = opened(browser, relay.addresses.admin, TOKEN, java_script_enabled=False)
            page, watch = await stack.enter_async_context(other)
        await page.set_viewport_size({"width": 360, "height": 740})
        await page.goto(f"{relay.addresses.admin}/ui/audit")
        assert (await page.get_by_role("banner").bounding_box())["height"] < 110
        for name in ("Now", "Audit"):  # the ends of the line
            link = page.get_by_role("navigation").get_by_role("link", name=name)
            await link.focus()
            box = await link.bounding_box()
            assert 0 <= box["x"] <= 360 - box["width"], name
        await page.get_by_role("link", name="Events", exact=True).click()
        await page.get_by_role("heading", name="Events").wait_for()
        await page.locator("tbody th a").first.click()
        await page.get_by_role("heading", name="Timeline").wait_for()
        assert (await page.locator("button:visible").count() > 0) == scripts  # none that does nothing
        watch.check()


async def test_the_keyboard_copies_ids_and_commands(relay, browser, addresses):
    """With the clipboard, which browsers offer only on https and loopback, and without it."""
    [address] = [path for path in addresses if path.startswith("/events/") and "?as=" in path]
    allowed = ["clipboard-read", "clipboard-write"]
    async with opened(browser, relay.addresses.admin, TOKEN, permissions=allowed) as (page, watch):
        await page.goto(f"{relay.addresses.admin}/ui{address}")
        event = address.removeprefix("/events/").partition("?")[0]
        hide = "Object.defineProperty(Navigator.prototype, 'clipboard', { get: () => undefined })"
        for has_clipboard in (True, False):
            await page.evaluate("true" if has_clipboard else f"window.board = navigator.clipboard; {hide}")
            for name, start in (
                ("id", event),
                ("command", f"relay events show {event}"),
                ("curl command", "curl -X POST"),
            ):
                button = page.get_by_role("button", name=f"Copy {name}", exact=True)
                await button.focus()
                await page.evaluate("document.getElementById('status').textContent = ''")
                await page.keyboard.press("Enter")
                await page.get_by_role("status").get_by_text("Copied.").wait_for()
                copied = await page.evaluate("(navigator.clipboard || board).readText()")
                assert copied.startswith(start), has_clipboard
                assert await button.evaluate("(each) => each === document.activeElement")
        watch.check()


async def test_a_search_in_a_body_leads_to_its_part(relay, operator, addresses):
    [address] = [path for path in addresses if "?find=" in path]
    page, watch = operator
    await page.goto(f"{relay.addresses.admin}/ui{address.partition('?')[0]}")
    await page.get_by_label("Find in the body").fill("keys")
    await page.keyboard.press("Enter")
    await page.get_by_text('2 matches for "keys"').wait_for()
    assert await page.locator("mark").all_inner_texts() == ["keys", "keys"]
    tree = page.get_by_role("region", name="Body")
    summary = tree.locator("summary").first
    await summary.focus()
    await page.keyboard.press("Enter")
    assert not await tree.get_by_text("session_id").is_visible()
    await page.goto(f"{relay.addresses.admin}/ui{address}")
    await page.locator(".found a").last.click()
    await page.get_by_text("Whole body").wait_for()
    watch.check()


async def test_keys_press_buttons_and_are_listed(relay, operator, addresses):
    origin = relay.addresses.admin
    page, watch = operator
    await page.goto(f"{origin}/ui/destinations/crm")
    await page.keyboard.press("p")
    assert "relay destinations pause crm" in await page.get_by_role("dialog").inner_text()
    await page.keyboard.press("Escape")
    await page.keyboard.press("?")
    assert "g d" in await page.get_by_role("dialog", name="Keys").inner_text()
    await page.keyboard.press("Escape")
    await page.keyboard.press("g")
    await page.keyboard.press("w")
    await page.wait_for_url("**/ui/workers")
    watch.check()


async def test_a_button_changes_exactly_what_its_page_lists(relay, operator, addresses):
    origin = relay.addresses.admin
    for _ in range(3):
        await relay.exchange(request("POST", "/v1/events", adorn(session="scope")))
    await ended(relay, subject="scope")
    query = "destination=shop&state=dead&subject=scope"
    page, watch = operator
    await page.goto(f"{origin}/ui/deliveries?{query}&limit=500")
    listed = await page.locator("tbody tr").count()
    assert listed == 3
    async with page.expect_response("**/api/deliveries/retry") as counted:
        await page.get_by_role("button", name="Send all again").click()
    assert await (await counted.value).json() == {"count": listed}
    text = await page.get_by_role("dialog").inner_text()
    assert f"{listed} deliveries selected, in less than 1 s at 100/s." in text
    assert "relay deliveries retry --subject scope --destination shop --state dead" in text
    await page.get_by_role("dialog").get_by_role("button", name="Send all again").click()
    await page.wait_for_url("**/ui/replays/rpl_*")
    await page.get_by_text(f"{listed} of {listed}").wait_for()
    await page.get_by_text("done").wait_for()
    watch.check()


async def test_keys_change_only_the_selected_rows(relay, operator, addresses):
    origin = relay.addresses.admin
    for _ in range(3):
        await relay.exchange(request("POST", "/v1/events", adorn(session="some")))
    await ended(relay, subject="some")
    page, watch = operator
    await page.goto(f"{origin}/ui/deliveries?subject=some&destination=shop")
    assert not await page.get_by_role("button", name="Retry 0 selected").is_enabled()
    await page.get_by_text("+ Filter").click()
    await page.get_by_role("link", name="dead", exact=True).click()
    await page.wait_for_url("**&destination=shop&state=dead")
    for key in ("j", "x", "j", "j", "x"):
        await page.keyboard.press(key)
    ids = [await box.get_attribute("value") for box in await page.locator("tbody input:checked").all()]
    assert len(ids) == 2
    async with page.expect_response("**/api/deliveries/retry") as counted:
        await page.get_by_role("button", name="Retry 2 selected").press("Enter")
    assert await (await counted.value).json() == {"count": 2}
    text = await page.get_by_role("dialog").inner_text()
    assert "2 deliveries selected" in text
    assert f"relay deliveries retry {' '.join(ids)}" in text
    await page.get_by_role("dialog").get_by_role("button", name="Retry 2 selected").click()
    await page.get_by_role("status").get_by_text("created 2").wait_for()
    await page.get_by_role("button", name="Select all on this page").click()
    await page.get_by_role("button", name=re.compile("Retry [1-9]")).wait_for()
    await page.get_by_role("button", name="Clear the selection").click()
    await page.get_by_role("button", name="Retry 0 selected").wait_for()
    watch.check()


async def test_a_heading_sorts_destinations(relay, operator, addresses):
    page, watch = operator
    await page.goto(f"{relay.addresses.admin}/ui/destinations")
    for direction in ("descending", "ascending"):
        await page.get_by_role("link", name="Dead").click()
        heading = page.locator(f"th[aria-sort={direction}]", has_text="Dead")
        await heading.wait_for()
        first = await page.locator("tbody th").first.inner_text()
        assert (first == "shop") == (direction == "descending")
    watch.check()


TWO_LINES = 72
"""Maximum height of a row with two lines, in pixels."""


async def test_rows_of_lists_have_two_lines_on_a_phone(relay, operator, addresses):
    page, watch = operator
    await page.set_viewport_size({"width": 390, "height": 800})
    for path in (
        "",
        "events",
        "deliveries?type=adorn.session.started&replayed=no",
        "destinations",
        "sources",
    ):
        await page.goto(f"{relay.addresses.admin}/ui/{path}")
        heights = await page.evaluate(
            "[...document.querySelectorAll('tbody tr')].map((row) => row.getBoundingClientRect().height)"
        )
        assert heights, path
        assert max(heights) <= TWO_LINES, (path, heights)
    watch.check()


async def test_a_code_logs_a_browser_in_once_until_it_logs_out(relay, browser):
    origin = relay.addresses.admin
    made = await post(relay, "logins", {})
    async with opened(browser, origin, None) as (page, watch), opened(browser, origin, None) as (thief, _):
        await page.goto(f"{origin}/ui/events")
        await page.locator("form[data-login]").wait_for()
        watch.messages.clear()  # the browser reports each answer 401
        await page.goto(made["url"])
        await page.get_by_role("heading", name="Now").wait_for()
        assert "code" not in page.url
        await thief.goto(made["url"])
        await thief.get_by_role("status").get_by_text("Not logged in").wait_for()
        watch.messages.clear()
        await page.goto(f"{origin}/ui/destinations/crm")
        assert await page.locator("button[data-call]").count() > 0
        watch.check()
        await page.get_by_role("button", name="Log out").click()
        await page.locator("form[data-login]").wait_for()
        assert (await page.goto(f"{origin}/ui/")).status == 401


async def test_a_login_with_the_scope_read_sees_no_button_that_changes_anything(relay, browser, addresses):
    origin = relay.addresses.admin
    made = await post(relay, "logins", {"scope": "read"})
    async with opened(browser, origin, None) as (page, watch):
        await page.goto(made["url"])
        await page.get_by_role("heading", name="Now").wait_for()
        watch.messages.clear()
        await page.goto(f"{origin}/ui/destinations/crm")
        assert await page.locator("button[data-call]").count() == 0
        for path in addresses:  # no script adds a button
            answer = await page.request.get(f"{origin}/ui{path}")
            assert answer.status == 200
            text = await answer.text()
            asks = [each for each in re.findall('data-ask="([^"]*)"', text) if not each.startswith("GET ")]
            assert ("data-call" in text, asks) == (False, []), path
        watch.check()


async def test_everything_works_below_the_path_of_a_proxy(relay, browser):
    """The browser has no locks, as on plain http with a name."""
    made = await post(relay, "logins", {})
    async with proxy_at("/a/b", relay) as origin, opened(browser, origin, None) as (page, watch):
        await page.add_init_script("delete Navigator.prototype.locks")
        await page.goto(f"{origin}/a/b/ui/#code={made['code']}")
        await page.get_by_role("heading", name="Now").wait_for()
        watch.messages.clear()
        assert await page.evaluate("navigator.locks === undefined")
        await page.locator("[data-rate]", has_text=re.compile("^[0-9]")).first.wait_for()
        await page.get_by_role("link", name="Events", exact=True).click()
        await page.wait_for_url(f"{origin}/a/b/ui/events")
        await until(lambda: len(relay.app.api._tail._followers) == 1, 30)
        await relay.exchange(request("POST", "/v1/events", adorn(session="below")))
        await page.get_by_text(re.compile("[0-9]+ new: show")).click()
        await page.get_by_role("cell", name="below").first.wait_for()
        await page.goto(f"{origin}/a/b/ui/destinations/crm")
        for verb in ("Pause", "Resume"):
            await page.get_by_role("button", name=verb).first.click()
            async with page.expect_response("**/a/b/api/destinations/crm/*") as asked:
                await page.get_by_role("dialog").get_by_role("button", name=verb).click()
            assert (await asked.value).status == 200
            await page.get_by_role("status").get_by_text("done").wait_for()
        watch.check()


HIDE = """(hidden) => {
  Object.defineProperty(document, "hidden", { value: hidden, configurable: true });
  document.dispatchEvent(new Event("visibilitychange"));
}"""


async def test_a_hidden_tab_closes_its_streams_and_misses_no_event(relay, operator, monkeypatch):
    monkeypatch.setattr("relay.api.stream.CHECK_EVERY", 0.05)
    origin = relay.addresses.admin
    await followers(relay, 0)
    page, watch = operator
    for path in ("", "events?source=adorn"):
        await page.goto(f"{origin}/ui/{path}")
        await followers(relay, 1)
        await page.evaluate(HIDE, True)
        await followers(relay, 0)
    for number in (1, 2):  # each connection counts again from the time of the page
        await relay.exchange(request("POST", "/v1/events", adorn(session="unseen")))
        await page.evaluate(HIDE, False)
        await page.get_by_text(re.compile(f"^{number} new: show$")).wait_for()
        await page.evaluate(HIDE, True)
        await followers(relay, 0)
    await page.evaluate("document.querySelector('[data-tail]').dataset.most = '3'")
    await page.evaluate(HIDE, False)
    await followers(relay, 1)
    await relay.exchange(request("POST", "/v1/events", adorn(session="unseen")))
    await page.get_by_text("3+ new: show").wait_for()
    await followers(relay, 0)
    watch.check()


async def test_a_hidden_page_shows_new_problems_in_its_title_and_on_its_icon(relay, browser, addresses):
    """A hidden page has no stream, so it must request the problems once a minute."""
    origin = relay.addresses.admin
    async with opened(browser, origin, TOKEN) as (page, watch):
        await page.clock.install()
        await page.goto(f"{origin}/ui/")
        before = await page.get_by_role("list", name="Problems").get_by_role("listitem").count()
        await page.evaluate(HIDE, True)
        await followers(relay, 0)
        await post(relay, "destinations/crm/disable", {})
        await page.clock.run_for(61_000)
        await expect(page).to_have_title(re.compile(rf"^\({before + 1}\) Now · "), timeout=30_000)
        assert "alert" in await page.locator("link[rel=icon]").get_attribute("href")
        assert await page.get_by_text("crm is disabled").count() == 0
        await page.evaluate(HIDE, False)  # a page that is shown again must be up to date
        await page.get_by_text("crm is disabled").wait_for()
        await page.evaluate(HIDE, True)
        await post(relay, "destinations/crm/enable", {})
        await page.clock.run_for(61_000)
        await expect(page).to_have_title(
            re.compile(rf"^\({before}\) Now · " if before else "^Now · "), timeout=30_000
        )
        watch.check()
        for path in ("**/ui/", "**/api/top"):
            await page.route(path, lambda route: route.abort())
        await page.evaluate(HIDE, False)
        await page.clock.run_for(61_000)
        await page.get_by_role("status").get_by_text("does not answer, so the figures are old").wait_for()
        await expect(page).to_have_title(re.compile(r"^\(no answer\) Now · "), timeout=30_000)


async def test_a_reload_does_not_interrupt_a_navigation(relay, operator, addresses):
    origin = relay.addresses.admin
    page, watch = operator
    await page.goto(f"{origin}/ui/")
    await page.locator("[data-rate]", has_text=re.compile("^[0-9]")).first.wait_for()
    changed = asyncio.Event()  # the page shows a link; Playwright finds nothing on it during the navigation
    page.once("console", lambda _: changed.set())
    await page.evaluate(
        "new MutationObserver(() => console.log('changed')).observe(problems, { attributes: true })"
    )

    async def slow(route):
        await changed.wait()
        await route.continue_()

    await page.route("**/ui/audit", slow)
    going = asyncio.create_task(page.goto(f"{origin}/ui/audit"))
    async with page.expect_request("**/ui/audit"):
        pass
    await post(relay, "destinations/crm/disable", {})
    assert (await going).status == 200
    await post(relay, "destinations/crm/enable", {})
    await page.unroute("**/ui/audit")
    watch.check()


async def test_eight_pages_of_a_browser_are_live_with_few_connections(relay, browser, addresses, monkeypatch):
    """Chromium opens six connections to a host; a page without a free one does not even load."""
    monkeypatch.setattr("relay.api.stream.CHECK_EVERY", 0.05)
    origin = relay.addresses.admin
    paths = ("", "events?source=adorn") * 4
    async with opened(browser, origin, TOKEN) as (first, watch):
        pages = [first, *[await first.context.new_page() for _ in paths[1:]]]
        for page, path in zip(pages, paths, strict=True):
            watch.follow(page)
            await page.goto(f"{origin}/ui/{path}")
        now, events = pages[::2], pages[1::2]
        for page in now:
            await page.locator("[data-rate]", has_text=re.compile("^[0-9]")).first.wait_for()
        await followers(relay, 4)
        assert len(relay.app.api._top._followers) == 1
        await relay.exchange(request("POST", "/v1/events", adorn(session="ten")))
        new = re.compile("^1 new: show$")
        for number, page in enumerate(events):
            await page.get_by_text(new).wait_for()  # the fourth waits until the first is hidden
            await page.evaluate(HIDE, True)
            await followers(relay, 4 - number)
        await now[0].evaluate(HIDE, True)  # another page opens the stream
        await followers(relay, 1)
        await post(relay, "sources/adorn/pause", {})
        for page in now[1:]:
            await page.get_by_text("adorn is paused").first.wait_for()
        await post(relay, "sources/adorn/resume", {})
        watch.check()


async def test_open_pages_follow_again_after_a_restart(tmp_path, browser):
    with socket() as free:
        free.bind(("127.0.0.1", 0))
        listen = f"127.0.0.1:{free.getsockname()[1]}"
    config = write_config(tmp_path, SOURCES, destination("crm", "http://127.0.0.1:9/", "paused = true"))
    text = config.read_text().replace('[admin]\nlisten = "127.0.0.1:0"', f'[admin]\nlisten = "{listen}"')
    config.write_text(text)
    async with AsyncExitStack() as stack:
        async with running(config) as relay:
            behind = await stack.enter_async_context(proxy_at("", relay))  # it answers 502 during the restart
            pages = []
            for origin in (relay.addresses.admin, behind):
                code = (await post(relay, "logins", {}))["code"]
                page, watch = await stack.enter_async_context(opened(browser, origin, None))
                pages.append((page, watch))
                await page.goto(f"{origin}/ui/#code={code}")
                await pending(page, 0)
                watch.messages.clear()  # the browser reports the answer 401 before the login
            await followers(relay, 2)
            await relay.exchange(request("POST", "/v1/events", adorn()))
            for page, _ in pages:
                await pending(page, 1)
        async with running(config) as relay:
            await followers(relay, 2)
            await relay.exchange(request("POST", "/v1/events", adorn("again")))
            for page, watch in pages:
                await pending(page, 2)
                assert len(watch.messages) < 10, watch.messages
                assert watch.foreign == []


async def pending(page, count):
    """Wait until Now shows this number of pending deliveries to the destination `crm`."""
    await page.locator("[data-live=crm]", has_text=re.compile(f"^{count}$")).first.wait_for()


@needs_postgres
async def test_a_page_of_one_node_shows_the_events_and_problems_of_another(tmp_path, browser):
    url, paths = maybe_pooled(database_of(tmp_path)), []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        cluster = f'[cluster]\nenabled = true\nnode = "{name}"\n'
        crm = destination("crm", "http://127.0.0.1:9/")
        paths.append(write_config(tmp_path / name, SOURCES, cluster, crm, url=url))
    async with running(paths[0]) as first, running(paths[1]) as second:
        nodes = (first, second)
        await until(lambda: all(node.app.store.nodes.figures()["nodes"] == 2 for node in nodes), 30)
        origin, code = first.addresses.admin, (await post(first, "logins", {}))["code"]
        async with opened(browser, origin, None) as (page, watch):
            await page.goto(f"{origin}/ui/#code={code}")
            await page.get_by_role("link", name="2 nodes").wait_for()
            watch.messages.clear()  # the browser reports the answer 401 before the login
            await page.goto(f"{origin}/ui/events?source=adorn")
            await followers(first, 1)
            for number, node in enumerate((second, first, second), 1):
                await node.exchange(request("POST", "/v1/events", adorn(session=f"s-{number}")))
                await page.get_by_text(re.compile(f"^{number} new: show$")).wait_for()
            await page.get_by_text("3 new: show").click()
            for number in (1, 2, 3):
                await page.get_by_role("cell", name=f"s-{number}").wait_for()
            watch.check()
    drop_databases()


async def test_a_violation_of_the_policy_is_noticed(relay, operator):
    page, watch = operator
    await page.goto(f"{relay.addresses.admin}/ui/")
    watch.check()
    await page.evaluate("document.body.setAttribute('style', 'color: red')")
    await page.evaluate("new Promise((resolve) => setTimeout(resolve))")
    assert any(each.startswith("policy: style-src") for each in watch.messages)


async def test_the_pictures_of_the_pages_come_from_a_daemon_with_trouble(browser, tmp_path):
    await take(browser, tmp_path, KEPT, step=120)
    for name in KEPT:
        made, kept = ((folder / f"{name}.png").read_bytes() for folder in (tmp_path, IMAGES))
        assert made[16:20] == kept[16:20]  # the width, in the header of a PNG
    used = re.findall(r"images/([a-z-]+)\.png", (IMAGES.parent / "dashboard.md").read_text())
    assert set(used) == set(KEPT)
