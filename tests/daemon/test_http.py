"""HTTP of real senders: odd heads, broken bodies, and kept, excess and silent connections."""

import asyncio
import logging

import pytest
import pytest_asyncio
from daemons import SOURCES, Relay, adorn, running, write_config
from support import until
from wire import CONTINUE, Wire, request

from relay.ingest.server import Server
from relay.process.sockets import bind, url

pytestmark = pytest.mark.asyncio(loop_scope="module")

ADORN = "/v1/events"
LAZYCHAT = "/api/woocommerce-plugin/events"
MODDY = "/internal/event/notify"
CORS = """
[sources.shop]
plugin = "adorn"
prefix = "/shop"
cors_origins = ["https://studio.example"]
"""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def relay(tmp_path_factory, listener):
    async with running(write_config(tmp_path_factory.mktemp("relay"), SOURCES, CORS)) as relay:
        yield relay


# --- heads --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [str.lower, str.upper, str.title, str.swapcase])
async def test_header_names_ignore_case_on_the_wire(relay: Relay, case):
    body = b"{}"
    names = {"content-length": str(len(body)), "authorization": "Bearer dev-token", "x-event-type": "a.b"}
    lines = [f"{case(name)}: {value}" for name, value in names.items()]
    raw = "\r\n".join([f"POST {LAZYCHAT} HTTP/1.1", "HOST: x", *lines, "", ""]).encode() + body
    assert (await relay.exchange(raw)).status == 200


@pytest.mark.parametrize(
    "spelling", ["Bearer dev-token", "bearer dev-token", "BEARER  dev-token ", "Bearer\tdev"]
)
async def test_the_scheme_of_a_token_is_read_in_any_case(relay: Relay, spelling):
    raw = request("POST", LAZYCHAT, b'{"event_type":"a"}', authorization=spelling)
    assert (await relay.exchange(raw)).status == (401 if "\t" in spelling else 200)


@pytest.mark.parametrize(
    "lines",
    [
        "Authorization: Bearer dev-token\r\nAuthorization: Bearer dev-token",
        "Authorization: Bearer dev-token\r\nauthorization: Bearer other",
        "Authorization: Bearer d\u00e9v-token",
        "Authorization: Bearer \udcff\udcfe",
        "Authorization: Bearer dev-token\udcff",
        "Authorization:",
        "Authorization: Bearer",
        "Authorization: Basic ZGV2LXRva2Vu",
        "Authorization: Bearer " + "x" * 8000,
    ],
)
async def test_an_odd_authorization_is_401(relay: Relay, lines):
    head = f"POST {LAZYCHAT} HTTP/1.1\r\nHost: x\r\n{lines}\r\nContent-Length: 2\r\n\r\n"
    answer = await relay.exchange(head.encode("utf-8", "surrogateescape") + b"{}")
    assert answer.status == 401
    assert answer.json["success"] is False


async def test_a_sender_that_expects_100_continue_gets_it(relay: Relay):
    raw = request("POST", ADORN, adorn("asked"), expect="100-continue")
    head, _, body = raw.partition(b"\r\n\r\n")
    async with await Wire.open(relay.addresses.public) as wire:
        await wire.send(head + b"\r\n\r\n")
        assert (await wire.answer()).status == CONTINUE
        await wire.send(body)
        assert (await wire.answer()).status == 200
        await wire.send(request("POST", ADORN, adorn("asked")))
        assert (await wire.answer()).status == 200


async def test_the_largest_content_length_is_too_large(relay: Relay):
    """The parser treats it as no body."""
    answer = await relay.exchange(request("POST", ADORN, content_length=str(2**64 - 1)))
    assert answer.status == 413


async def test_a_body_that_is_too_large_gets_no_100_continue(relay: Relay):
    head = request("POST", ADORN, content_length=str(2**21 + 1), expect="100-continue")
    assert (await relay.exchange(head)).status == 413


@pytest.mark.parametrize("upgrade", ["h2c", "websocket"])
async def test_an_offer_to_upgrade_is_ignored(relay: Relay, upgrade):
    """Java's HttpClient offers h2c with every first request; the body belongs to that request."""
    raw = request("POST", ADORN, adorn(upgrade), connection="Upgrade", upgrade=upgrade)
    assert (await relay.exchange(raw)).status == 200
    assert len(await relay.rows(subject=upgrade)) == 1


async def test_an_absolute_url_is_a_valid_request_target(relay: Relay):
    raw = request("POST", f"http://relay.test{ADORN}?a=b", adorn("proxied"))
    assert (await relay.exchange(raw)).status == 200


@pytest.mark.parametrize(
    "path", [f"{ADORN}/", f"/{ADORN}", f"{ADORN}//", "/v1", "/health/", "/v1/../v1/events"]
)
async def test_nothing_is_ever_redirected(relay: Relay, path):
    answer = await relay.exchange(request("POST", path, adorn()))
    assert answer.status == 404
    assert "location" not in answer.headers
    assert b"<" not in answer.body


async def test_another_method_gets_405_with_the_allowed_ones(relay: Relay):
    for method in ("GET", "HEAD", "PUT", "OPTIONS", "DELETE"):
        answer = await relay.exchange(request(method, MODDY), bodiless=method == "HEAD")
        assert (answer.status, answer.headers["allow"]) == (405, "POST")


# --- bodies -------------------------------------------------------------------------------------------


async def test_a_body_of_1_3_mb_is_stored_whole(relay: Relay):
    body = adorn("large", payload={"text": "x" * 1_300_000})
    answer = await relay.exchange(request("POST", ADORN, body))
    assert (await relay.event(answer.json["event_id"])).body == body


@pytest.mark.parametrize("size", [1, 7, 1000])
async def test_a_chunked_body_is_joined(relay: Relay, size):
    body = adorn(f"chunks of {size}", payload={"text": "y" * 50})
    chunks = [body[at : at + size] for at in range(0, len(body), size)]
    framed = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in [*chunks, b""])
    answer = await relay.exchange(request("POST", ADORN, transfer_encoding="chunked") + framed)
    assert (await relay.event(answer.json["event_id"])).body == body


async def test_a_badly_framed_body_is_refused_at_once(relay: Relay):
    async with asyncio.timeout(30), await Wire.open(relay.addresses.public) as wire:
        await wire.send(request("POST", ADORN, transfer_encoding="chunked") + b"1\r\n{\r\n")
        await until(lambda: relay.app.ingest._budget.used)  # it is being read
        await wire.send(b"zz\r\n")
        answer = await wire.answer()
        assert (answer.status, answer.json["status"]) == (400, "error")
        assert await wire.closed()


async def test_a_chunked_body_is_refused_once_it_is_too_large(relay: Relay):
    raw = request("POST", ADORN, transfer_encoding="chunked") + b"100000\r\n" + b"x" * 2**20 + b"\r\n"
    endless = raw + (b"100000\r\n" + b"x" * 2**20 + b"\r\n") * 4
    assert (await relay.exchange(endless)).status == 413
    assert relay.app.ingest._budget.used == 0


@pytest.mark.parametrize(
    "body",
    [
        b"", b" ", b"{", b"nonsense", b"\xef\xbb\xbf{}", b'{"event_type":"a\xff","session_id":"s"}',
        b'{"event_type":"a","session_id":"s","payload":{"n":NaN}}',
        b'{"event_type":"a","session_id":"s","payload":{"n":-Infinity}}',
        b'{"event_type":"a","session_id":"s"} trailing', b"[" * 100_000, b'{"a":' * 100_000,
        b'{"event_type":"a","session_id":"s","payload":{"x":"\xed\xa0\x80"}}',
        b"'single'", b'{"event_type":"a",}', "{}".encode("utf-16"),
    ],
    ids=lambda body: repr(body[:60]),
)  # fmt: skip
async def test_a_body_that_is_not_json_in_utf_8_gets_400(relay: Relay, body):
    answer = await relay.exchange(request("POST", ADORN, body))
    assert answer.status == 400
    assert answer.json["status"] == "error"


async def test_numbers_and_escapes_are_kept_byte_for_byte(relay: Relay):
    payload = (
        b'{"big": 18446744073709551616, "price": 45000.00, "long": 1' + b"0" * 4000 + b', "t": "\\u00e9"}'
    )
    body = b'{"event_type":"a","session_id":"s","payload":' + payload + b"}"
    answer = await relay.exchange(request("POST", ADORN, body))
    assert (await relay.event(answer.json["event_id"])).data == payload


# --- connections --------------------------------------------------------------------------------------


async def test_pipelined_requests_are_answered_in_order(relay: Relay):
    async with await Wire.open(relay.addresses.public) as wire:
        await wire.send(b"".join(request("POST", ADORN, adorn(f"pipe {number}")) for number in range(20)))
        ids = [(await wire.answer()).json["event_id"] for _ in range(20)]
    subjects = [(await relay.event(id_)).subject for id_ in ids]
    assert subjects == [f"pipe {number}" for number in range(20)]


async def test_a_refused_request_leaves_the_connection_usable(relay: Relay):
    async with await Wire.open(relay.addresses.public) as wire:
        for status, raw in (
            (400, request("POST", ADORN, b"{")),
            (404, request("POST", f"{ADORN}/x", adorn())),
            (405, request("PUT", ADORN, adorn())),
            (200, request("POST", ADORN, adorn())),
        ):
            await wire.send(raw)
            assert (await wire.answer()).status == status


NO_HTTP = [
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    b"GARBAGE\r\n\r\n",
    b"F@O /v1/events HTTP/1.1\r\nHost: x\r\n\r\n",
    b"POST /v1/events HTTP/1.1\r\nHost: x\r\n" + b"X-More: yes\r\n" * 200 + b"\r\n",
    b"POST /v1/" + b"e" * 20_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    b"POST /v1/events HTTP/1.1\r\nX: " + b"e" * 20_000 + b"\r\n\r\n",
    b"POST /v1/events HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
    b"POST /v1/events HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nContent-Length: 5\r\n\r\n{}",
    b"POST /v1/events HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n",
    b"POST /v1/events HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
    b"POST /v1/events HTTP/1.1\r\nHost: x\r\nX-A: a\x00b\r\n\r\n",
    b"POST /v1/\xff HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET http://[::1/ HTTP/1.1\r\nHost: x\r\n\r\n",
]


@pytest.mark.parametrize("raw", NO_HTTP, ids=lambda raw: repr(raw[:50]))
async def test_bytes_that_are_not_http_get_json_without_a_traceback(relay: Relay, raw, caplog):
    caplog.set_level(logging.INFO)
    answer = await relay.exchange(raw)
    assert answer.status == 400
    assert answer.json["error"]["message"] == "Bad request"
    assert [record for record in caplog.records if record.exc_info or record.levelno > logging.INFO] == []


async def test_connections_beyond_the_limit_get_503_while_none_is_idle(relay: Relay):
    sock = bind("127.0.0.1:0", "listen")
    server = Server(relay.app.ingest.handle, implementation=relay.app.listener, max_connections=2)
    await server.listen(sock)
    good = request("POST", ADORN, adorn())
    try:
        async with await Wire.open(url(sock)) as one, await Wire.open(url(sock)) as other:
            for wire in (one, other):
                await wire.send(good[:-1])
            await until(lambda: server.under_way == 2)
            async with await Wire.open(url(sock)) as third:
                refused = await third.answer()
                assert await third.closed()
            assert (refused.status, refused.headers["retry-after"]) == (503, "1")
            assert refused.json["error"]["code"] == "overload"
            for wire in (one, other):
                await wire.send(good[-1:])
                assert (await wire.answer()).status == 200
    finally:
        await server.close(grace=0.1)


async def test_a_sender_without_a_request_is_disconnected(relay: Relay, monkeypatch):
    monkeypatch.setattr("relay.ingest.connection.FIRST_HEAD", 0.02)
    async with asyncio.timeout(30), await Wire.open(relay.addresses.public) as wire:
        await wire.send(b"POST /v1/events HTTP/1.1\r\nHost: x\r\n")
        assert await wire.closed()


# --- browsers -----------------------------------------------------------------------------------------


async def test_a_page_of_a_configured_origin_may_send_and_read(relay: Relay):
    asked = request(
        "OPTIONS", f"/shop{ADORN}", origin="https://studio.example", access_control_request_method="POST"
    )
    preflight = await relay.exchange(asked)
    assert preflight.status == 204
    assert preflight.headers["access-control-allow-methods"] == "POST"
    assert "content-type" in preflight.headers["access-control-allow-headers"]
    for body, status in ((adorn(), 200), (b"{", 400)):
        answer = await relay.exchange(request("POST", f"/shop{ADORN}", body, origin="https://studio.example"))
        assert (answer.status, answer.headers["vary"]) == (status, "Origin")
        assert answer.headers["access-control-allow-origin"] == "https://studio.example"


async def test_a_listed_page_may_set_the_documented_headers_and_send_beacons(relay: Relay):
    """A beacon sends in the credentials mode "include", in which browsers do not accept `*`."""
    origin = "https://studio.example"
    for method in ("OPTIONS", "POST"):
        answer = await relay.exchange(request(method, f"/shop{ADORN}", adorn(), origin=origin))
        assert answer.headers["access-control-allow-origin"] == origin
        assert answer.headers["access-control-allow-credentials"] == "true"
        if method == "OPTIONS":
            allowed = answer.headers["access-control-allow-headers"].split(", ")
            assert {"content-type", "idempotency-key", "x-request-id", "webhook-id"} <= set(allowed)


ORIGINS = {
    "another page": ["https://other.example"],
    "a sandboxed page": ["null"],
    "the listed one on another port": ["https://studio.example:8443"],
    "a name that begins like it": ["https://studio.example.evil.example"],
    "the relay's own address": ["http://127.0.0.1:8080"],
    "an empty one": [""],
    "two": ["https://studio.example", "https://other.example"],
    "no UTF-8": ["https://studio.example\udcff"],
}


@pytest.mark.parametrize(
    "content_type", ["text/plain", "application/json", "multipart/form-data; boundary=x"]
)
@pytest.mark.parametrize("origins", ORIGINS.values(), ids=ORIGINS)
@pytest.mark.parametrize("path", [ADORN, f"/shop{ADORN}"])
async def test_a_page_of_another_origin_cannot_send_to_a_source_without_secrets(
    relay: Relay, path, origins, content_type
):
    before, body = await relay.rows(), adorn()
    lines = "".join(f"Origin: {each}\r\n" for each in origins)
    head = (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n"
    )
    answer = await relay.exchange(f"{head}{lines}\r\n".encode("utf-8", "surrogateescape") + body)
    assert answer.status == 403
    assert answer.json == {"status": "error", "message": "The web page's origin is not in cors_origins"}
    if origins != ["https://studio.example", "https://other.example"] or path == ADORN:
        assert "access-control-allow-origin" not in answer.headers
    assert await relay.rows() == before


async def test_a_star_lists_every_origin(tmp_path):
    everybody = '[sources.adorn]\nplugin = "adorn"\ncors_origins = ["*"]\n'
    async with running(write_config(tmp_path, everybody)) as relay:
        for origin in ("https://other.example", "null"):
            answer = await relay.exchange(request("POST", ADORN, adorn(), origin=origin))
            assert (answer.status, answer.headers["access-control-allow-origin"]) == (200, origin)


async def test_a_source_with_tokens_is_protected_by_them(relay: Relay):
    """A page that may set `Authorization` has passed the browser's preflight."""
    body = b'{"event_type":"member_left","discord_id":"1"}'
    for token, status in (("dev-token", 200), ("wrong", 403)):
        raw = request("POST", MODDY, body, origin="https://other.example", authorization=f"Bearer {token}")
        assert (await relay.exchange(raw)).status == status


async def test_without_configured_origins_there_is_no_preflight(relay: Relay):
    answer = await relay.exchange(request("OPTIONS", ADORN, origin="https://studio.example"))
    assert answer.status == 405
    assert "access-control-allow-origin" not in answer.headers
