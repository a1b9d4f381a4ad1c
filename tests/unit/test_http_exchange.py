"""The bytes of a request, and the result of a response."""

import gzip
import hashlib

import pytest
import receivers
from client import send
from receivers import head

from relay import __version__
from relay.delivery.http.response import KEEP_LIMIT, READ_LIMIT
from relay.delivery.http.result import one_line

pytestmark = pytest.mark.usefixtures("silence")


async def test_a_request_has_only_the_headers_of_the_relay(client_for):
    async with receivers.answers() as receiver:
        await send(client_for(), receiver.url + "?a=b%2Fc", body=b'{"a":1}', **{"webhook-id": "evt_1"})
        (request,) = receiver.requests
        assert request.line == "POST /hook?a=b%2Fc HTTP/1.1"
        assert request.body == b'{"a":1}'
        assert request.headers == {
            "host": f"127.0.0.1:{receiver.port}",
            "user-agent": f"hookferry/{__version__}",
            "content-type": "application/json",
            "webhook-id": "evt_1",
            "content-length": "7",
        }


@pytest.mark.parametrize(
    ("written", "sent"),
    [
        ("", "/"),
        ("/a%2Fb?sig=c%2Bd%2f%20e+f", "/a%2Fb?sig=c%2Bd%2f%20e+f"),
        ("/a/../b//c", "/a/../b//c"),
        ("?q=1", "/?q=1"),
        ("/ä b?q=ü", "/%C3%A4%20b?q=%C3%BC"),
        ("/a#fragment", "/a"),
    ],
)
async def test_a_url_is_sent_as_written(client_for, written, sent):
    async with receivers.answers() as receiver:
        await send(client_for(), receiver.url.removesuffix("/hook") + written)
        assert receiver.requests[0].line == f"POST {sent} HTTP/1.1"


async def test_a_user_and_password_in_the_url_become_basic_authentication(client_for):
    async with receivers.answers() as receiver:
        await send(client_for(), receiver.url.replace("//", "//user:p%40ss@"))
        assert receiver.requests[0].headers["authorization"] == "Basic dXNlcjpwQHNz"


async def test_the_method_and_the_user_agent_are_configurable(client_for):
    async with receivers.answers() as receiver:
        await send(client_for(method="PUT"), receiver.url, **{"User-Agent": "custom"})
        assert receiver.requests[0].line.startswith("PUT ")
        assert receiver.requests[0].headers["user-agent"] == "custom"


@pytest.mark.parametrize("size", [0, 1, 2**20, 2**20 + 1, 3 * 2**20])
async def test_a_body_of_any_size_arrives_whole(client_for, size):
    body = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    async with receivers.answers() as receiver:
        assert (await send(client_for(), receiver.url, body=body)).result == "ok"
        assert hashlib.sha256(receiver.requests[0].body).digest() == hashlib.sha256(body).digest()


async def test_cookies_are_forgotten(client_for):
    async with receivers.answers(set_cookie="session=1; Path=/") as receiver:
        client, url = (
            client_for(),
            f"http://localhost:{receiver.port}/",
        )  # aiohttp keeps no cookies for an IP address
        await send(client, url)
        await send(client, url)
        assert "cookie" not in receiver.requests[1].headers


async def test_proxies_of_the_environment_are_ignored(client_for, monkeypatch):
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{receivers.unused_port()}")
    async with receivers.answers() as receiver:
        assert (await send(client_for(), receiver.url)).result == "ok"


async def test_a_header_with_a_line_break_is_refused_before_anything_is_sent(client_for):
    async with receivers.answers() as receiver:
        with pytest.raises(ValueError, match="line break or NUL"):
            await send(client_for(), receiver.url, **{"x-split": "a\r\nx-evil: b"})
        assert receiver.requests == []


@pytest.mark.parametrize(
    ("status", "result", "error"),
    [
        ("200 OK", "ok", None),
        ("201 Created", "ok", None),
        ("204 No Content", "ok", None),
        ("299 Odd", "ok", None),
        ("400 Bad Request", "4xx", "HTTP 400 Bad Request"),
        ("404 Not Found", "4xx", "HTTP 404 Not Found"),
        ("410 Gone", "4xx", "HTTP 410 Gone"),
        ("429 Too Many Requests", "429", "HTTP 429 Too Many Requests"),
        ("500 ", "5xx", "HTTP 500"),
        ("503 Service\tUnavailable", "5xx", "HTTP 503 Service Unavailable"),
        ("599 \x1b[31mred", "5xx", "HTTP 599 ?[31mred"),
    ],
)
async def test_a_status_has_its_label_and_its_error_line(client_for, status, result, error):
    async with receivers.answers(status=status) as receiver:
        answer = await send(client_for(), receiver.url)
        assert (answer.result, answer.status, answer.error) == (result, int(status[:3]), error)


@pytest.mark.parametrize("status", [300, 301, 302, 303, 304, 305, 307, 308])
@pytest.mark.parametrize(
    "place", ["http://169.254.169.254/latest", "//127.0.0.1/", "/elsewhere", "\x80:nonsense"]
)
async def test_a_redirect_is_a_failure_that_names_the_target_and_is_not_followed(client_for, status, place):
    async with receivers.answers(status=f"{status} Elsewhere", location=place) as receiver:
        answer = await send(client_for(), receiver.url)
        assert (answer.result, answer.status) == ("3xx", status)
        assert one_line(place) in answer.error
        assert "redirects are never followed" in answer.error
        assert (receiver.connections, len(receiver.requests)) == (1, 1)


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        ("120", "120"),
        ("-1", "-1"),
        ("1_0", "1_0"),
        ("Wed, 21 Oct 2015 07:28:00 GMT", "Wed, 21 Oct 2015 07:28:00 GMT"),
        ("9" * 200, "9" * 200),
        ("9" * 201, None),
        ("\udcd9\udca1", None),  # an Arabic digit in UTF-8
        ("1\t2", None),
    ],
)
async def test_a_retry_after_of_plain_text_is_returned(client_for, value, kept):
    async with receivers.answers(status="503 Busy", retry_after=value) as receiver:
        answer = await send(client_for(), receiver.url)
        assert answer.headers.get("retry-after") == kept


async def test_only_headers_that_influence_deliveries_are_returned(client_for):
    async with receivers.answers(status="503 Busy", webhook_delivery="disable", x_other="1") as receiver:
        answer = await send(client_for(), receiver.url)
        assert answer.headers == {"webhook-delivery": "disable"}


@pytest.mark.parametrize(
    "size", [0, 1, KEEP_LIMIT - 1, KEEP_LIMIT, KEEP_LIMIT + 1, READ_LIMIT, READ_LIMIT + 1, 2**20]
)
async def test_the_first_bytes_of_a_body_are_kept_and_a_longer_body_is_marked(client_for, size):
    body = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    async with receivers.answers(body=body) as receiver:
        client = client_for()
        for _ in range(2):
            answer = await send(client, receiver.url)
            assert (answer.result, answer.body) == ("ok", body[:KEEP_LIMIT])
            assert answer.truncated == (size > KEEP_LIMIT)


async def test_a_compressed_body_stays_compressed(client_for):
    packed = gzip.compress(b"hello" * 10, mtime=0)
    async with receivers.answers(body=packed, content_encoding="gzip") as receiver:
        assert (await send(client_for(), receiver.url)).body == packed


@pytest.mark.parametrize(
    ("make", "body"),
    [(receivers.answers_in_chunks, b"in chunks"), (receivers.answers_until_close, b"until close")],
)
async def test_a_body_may_have_any_framing(client_for, make, body):
    async with make() as receiver:
        client = client_for()
        for _ in range(2):
            answer = await send(client, receiver.url)
            assert (answer.result, answer.body, answer.truncated) == ("ok", body, False)


async def test_a_1xx_may_precede_the_response(client_for):
    early = head("100 Continue") + head("103 Early Hints", link="</a>")
    async with receivers.sends(answer=early + head("201 Created", content_length=2) + b"ok") as receiver:
        answer = await send(client_for(), receiver.url)
        assert (answer.result, answer.status, answer.body) == ("ok", 201, b"ok")
