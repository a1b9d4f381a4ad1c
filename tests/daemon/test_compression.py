"""Compressed bodies: accepted encodings, limits, and their effect on signatures and `raw` deliveries."""

import asyncio
import gzip
import hmac
import json
import time
import zlib

import pytest
import pytest_asyncio
from aiohttp import web
from daemons import Recorder, Relay, destination, running, write_config
from support import until
from wire import request

from relay.errors import Malformed, TooLarge
from relay.ingest.body import Budget
from relay.ingest.compression import BITE, decompress, pieces

PLUGIN = """
from relay.hookspecs import hookimpl
from relay.source import Accepted, Event, Secret, Source, route
import hashlib, hmac, msgspec

class Signed(Source, kind="zipped", owns=("/zipped",)):
    secrets: tuple[Secret, ...]

    def verify(self, incoming):
        incoming.hmac(self.secrets, "X-Signature")

    @route("POST", "/zipped")
    def post(self, incoming):
        body = incoming.decode(msgspec.Raw)
        return Accepted(event=Event(type="a", data=body), reply=lambda receipt: {"id": receipt.event_id})

@hookimpl
def relay_sources():
    return [Signed]
"""
CONFIG = """
[plugins]
dirs = ["plugins"]
[sources.zipped]
plugin = "zipped"
secrets = ["key"]
max_body = "64 KiB"
[sources.adorn]
plugin = "adorn"
"""
BODY = b'{"n": 45000.00, "text": "' + b"x" * 1000 + b'"}'


def zipped(body, level=9):
    """Compress without the time, so that test ids are the same in every process."""
    return gzip.compress(body, level, mtime=0)


def raw_deflate(body):
    machine = zlib.compressobj(wbits=-15)
    return machine.compress(body) + machine.flush()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def relay(tmp_path_factory, listener):
    folder = tmp_path_factory.mktemp("relay")
    (folder / "plugins").mkdir()
    (folder / "plugins" / "zipped.py").write_text(PLUGIN)
    async with running(write_config(folder, "", CONFIG)) as relay:
        yield relay


async def post(relay, sent, encoding, signed=None):
    signature = hmac.digest(b"key", sent if signed is None else signed, "sha256").hex()
    headers = {"x_signature": signature, "content_encoding": encoding}
    return await relay.exchange(request("POST", "/zipped", sent, **headers))


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    ("encoding", "sent"),
    [
        ("gzip", zipped(BODY)),
        ("x-gzip", zipped(BODY)),
        (" GZip ", zipped(BODY)),
        ("gzip", zipped(BODY[:9]) + zipped(BODY[9:])),
        ("deflate", zlib.compress(BODY)),
        ("deflate", raw_deflate(BODY)),
        ("identity", BODY),
    ],
)
async def test_a_compressed_body_is_stored_as_its_content(relay: Relay, encoding, sent):
    answer = await post(relay, sent, encoding)
    assert answer.status == 200, answer
    event = await relay.event(answer.json["id"])
    assert (event.body, event.data) == (BODY, BODY)


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    ("encoding", "sent", "status", "message"),
    [
        ("br", b"x", 415, "gzip or deflate"),
        ("zstd", b"x", 415, "gzip or deflate"),
        ("gzip, gzip", zipped(zipped(BODY)), 415, "gzip or deflate"),
        ("gzip", BODY, 400, "not valid gzip"),
        ("deflate", BODY, 400, "not valid deflate"),
        ("gzip", zipped(BODY)[:-9], 400, "gzip body is incomplete"),
        ("gzip", b"", 400, "gzip body is incomplete"),
        ("gzip", zipped(BODY)[:-6] + b"\0\0\0\0\0\0", 400, "not valid gzip"),
        ("gzip", zipped(BODY) + b"x", 400, "after the end"),
        ("gzip", zipped(b"") * 101, 400, "after the end"),
        ("deflate", zlib.compress(BODY) * 2, 400, "after the end"),
        ("gzip", zipped(b" " * 70_000), 413, ""),
        ("gzip", zipped(b"x" * 10_000_000), 413, ""),
    ],
)
async def test_an_odd_compressed_body_is_refused(relay: Relay, encoding, sent, status, message):
    answer = await post(relay, sent, encoding)
    assert answer.status == status
    assert message in answer.json["error"]["message"]
    assert (answer.headers.get("accept-encoding") == "gzip, deflate") is (status == 415)


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("second", ["gzip", "br"])
async def test_a_second_line_of_content_encoding_counts(relay: Relay, second):
    sent = zipped(BODY)
    signature = hmac.digest(b"key", sent, "sha256").hex()
    lines = f"X-Signature: {signature}\r\nContent-Encoding: identity\r\nContent-Encoding: {second}\r\n"
    head = f"POST /zipped HTTP/1.1\r\nHost: a\r\nContent-Length: {len(sent)}\r\n{lines}\r\n"
    assert (await relay.exchange(head.encode() + sent)).status == 415


@pytest.mark.asyncio(loop_scope="module")
async def test_a_signature_covers_the_compressed_bytes(relay: Relay):
    assert (await post(relay, zipped(BODY), "gzip", signed=BODY)).status == 401


async def test_a_raw_delivery_has_the_content_of_a_compressed_body(tmp_path):
    class Receiver(Recorder):
        async def _handle(self, request):
            self.arrived.append((dict(request.headers), await request.read()))
            return web.Response()

    text = b'{"type": "a",  "n": 45000.00}'
    async with Receiver() as receiver:
        config = write_config(
            tmp_path,
            '[sources.open]\nplugin = "generic"\npath = "/open"\nverify = "none"\ntype = "{body:type}"',
            destination("raw", receiver.url, 'format = "raw"'),
        )
        async with running(config) as relay:
            for encoding, sent in (("gzip", zipped(text)), ("deflate", zlib.compress(text))):
                headers = {"content_encoding": encoding, "content_type": "application/vnd.x+json"}
                answer = await relay.exchange(request("POST", "/open", sent, **headers))
                assert answer.status == 200
            await until(lambda: len(receiver.arrived) == 2)
    for headers, body in receiver.arrived:
        assert (body, headers["Content-Type"]) == (text, "application/vnd.x+json")
        assert "Content-Encoding" not in headers


@pytest.mark.asyncio(loop_scope="module")
async def test_a_byte_order_mark_is_named(relay: Relay):
    answer = await post(relay, b"\xef\xbb\xbf{}", "identity")
    assert (answer.status, answer.json["error"]["message"]) == (
        400,
        "The body is not valid JSON: it begins with a byte order mark",
    )


@pytest.mark.asyncio(loop_scope="module")
async def test_a_source_may_refuse_every_compressed_body(relay: Relay):
    answer = await relay.exchange(request("POST", "/v1/events", zipped(b"{}"), content_encoding="gzip"))
    assert answer.status == 415
    assert "accept-encoding" not in answer.headers


async def test_decompressing_lets_other_requests_run():
    budget, ticks = Budget(64 * 2**20), 0
    hold = budget.hold(lambda: ("198.51.100.1", True))

    async def tick():
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(tick())
    content = json.dumps([["text", n] for n in range(300_000)]).encode()
    sent = zlib.compress(content)
    began = time.thread_time()
    assert await decompress(sent, "deflate", 2 * len(content), hold) == content
    took = time.thread_time() - began
    task.cancel()
    assert ticks >= took / 0.01  # at least one turn of the loop in ten milliseconds
    assert budget.used == len(content)
    hold.release()
    assert budget.used == 0


def test_a_compression_bomb_is_decompressed_no_further_than_its_limit():
    sizes, bomb = [], zipped(b"\0" * 100_000_000, 1)
    with pytest.raises(TooLarge):
        sizes.extend(map(len, pieces(bomb, "gzip", 2**20)))
    assert sum(sizes) <= 2**20
    with pytest.raises(Malformed):
        list(pieces(zipped(b"") * 100_000, "gzip", 2**20))


def test_a_body_without_content_is_read_in_small_pieces():
    blocks = b"\x78\x01" + b"\x00\x00\x00\xff\xff" * 2**18  # stored blocks of no bytes
    found = pieces(blocks, "deflate", 2**20)
    for _ in range(len(blocks) // BITE):
        assert next(found) == b""
    with pytest.raises(Malformed, match="incomplete"):
        list(found)
