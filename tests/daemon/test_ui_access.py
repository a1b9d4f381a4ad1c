"""Who may use the dashboard and its API: codes, cookies, other web pages, proxies; the audit trail."""

import asyncio
import json
import os
import pwd
import socket
from contextlib import asynccontextmanager
from urllib.parse import urljoin

import pytest
from commands import Commands, run
from daemons import SOURCES, destination, running, write_config
from proxies import proxy_at
from test_ui import Document
from wire import exchange, request

from relay.api.guesses import MOST_DELAYED
from relay.config.problems import ConfigError
from relay.plugin_loading.loader import load

TOKENS = """tokens = [
  { secret = "looks", name = "grafana", scope = "read" },
  { secret = "acts", name = "on-call", scope = "operate" },
  "everything",
]"""
ME = pwd.getpwuid(os.getuid()).pw_name
PAUSE = "/api/destinations/crm/pause"


@pytest.fixture
def config(tmp_path):
    path = write_config(tmp_path, SOURCES, destination("crm", "http://127.0.0.1:9/x"))
    return with_admin(path, TOKENS, 'hosts = ["relay.example.org"]')


def with_admin(path, *lines):
    path.write_text(path.read_text().replace("[admin]", "\n".join(("[admin]", *lines)), 1))
    return path


class Browser:
    """A browser at the admin listener: it keeps cookies and sends the origin of its requests."""

    def __init__(self, relay, host=None, scheme="http"):
        self.relay = relay
        self.host = host or relay.addresses.admin.removeprefix("http://")
        self.origin = f"{scheme}://{self.host}"
        self.cookie = None
        self.target = relay.addresses.admin

    async def send(self, method, path, body=None, **headers):
        own = {"host": self.host, "sec_fetch_site": "same-origin", "origin": self.origin}
        given = {**own, **({"cookie": self.cookie} if self.cookie else {}), **headers}
        raw = None if method == "GET" else json.dumps(body or {}).encode()
        fields = {name: value for name, value in given.items() if value is not None}
        return await exchange(self.target, request(method, path, raw, **fields))

    async def log_in(self, path="/ui/login", **body):
        answer = await self.send("POST", path, body)
        if answer.status == 200:
            self.cookie = answer.headers["set-cookie"].partition(";")[0]
        return answer


async def new_code(relay, **body):
    answer = await exchange(relay.addresses.socket, request("POST", "/api/logins", json.dumps(body).encode()))
    assert answer.status == 200, answer
    return answer.json


async def trail(relay):
    return (await relay.operator("GET", "/api/audit"))["items"]


async def test_a_code_logs_one_browser_in_once(relay):
    made = await new_code(relay)
    assert made["url"] == f"{relay.addresses.admin}/ui/#code={made['code']}"
    assert len(made["code"]) >= 22, "128 bits"
    first, thief = Browser(relay), Browser(relay)
    page = await first.send("GET", "/ui/")
    assert (page.status, b"data-login" in page.body) == (401, True)
    assert (await first.send("GET", "/ui/login")).json == {"logged_in": False}
    answer = await first.log_in(code=made["code"])
    assert answer.json == {"name": ME, "scope": "admin"}
    cookie = answer.headers["set-cookie"]
    port = relay.addresses.admin.rpartition(":")[2]
    assert cookie.startswith(f"relay-{port}=")
    assert {"HttpOnly", "SameSite=Strict", "Path=/"} == {each.strip() for each in cookie.split(";")[1:]}
    replay = await thief.log_in(code=made["code"])
    assert (replay.status, "set-cookie" in replay.headers) == (403, False)
    assert (await thief.log_in(code="guessed")).status == 403
    assert (await first.send("GET", "/ui/")).status == 200
    assert (await first.send("GET", "/api/status")).status == 200
    assert (await first.send("GET", "/ui/login")).json == {"logged_in": True}
    assert (await first.send("POST", PAUSE)).status == 200


async def test_a_cookie_on_https_is_bound_to_its_name_and_host(relay):
    browser = Browser(relay, "relay.example.org", "https")
    answer = await browser.log_in(token="acts")
    assert answer.headers["set-cookie"].startswith("__Host-relay=")
    assert "Secure" in answer.headers["set-cookie"]
    assert "Domain" not in answer.headers["set-cookie"]
    assert (await browser.send("GET", "/ui/")).status == 200
    value = browser.cookie.partition("=")[2]
    for name in ("relay-80", "relay-443", "__host-relay"):
        assert (await browser.send("GET", "/ui/", cookie=f"{name}={value}")).status == 401
    for host in ("evil.example", "relay.example.org.evil.example"):
        assert (await browser.send("GET", "/ui/", host=host)).status == 403
        assert (await browser.send("POST", "/ui/login", {"token": "acts"}, host=host)).status == 403


async def test_a_login_has_the_scope_of_its_token(relay):
    browser = Browser(relay)
    assert (await browser.log_in(token="unknown")).status == 403
    assert (await browser.log_in()).status == 403
    assert (await browser.log_in(token="looks")).json == {"name": "grafana", "scope": "read"}
    assert (await browser.send("GET", "/api/events")).status == 200
    assert (await browser.send("POST", PAUSE)).status == 403
    acting = Browser(relay)
    await acting.log_in(token="acts")
    assert (await acting.send("POST", PAUSE)).status == 200
    assert (await acting.send("POST", "/api/reload")).status == 403
    made = await new_code(relay, scope="read")
    looking = Browser(relay)
    assert (await looking.log_in(code=made["code"])).json == {"name": ME, "scope": "read"}


async def test_a_code_has_at_most_the_scope_of_its_creator(relay):
    async def ask(token, body):
        raw = request("POST", "/api/logins", json.dumps(body).encode(), host="localhost",
                      authorization=f"Bearer {token}")  # fmt: skip
        return await exchange(relay.addresses.admin, raw)

    answer = await ask("acts", {"scope": "admin"})
    assert answer.json["scope"] == "operate"
    browser = Browser(relay)
    assert (await browser.log_in(code=answer.json["code"])).json == {"name": "on-call", "scope": "operate"}
    assert (await ask("looks", {})).status == 403
    again = await browser.send("POST", "/api/logins")
    assert (again.status, "cannot begin another" in again.json["error"]["message"]) == (403, True)


CHANGES = (
    ({}, 200),
    ({"origin": None}, 200),
    ({"sec_fetch_site": None}, 200),
    ({"sec_fetch_site": None, "origin": None}, 403),
    ({"sec_fetch_site": "cross-site"}, 403),
    ({"sec_fetch_site": "same-site"}, 403),
    ({"sec_fetch_site": "none"}, 403),
    ({"sec_fetch_site": "cross-site", "origin": "http://evil.example"}, 403),
    ({"sec_fetch_site": None, "origin": "http://evil.example"}, 403),
    ({"sec_fetch_site": None, "origin": "http://127.0.0.1:3000"}, 403),
    ({"sec_fetch_site": None, "origin": "null"}, 403),
    ({"sec_fetch_site": None, "origin": "file://"}, 403),
    ({"content_type": "text/plain"}, 415),
    ({"content_type": "application/x-www-form-urlencoded"}, 415),
    ({"cookie": None}, 401),
    ({"cookie": "relay-80=x"}, 401),
    ({"cookie": None, "authorization": "Basic YTpi"}, 401),
    ({"host": "evil.example"}, 403),
)


async def test_other_web_pages_cannot_change_anything(relay):
    browser = Browser(relay)
    await browser.log_in(token="acts")
    for headers, status in CHANGES:
        answer = await browser.send("POST", PAUSE, **headers)
        assert answer.status == status, headers
    for headers, status in CHANGES[3:12]:
        assert (await browser.send("POST", "/ui/login", {"token": "acts"}, **headers)).status == status
        assert (await browser.send("DELETE", "/ui/login", **headers)).status == status
    assert (await browser.send("GET", "/ui/")).status == 200


async def test_other_web_pages_can_link_to_a_page_but_not_load_it(relay):
    browser = Browser(relay)
    await browser.log_in(token="acts")
    link = {"sec_fetch_site": "cross-site", "sec_fetch_mode": "navigate", "origin": None}
    assert (await browser.send("GET", "/ui/events", **link)).status == 200
    assert (await browser.send("GET", "/api/events", **link)).status == 403
    for site in ("cross-site", "same-site"):
        load = {"sec_fetch_site": site, "sec_fetch_mode": "no-cors"}
        for path in ("/ui/", "/ui/events", "/api/top", "/api/events"):
            assert (await browser.send("GET", path, **load)).status == 403


async def test_a_login_ends_with_a_log_out_and_survives_a_restart(config):
    async with running(config) as relay:
        browser, other = Browser(relay), Browser(relay)
        await browser.log_in(token="acts")
        await other.log_in(token="looks")
        answer = await other.send("DELETE", "/ui/login")
        assert "Max-Age=0" in answer.headers["set-cookie"]
        assert (await other.send("GET", "/api/status")).status == 401
    async with running(config) as relay:
        browser.target = relay.addresses.admin
        assert (await browser.send("GET", "/api/status")).status == 200
        assert (await Commands(relay.addresses.socket)("ui", "--end-logins")).out == "ended 1 login\n"
        assert (await browser.send("GET", "/api/status")).status == 401


async def test_the_command_prints_the_address_and_opens_a_private_file(
    relay, commands, monkeypatch, tmp_path
):
    opened = []
    monkeypatch.setattr("webbrowser.open", lambda url: opened.append(url) or True)
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    url = (await commands("ui")).out.strip()
    file = tmp_path / "relay-ui.html"
    assert opened == [file.as_uri()]
    assert file.stat().st_mode & 0o777 == 0o600
    assert url in file.read_text()
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert "open this address" in (await commands("ui", "--scope", "read")).err
    assert (await commands("ui", "--json")).json["url"].startswith(relay.addresses.admin)
    assert len(opened) == 1
    assert (await Browser(relay).log_in(code=url.partition("#code=")[2])).status == 200


@asynccontextmanager
async def behind_a_proxy(config, *lines):
    with_admin(config, 'user_header = "X-Remote-User"', *lines)
    async with running(config) as relay:
        yield Browser(relay)


LOCAL = ('trusted_proxies = ["127.0.0.0/8"]', 'proxy_secret = "between-us"')


async def test_a_proxy_with_the_secret_names_the_user(config):
    async with behind_a_proxy(config, *LOCAL) as browser:
        proxied = {"x_remote_user": "olga", "x_relay_proxy_secret": "between-us"}
        assert (await browser.send("GET", "/ui/", **proxied)).status == 200
        assert (await browser.send("GET", "/api/events", **proxied)).status == 200
        assert (await browser.send("POST", PAUSE, **proxied)).status == 403, "read is the default scope"
        for stranger in (
            {"x_remote_user": "olga"},
            {"x_remote_user": "olga", "x_relay_proxy_secret": "guessed"},
            {"x_remote_user": "olga", "x_relay_proxy_secret": ""},
            {"x_relay_proxy_secret": "between-us"},
            {"x_forwarded_user": "olga", "x_relay_proxy_secret": "between-us"},
        ):
            assert (await browser.send("GET", "/api/events", **stranger)).status == 401, stranger
        for name in ("", "ol\tga", "x" * 200, "\u202eagol"):
            assert (
                await browser.send("GET", "/api/events", **{**proxied, "x_remote_user": name})
            ).status != 200
        raw = request("GET", "/api/events", host="localhost", **proxied)
        raw = raw.replace(b"\r\n\r\n", b"\r\nX-Remote-User: admin\r\n\r\n")
        assert (await exchange(browser.relay.addresses.admin, raw)).status == 403


async def test_users_of_a_proxy_may_get_a_larger_scope_and_are_audited(config):
    async with behind_a_proxy(config, *LOCAL, 'user_scope = "operate"') as browser:
        proxied = {"x_remote_user": "olga", "x_relay_proxy_secret": "between-us"}
        assert (await browser.send("POST", PAUSE, **proxied)).status == 200
        cross = {**proxied, "sec_fetch_site": "cross-site"}
        assert (await browser.send("POST", PAUSE, **cross)).status == 403
        [entry] = await trail(browser.relay)
        assert (entry["operator"], entry["access"], entry["path"]) == ("olga", "proxy", PAUSE)
        assert (await browser.log_in(token="everything")).status == 200
        assert (await browser.send("POST", "/api/reload", **proxied)).status == 200, "a login has priority"


async def test_a_proxy_at_the_socket_has_only_the_rights_of_its_users(config):
    async with behind_a_proxy(config, f'trusted_proxies = ["unix:{ME}"]') as browser:
        socket = browser.relay.addresses.socket

        async def ask(method="GET", path="/api/events", host="relay.example.org", **headers):
            return (await exchange(socket, request(method, path, b"{}", host=host, **headers))).status

        assert await ask() == 401
        assert await ask(path="/ui/") == 401
        assert await ask(x_remote_user="olga") == 200
        assert await ask(x_remote_user="olga", host="evil.example") == 403
        own = {"x_remote_user": "olga", "sec_fetch_site": "same-origin"}
        assert await ask("POST", PAUSE, **own) == 403, "read is the default scope"
        assert await ask("POST", PAUSE, authorization="Bearer acts") == 200
        assert (await browser.send("GET", "/api/events", x_remote_user="olga")).status == 401


@pytest.mark.parametrize(
    ("lines", "key", "problem"),
    [
        (('user_header = "X-User"',), "admin.user_header", "trusted_proxies"),
        (('trusted_proxies = ["10.0.0.1"]',), "admin.trusted_proxies", "without `user_header`"),
        (('user_header = "Cookie"', 'trusted_proxies = ["10.0.0.1"]'), "admin.user_header", "X-Remote-User"),
        (('user_header = "X-User"', 'trusted_proxies = ["x"]'), "admin.trusted_proxies[0]", "network"),
        (('user_header = "X-User"', 'trusted_proxies = ["unix:"]'), "admin.trusted_proxies[0]", "unix:"),
        *(
            (('user_header = "X-User"', f'trusted_proxies = ["10.0.0.1", "{local}"]'),
             "admin.trusted_proxies[1]", "every user of this machine")
            for local in ("127.0.0.1", "::1", "0.0.0.0/0", "::/0", "::ffff:127.0.0.1")
        ),
    ],
)  # fmt: skip
def test_proxies_that_anybody_could_imitate_are_refused(config, lines, key, problem):
    with_admin(config, *lines)
    with pytest.raises(ConfigError) as error:
        load(config)
    assert any(each.key == key and problem in each.problem for each in error.value.problems)


async def test_a_browser_at_a_forwarded_socket_is_protected_as_well(relay):
    async def ask(method="POST", path=PAUSE, **headers):
        return (await exchange(relay.addresses.socket, request(method, path, b"{}", **headers))).status

    assert await ask(host="localhost:9000", origin="http://localhost:9000") == 200
    assert await ask(host="localhost:9000", origin="http://evil.example") == 403
    assert await ask(host="localhost:9000", sec_fetch_site="cross-site") == 403
    assert await ask("GET", "/api/top", host="localhost:9000", sec_fetch_site="cross-site") == 403
    assert await ask("GET", "/ui/", host="localhost:9000", sec_fetch_site="none") == 200
    for host in ("evil.example", "evil.example:9000", "10.0.0.1.evil.example"):
        assert await ask(host=host) == 403
        assert await ask("GET", "/ui/", host=host) == 403


async def test_the_audit_trail_names_each_operator(relay, commands, monkeypatch):
    await commands("destinations", "pause", "crm")
    monkeypatch.setenv("SUDO_USER", "ivan")
    await commands("destinations", "resume", "crm")
    monkeypatch.delenv("SUDO_USER")
    bearer = {"authorization": "Bearer everything", "cookie": None}
    browser = Browser(relay)
    assert (await browser.send("POST", PAUSE, **bearer)).status == 200
    await browser.log_in(token="acts")
    assert (await browser.send("POST", "/api/destinations/crm/resume")).status == 200
    for _ in range(3):
        assert (await browser.send("POST", "/api/reload")).status == 403
        assert (await browser.log_in(code="guessed")).status == 403
    await browser.send("POST", "/api/destinations/crm/pause", {"for": "1h"})
    found = await trail(relay)
    assert [
        (each["operator"], each["access"], each["path"].rpartition("/")[2], each["status"]) for each in found
    ] == [
        ("on-call", "login", "pause", 200),
        ("on-call", "login", "resume", 200),
        ("on-call", "login", "login", 200),
        ("token 3", "token", "pause", 200),
        (f"ivan (as {ME})", "socket", "resume", 200),
        (ME, "socket", "pause", 200),
    ]
    assert (found[0]["body"], found[0]["remote"]) == ('{"for":"1h"}', "127.0.0.1")
    assert {each["node"] for each in found} == {socket.gethostname()}
    assert "acts" not in json.dumps(found)
    page = await browser.send("GET", "/ui/audit?operator=on-call")
    assert (page.status, page.body.count(b"/api/destinations/crm/"), b"ivan" in page.body) == (200, 2, False)
    listed = (await commands("audit", "--operator", "on-call", "--since", "1h", "--json")).json["items"]
    assert len(listed) == 3
    assert "/api/destinations/crm/resume" in (await commands("audit")).out
    assert len((await commands("audit", "--limit", "2", "-q")).out.split()) == 2


async def test_a_remote_daemon_s_address_is_printed_as_the_operator_knows_it(relay, tmp_path):
    file = tmp_path / "token"
    file.write_text("acts\n")
    url = relay.addresses.admin.replace("127.0.0.1", "localhost")
    result = await asyncio.to_thread(run, "ui", "--url", url, "--token-file", file, "--no-browser")
    assert result.out.startswith(f"{url}/ui/#code=")
    browser = Browser(relay)
    code = result.out.strip().partition("#code=")[2]
    assert (await browser.log_in(code=code)).json == {"name": "on-call", "scope": "operate"}


async def test_a_stream_of_a_login_ends_and_needs_the_login_again(relay, monkeypatch):
    monkeypatch.setattr("relay.api.stream.LOGIN_CHECK", 0.05)
    browser = Browser(relay)
    await browser.log_in(token="looks")
    answer = await browser.send("GET", "/api/tail")
    assert (answer.status, answer.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    await browser.send("DELETE", "/ui/login")
    assert (await browser.send("GET", "/api/tail")).status == 401


async def test_malformed_headers_are_refused_without_an_internal_error(relay, caplog):
    browser = Browser(relay)
    await browser.log_in(token="acts")
    name, value = browser.cookie.split("=")
    cookies = (
        name,
        f"{name}=",
        ";;;=;",
        f"{name}={value}x",
        f"{name}=\xff",
        "a" * 7000,
        f"{name.upper()}={value}",
    )
    for cookie in cookies:
        assert (await browser.send("GET", "/ui/", cookie=cookie)).status == 401, cookie
    noisy = f'other={{"a": 1, "b": [2]}}; x; =y; {name}={value}; z="'
    assert (await browser.send("GET", "/ui/", cookie=noisy)).status == 200
    for origin in ("http://[", "http://", "://", "", "http:/127.0.0.1", "\xff", "http://a http://b"):
        answer = await browser.send("POST", "/ui/login", {"token": "acts"}, origin=origin)
        assert answer.status == 200, "the browser says that it is the same origin"
        refused = await browser.send("POST", PAUSE, origin=origin, sec_fetch_site=None)
        assert refused.status == 403
    for body in (b"", b"[]", b"{", b'{"token": 1}', b"\xff", b"[" * 4000):
        headers = {"host": browser.host, "sec_fetch_site": "same-origin"}
        answer = await exchange(relay.addresses.admin, request("POST", "/ui/login", body, **headers))
        assert answer.status == 400, body
    for authorization in ("Bearer", "Bearer ", "bearer \xff", "Bearer acts acts"):
        answer = await browser.send("GET", "/api/status", authorization=authorization)
        assert answer.status == 401
    assert not [each for each in caplog.records if "failed" in each.getMessage() and each.exc_info]


async def test_everything_works_below_the_path_of_a_proxy(relay):
    async with proxy_at("/a/b", relay) as url:
        browser = Browser(relay, url.removeprefix("http://"))
        browser.target = url
        assert (await browser.log_in(path="/a/b/ui/login", token="acts")).status == 200
        seen = {"/a/b/ui/"}
        left = ["/a/b/ui/"]
        while left:
            here = left.pop()
            answer = await browser.send("GET", here)
            assert answer.status == 200, here
            if not answer.headers["content-type"].startswith("text/html"):
                continue
            found = Document(answer.body.decode())
            links = [each.get("href") or each.get("src") for each in found.all("a") + found.all("link")]
            links += [each["src"] for each in found.all("script")]
            pages = {urljoin(here, link).partition("#")[0] for link in links if link and "?" not in link}
            assert all(each.startswith("/a/b/ui/") for each in pages)
            left += pages - seen
            seen |= pages
        assert len(seen) > 12
        assert (await browser.send("POST", urljoin("/a/b/ui/", f"..{PAUSE}"))).status == 200
        foreign = {"origin": "http://evil.example", "sec_fetch_site": None}
        assert (await browser.send("POST", "/a/b" + PAUSE, **foreign)).status == 403


async def test_a_large_request_for_a_login_is_not_read(relay):
    answer = await Browser(relay).log_in(token="x" * 100_000)
    assert (answer.status, "set-cookie" in answer.headers) == (400, False)


async def test_without_the_listener_there_is_no_address_for_a_browser(config):
    text = config.read_text()
    at = text.index("listen =", text.index("[admin]"))
    config.write_text(text[:at] + text[at:].replace("127.0.0.1:0", "", 1))
    async with running(config) as relay:
        answer = await exchange(relay.addresses.socket, request("POST", "/api/logins", b"{}"))
        assert (answer.status, "the admin listener is off" in answer.json["error"]["message"]) == (400, True)
        assert (await exchange(relay.addresses.socket, request("GET", "/ui/"))).status == 200


async def test_without_the_dashboard_no_login_works(config):
    with_admin(config, "ui = false")
    async with running(config) as relay:
        answer = await exchange(relay.addresses.socket, request("POST", "/api/logins", b"{}"))
        assert (answer.status, "the dashboard is off" in answer.json["error"]["message"]) == (400, True)
        browser = Browser(relay)
        assert (await browser.log_in(token="acts")).status in (401, 404, 405)


async def test_logins_with_wrong_tokens_are_limited(relay):
    guesser = Browser(relay)
    for _ in range(30):
        answer = await guesser.log_in(token="guess")
        if answer.status != 403:
            break
    assert (answer.status, answer.json["error"]["code"]) == (429, "too_many_requests")
    assert 1 <= int(answer.headers["retry-after"]) <= 6
    assert (await guesser.log_in(token="acts")).status == 429
    noted = [entry for entry in await trail(relay) if entry["access"] == "none"]
    assert [(entry["operator"], entry["path"], entry["status"]) for entry in noted] == [
        ("unknown", "/ui/login", 429)
    ]
    assert (await guesser.log_in(code=(await new_code(relay))["code"])).status == 200


async def test_many_wrong_bearer_tokens_are_answered_slowly(relay, monkeypatch):
    monkeypatch.setattr("relay.api.guesses.DELAY", 0.01)

    async def ask(token):
        raw = request("GET", "/api/status", host="localhost", authorization=f"Bearer {token}")
        return await exchange(relay.addresses.admin, raw)

    for _ in range(15):
        assert (await ask("guess")).status == 401
    assert (await ask("acts")).status == 200
    guesses = relay.app.api._access._guesses
    guesses._delayed = MOST_DELAYED
    answer = await ask("acts")
    assert (answer.status, answer.headers["retry-after"]) == (429, "1")
    guesses._delayed = 0
    assert (await ask("acts")).status == 200
