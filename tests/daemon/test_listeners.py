"""Both listeners give the same answers, byte for byte except for the order of headers, reasons and dates."""

import asyncio
import gzip
import re
import sys
import zlib
from contextlib import suppress
from functools import partial
from importlib.metadata import version

import listeners
import pytest
import pytest_asyncio
from daemons import SOURCES, adorn, running, write_config
from samples import read_samples
from support import until
from test_http import CORS, NO_HTTP
from wire import Wire, exchange, request

from relay.ingest import implementation
from relay.ingest.implementation import TESTED, implementation_of, is_tested
from relay.plugin_loading.loader import load

pytestmark = pytest.mark.asyncio(loop_scope="module")

ADORN, MODDY = "/v1/events", "/internal/event/notify"
TOKEN = {"authorization": "Bearer dev-token"}
MEMBER = b'{"event_type":"member_left","discord_id":"1"}'
LAST = request("GET", "/health", connection="close")
BODY = adorn("listeners")
POST = request("POST", ADORN, BODY)
CHUNKED = request("POST", ADORN, transfer_encoding="chunked")
CHUNKS = b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)
UPGRADE = request("POST", ADORN, BODY, connection="Upgrade", upgrade="h2c")


ZIPPED = gzip.compress(b'{"type": "zipped"}', mtime=0)
GZIP = {"content_encoding": "gzip"}
BROTLI = b"Content-Encoding: br\r\n\r\n"
OPEN = """
[sources.open]
plugin = "generic"
path = "/open"
verify = "none"
max_body = "4 KiB"
type = "{body:type}"
reply = { status = 202, empty = true }
handshakes = [
  { method = "GET", when = { "{query:echo}" = "*" }, reply = { text = "{query:echo}" } },
  { method = "HEAD", when = { "{query:echo}" = "*" }, reply = { empty = true } },
]
"""


def old(raw):
    return raw.replace(b"HTTP/1.1", b"HTTP/1.0")


WELL_FRAMED = {
    "an event": [POST],
    "an event and the end": [request("POST", ADORN, BODY, connection="close")],
    "an event with a token": [request("POST", MODDY, MEMBER, **TOKEN)],
    "a wrong token": [request("POST", MODDY, MEMBER, authorization="Bearer guess")],
    "no token": [request("POST", MODDY, MEMBER)],
    "no JSON": [request("POST", ADORN, b"{")],
    "a field that is missing": [request("POST", ADORN, b"{}")],
    "an unknown path": [request("POST", f"{ADORN}/x", BODY)],
    "another slash": [request("POST", f"{ADORN}/", BODY)],
    "a path of nobody": [request("GET", "/nobody")],
    "health": [request("GET", "/health")],
    "health by HEAD": [request("HEAD", "/health")],
    "health by POST": [request("POST", "/health", b"{}")],
    "GET": [request("GET", ADORN)],
    "HEAD": [request("HEAD", ADORN)],
    "OPTIONS": [request("OPTIONS", ADORN)],
    "OPTIONS *": [request("OPTIONS", "*")],
    "TRACE": [request("TRACE", ADORN)],
    "CONNECT": [request("CONNECT", "relay.test:80")],
    "a preflight": [request("OPTIONS", f"/shop{ADORN}", origin="https://studio.example")],
    "a listed origin": [request("POST", f"/shop{ADORN}", BODY, origin="https://studio.example")],
    "another origin": [request("POST", f"/shop{ADORN}", BODY, origin="https://other.example")],
    "a whole URL": [request("POST", f"http://relay.test{ADORN}?a=b", BODY)],
    "a whole URL without a path": [request("POST", "http://relay.test", BODY)],
    "a path that is not UTF-8": [request("PUT", "/api/v1/workers/%ff/heartbeat", b"{}")],
    "a query": [request("POST", f"{ADORN}?a=%ff", BODY)],
    "HTTP/1.0": [old(POST)],
    "HTTP/1.0, kept": [old(request("POST", ADORN, BODY, connection="keep-alive"))],
    "HTTP/1.0, expecting": [old(request("POST", ADORN, BODY, expect="100-continue"))],
    "HTTP/2.0": [POST.replace(b"HTTP/1.1", b"HTTP/2.0")],
    "empty lines before": [b"\r\n\r\n" + POST],
    "no Host": [b"GET /health HTTP/1.1\r\n\r\n"],
    "expecting": [request("POST", ADORN, BODY, expect="100-continue")],
    "expecting, too large": [request("POST", ADORN, content_length="9999", expect="100-continue")],
    "expecting something else": [request("POST", ADORN, BODY, expect="200-maybe")],
    "compressed": [request("POST", ADORN, BODY, content_encoding="gzip")],
    "identity": [request("POST", ADORN, BODY, content_encoding="identity")],
    "too large": [request("POST", ADORN, bytes(5000))],
    "larger than any": [request("POST", ADORN, content_length=str(2**64 - 1))],
    "a chunked body": [CHUNKED + CHUNKS],
    "a chunked body and more": [CHUNKED + CHUNKS + POST],
    "a chunked body with a trailer": [CHUNKED + CHUNKS[:-2] + b"Authorization: x\r\n\r\n" + POST],
    "a chunked body of single bytes": [
        CHUNKED + b"".join(b"1\r\n%c\r\n" % byte for byte in BODY) + b"0\r\n\r\n"
    ],
    "a chunked body that is too large": [CHUNKED + b"1388\r\n" + bytes(5000) + b"\r\n0\r\n\r\n"],
    "an offer to upgrade": [UPGRADE],
    "an offer to upgrade and more": [UPGRADE + POST],
    "an offer of a websocket": [request("GET", ADORN, connection="Upgrade", upgrade="websocket") + POST],
    "pipelined": [POST * 20],
    "pipelined, all kinds": [
        POST + request("GET", "/nobody") + request("POST", ADORN, b"{") + request("HEAD", ADORN) + POST
    ],
    "pipelined behind the last": [request("POST", ADORN, BODY, connection="close") + POST * 3],
    "40 pipelined, more than aiohttp queues": [request("GET", "/health") * 40],
    "pipelined behind a body that is too large": [request("POST", ADORN, bytes(5000)) + POST],
    "two encodings": [request("POST", ADORN, transfer_encoding="gzip, chunked") + CHUNKS],
    "chunked HTTP/1.0": [old(CHUNKED) + CHUNKS],
    "an empty body": [request("POST", ADORN, b"")],
    "no body": [request("POST", ADORN)],
    "a body of GET": [request("GET", "/health", b"{}") + POST],
    "gzip": [request("POST", "/open", ZIPPED, **GZIP)],
    "gzip in chunks": [
        request("POST", "/open", transfer_encoding="chunked", **GZIP)
        + b"%x\r\n%b\r\n0\r\n\r\n" % (len(ZIPPED), ZIPPED)
    ],
    "gzip that is cut short": [request("POST", "/open", ZIPPED[:-3], **GZIP)],
    "gzip of too much": [request("POST", "/open", gzip.compress(bytes(5000)), **GZIP)],
    "gzip, and not": [request("POST", "/open", ZIPPED, **GZIP).replace(b"\r\n\r\n", b"\r\n" + BROTLI, 1)],
    "deflate": [request("POST", "/open", zlib.compress(b'{"type": "a"}'), content_encoding="deflate")],
    "brotli": [request("POST", "/open", BODY).replace(b"\r\n\r\n", b"\r\n" + BROTLI, 1)],
    "a handshake": [request("GET", "/open?echo=%C3%A9")],
    "a handshake by HEAD": [request("HEAD", "/open?echo=x")],
    "an empty reply": [request("POST", "/open", b'{"type": "a"}')],
    "a form": [request("POST", "/open", b"type=a", content_type="application/x-www-form-urlencoded")],
    "a worker": [request("POST", "/api/v1/workers/register", b'{"workerId":"w"}', **TOKEN)],
}
BADLY_FRAMED = {
    **{repr(raw[:60]): [raw] for raw in NO_HTTP},
    "garbage behind an event": [POST + b"GARBAGE\r\n\r\n"],
    "garbage behind 40 events": [POST * 40 + b"GARBAGE\r\n\r\n"],
    "garbage behind the last": [LAST + b"GARBAGE\r\n\r\n"],
    "garbage behind a chunked body": [CHUNKED + CHUNKS + b"GARBAGE\r\n\r\n"],
    "no chunk": [CHUNKED + b"zz\r\n{}\r\n"],
    "no chunk, later": [CHUNKED, b"2\r\n{}\r\n", b"zz\r\n"],
    "a chunk that is longer than it says": [CHUNKED, b"1\r\n{}\r\n"],
    "TLS": [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"],
    "lines that end in LF": [POST.replace(b"\r\n", b"\n")],
    "a space before the colon": [b"GET /health HTTP/1.1\r\nHost : a\r\n\r\n"],
    "a folded header": [b"GET /health HTTP/1.1\r\nHost: a\r\n b\r\n\r\n"],
    "an unknown encoding": [request("POST", ADORN, transfer_encoding="gzip") + CHUNKS],
}
SLOW = {
    "half a head": [POST[:30]],
    "half a body": [POST[:-3]],
    "half a chunked body": [CHUNKED + CHUNKS[:5]],
    "an event and half a head": [POST + POST[:30]],
    "nothing": [b""],
    "an event, then nothing": [POST],
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pair(tmp_path_factory):
    """Two relays that differ in their listener; both have short timeouts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("relay.ingest.connection.KEEPALIVE", 2.0)
        patch.setattr("relay.ingest.connection.FIRST_HEAD", 2.0)
        patch.setattr("relay.ingest.server.SWEEP_EVERY", 0.05)
        relays = []
        async with asyncio.timeout(300):
            for name in listeners.IMPLEMENTATIONS:
                patch.setattr(listeners, "current", name)
                folder = tmp_path_factory.mktemp(name)
                config = write_config(
                    folder, SOURCES.replace('"adorn"\n', '"adorn"\nmax_body = "4 KiB"\n'), CORS, OPEN
                )
                config.write_text(config.read_text().replace("[server]", '[server]\nbody_timeout = "2s"'))
                relays.append(running(config))
            patch.setattr(listeners, "current", "fast")
            async with relays[0] as fast, relays[1] as reference:
                assert (fast.app.listener, reference.app.listener) == listeners.IMPLEMENTATIONS
                yield fast, reference


async def hear(relay, pieces, *, closes_side):
    """Send these bytes and return everything until the relay closes."""
    heard = bytearray()

    async def read():  # read while sending, because a reset discards unread bytes
        with suppress(ConnectionError):
            while piece := await wire.reader.read(65_536):
                heard.extend(piece)

    async with asyncio.timeout(30), await Wire.open(relay.addresses.public) as wire:
        reading = asyncio.create_task(read())
        for piece in pieces:
            await wire.send(piece)
            await asyncio.sleep(0.02 if len(pieces) > 1 else 0)
        if closes_side:
            with suppress(OSError, RuntimeError):
                wire.writer.write_eof()
        await reading
    return bytes(heard)


def comparable(heard):
    """Return answers with their headers in order, without reasons, dates and the ids of events."""
    heard = re.sub(rb"\r\nDate: [^\r]+", b"", heard)
    heard = re.sub(rb"(?:evt_)?[0-9a-f]{8}-[0-9a-f-]{27}", b"ID", heard)
    answers = re.split(rb"(?=HTTP/1\.[01] \d{3} )", heard)
    shown = []
    for answer in answers:
        head, _, body = answer.partition(b"\r\n\r\n")
        first, *fields = head.split(b"\r\n")
        shown.append((first[:12], sorted(fields), body))
    return shown


async def compare(pair, pieces, *, closes_side=False):
    fast, reference = await asyncio.gather(*(hear(relay, pieces, closes_side=closes_side) for relay in pair))
    assert comparable(reference) == comparable(fast)
    return fast


@pytest.mark.parametrize("pieces", WELL_FRAMED.values(), ids=WELL_FRAMED)
async def test_a_request_gets_the_same_replies_from_both_listeners(pair, pieces):
    heard = await compare(pair, [*pieces[:-1], pieces[-1] + LAST])
    assert heard.startswith(b"HTTP/1.")


@pytest.mark.parametrize("pieces", BADLY_FRAMED.values(), ids=BADLY_FRAMED)
async def test_bytes_that_are_not_http_get_the_same_replies_from_both_listeners(pair, pieces):
    heard = await compare(pair, pieces)
    is_last = pieces[0].startswith((LAST, CHUNKED + CHUNKS))  # later bytes are not read
    assert b" 400 " in heard or is_last


async def test_a_slow_sender_gets_the_same_replies_from_both_listeners(pair):
    await asyncio.gather(*(compare(pair, pieces) for pieces in SLOW.values()))


@pytest.mark.parametrize(
    "name", ["an event", "a chunked body and more", "an offer to upgrade and more", "pipelined"]
)
async def test_a_sender_that_closes_its_side_anywhere_gets_the_same_replies(pair, name):
    [raw] = WELL_FRAMED[name]
    cuts = [*range(0, len(raw), max(1, len(raw) // 25)), len(raw)]
    await asyncio.gather(*(compare(pair, [raw[:cut]], closes_side=True) for cut in cuts))


@pytest.mark.parametrize("name", [*WELL_FRAMED])
async def test_segments_of_a_request_get_the_same_replies_from_both_listeners(pair, name):
    [raw] = WELL_FRAMED[name]
    raw += LAST
    size = max(1, len(raw) // 7)
    await compare(pair, [raw[at : at + size] for at in range(0, len(raw), size)])


@pytest.mark.parametrize("sample", read_samples(), ids=str)
async def test_a_recorded_request_gets_the_same_replies_from_both_listeners(pair, sample):
    await compare(pair, [sample.request + LAST])


async def test_an_event_whose_sender_hangs_up_at_once_is_stored_by_both(pair):
    for relay in pair:
        received = partial(relay.counted, "relay_events_received_total", source="adorn")
        before = received()
        for _ in range(20):
            async with await Wire.open(relay.addresses.public) as wire:
                await wire.send(POST)
                wire.writer.transport.abort()
        await until(lambda received=received, before=before: received() > before)
        await until(lambda relay=relay: not relay.app.ingest._budget.used)


# --- the choice ---------------------------------------------------------------------------------------


async def test_the_build_info_names_the_listener(pair):
    for relay, name in zip(pair, listeners.IMPLEMENTATIONS, strict=True):
        answer = await exchange(relay.addresses.socket, request("GET", "/metrics"))
        assert f'listener="{name}"'.encode() in answer.body


async def test_the_installed_aiohttp_is_in_the_tested_range():
    """After a failure: read the changes of aiohttp's parser, run the suite, and widen the range."""
    assert is_tested(version("aiohttp"))


@pytest.mark.parametrize(
    ("aiohttp", "used"),
    [
        ("3.14.3", "aiohttp"),
        (TESTED[0], "fast"),
        ("3.14.5", "fast"),
        ("3.14.99.post1", "fast"),
        ("3.15.0a1", "aiohttp"),
        (TESTED[1], "aiohttp"),
        ("3.16.2", "aiohttp"),
    ],
)
async def test_an_untested_aiohttp_gets_the_reference_listener_and_a_warning(aiohttp, used):
    found, warning = implementation_of("fast", aiohttp)
    assert found == used
    assert (f"aiohttp {aiohttp}" in warning) == (used != "fast")
    assert implementation_of("aiohttp", aiohttp) == ("aiohttp", "")


WITHOUT_PARSER = """
import sys
import aiohttp.http, aiohttp.web  # which needs the parser itself
del aiohttp.http.HttpRequestParser
import relay.app
from relay.ingest.server import Server
Server(None, implementation="aiohttp")
assert "relay.ingest.fast" not in sys.modules
"""


async def test_the_reference_listener_needs_nothing_of_the_fast_one():
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", WITHOUT_PARSER)
    assert await asyncio.wait_for(process.wait(), 30) == 0


async def test_with_an_untested_aiohttp_the_daemon_starts_with_one_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(implementation, "TESTED", ("3.13", "3.13.1"))
    config = write_config(tmp_path, SOURCES)
    [warning] = [each for each in load(config).config.warnings if "not tested with aiohttp" in each]
    async with running(config) as relay:
        assert relay.app.listener == "aiohttp"
        assert (await relay.exchange(POST)).status == 200
    assert [record.getMessage() for record in caplog.records].count(warning) == 1
