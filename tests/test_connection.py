"""What a connection costs and how long it may idle; and that aiohttp inside is what was read."""

import asyncio
import hashlib
import inspect
import logging
import random
import socket

import pytest
from aiohttp.base_protocol import BaseProtocol
from aiohttp.web_protocol import RequestHandler
from aiohttp.web_server import Server as PlainServer
from support import until
from wire import Wire, request

from relay.ingest.response import Response
from relay.ingest.server import Server
from relay.listeners import address, bind, listen, url

READ = {
    BaseProtocol.connection_made: "30974740198dec40",
    RequestHandler.connection_made: "44d50b5763b2c7e4",
    RequestHandler.connection_lost: "df2fe6e95fd04c7c",
    RequestHandler.data_received: "1ee57ebe052e6c80",
    RequestHandler._resume_reading_if_drained: "27f2a6fbbb3a790e",
    RequestHandler.close: "84518f965e198ee3",
    RequestHandler.force_close: "38d0e1e798e4d3b7",
    RequestHandler.start: "2e565fd40c8e04fb",
    RequestHandler._handle_request: "a88a34ee65a2714c",
    RequestHandler.finish_response: "b7eb53db8f4b30ca",
    RequestHandler.shutdown: "5eb4bd473db61e84",
    PlainServer.connection_made: "c57094db35388e6d",
    PlainServer.connection_lost: "fff3ade6ffe866a8",
}
"""What `Connection` replaces of aiohttp, or leans on inside it, with the digest of its source.

Where one differs, aiohttp has changed it: compare it with relay/ingest/connection.py, then note the digest.
"""


class Site:
    """A server of ours with a handler of the test's."""

    def __init__(self):
        self.asked = asyncio.Event()
        self.open = asyncio.Event()
        self.open.set()
        self.reads = False  # bodies
        self.answer = None  # its path, unless the test has another

    async def __aenter__(self):
        self.sock = bind("127.0.0.1:0", "listen")
        self.server = Server(self.handle)
        self.runner = await listen(self.server, self.sock, grace=0.1)
        self.url = url(self.sock)
        return self

    async def __aexit__(self, *_):
        await self.runner.cleanup()

    async def handle(self, request):
        self.asked.set()
        await self.open.wait()
        if self.reads:
            await request.read()
        return self.answer or Response(200, request.raw_path.encode())


@pytest.fixture
async def site():
    async with asyncio.timeout(10), Site() as site:
        yield site


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr("relay.ingest.connection.KEEPALIVE", 0.02)
    monkeypatch.setattr("relay.ingest.server.SWEEP_EVERY", 0.01)


@pytest.mark.parametrize("inner", READ, ids=lambda inner: inner.__qualname__)
def test_aiohttp_inside_is_what_was_read(inner):
    digest = hashlib.sha256(inspect.getsource(inner).encode()).hexdigest()[:16]
    assert digest == READ[inner], f"{inner.__qualname__} has changed: see READ"


async def test_a_connection_that_idles_costs_no_task(site):
    async with await Wire.open(site.url) as unused, await Wire.open(site.url) as kept:
        await until(lambda: len(site.server.connections) == 2)
        before = asyncio.all_tasks()
        await kept.send(request("GET", "/once"))
        assert (await kept.answer()).body == b"/once"
        await until(lambda: asyncio.all_tasks() == before)
        await unused.send(request("GET", "/late"))
        assert (await unused.answer()).body == b"/late"


async def test_a_kept_connection_that_is_not_used_is_closed(site, impatient):
    async with await Wire.open(site.url) as kept:
        await kept.send(request("GET", "/"))
        assert (await kept.answer()).status == 200
        assert await kept.closed()
    await until(lambda: not site.server.connections)


async def test_a_connection_is_not_idle_while_its_request_is_under_way(site, impatient):
    site.open.clear()
    async with await Wire.open(site.url) as slow, await Wire.open(site.url) as idle:
        await slow.send(request("GET", "/slow"))
        await site.asked.wait()
        site.open.set()
        await idle.send(request("GET", "/"))
        assert (await idle.answer()).status == 200
        site.open.clear()
        await slow.send(request("GET", "/again"))
        assert (await slow.answer()).body == b"/slow"
        assert await idle.closed()
        site.open.set()
        assert (await slow.answer()).body == b"/again"


async def test_more_requests_than_aiohttp_queues_are_answered_in_their_order(site):
    paths = [f"/{number}" for number in range(100)]
    async with await Wire.open(site.url) as wire:
        await wire.send(b"".join(request("GET", path) for path in paths))
        assert [(await wire.answer()).body.decode() for _ in paths] == paths


async def test_more_bodies_than_aiohttp_queues_are_answered_in_whatever_pieces_they_come(site):
    site.reads = True
    dice = random.Random(4)  # with which some would wait for ever if bodies did not have the rest parsed
    sizes = [dice.choice((0, 1, 100, 3000, 70_000)) for _ in range(120)]
    raw = b"".join(request("POST", f"/{number}", bytes(size)) for number, size in enumerate(sizes))
    async with asyncio.timeout(10), await Wire.open(site.url) as wire, asyncio.TaskGroup() as group:

        async def send():
            at = 0
            while at < len(raw):
                size = dice.choice((1, 50, 1000, 65_536))
                await wire.send(raw[at : at + size])
                at += size
                await asyncio.sleep(0)

        group.create_task(send())
        for number in range(120):
            assert (await wire.answer()).body == f"/{number}".encode()


async def test_pipelined_requests_behind_the_last_one_are_not_begun(site):
    async with await Wire.open(site.url) as wire:
        site.server.leave()
        await wire.send(request("GET", "/last") + request("GET", "/more"))
        assert (await wire.answer()).body == b"/last"
        assert await wire.closed()


async def test_a_sender_that_hangs_up_while_it_is_answered_leaves_nothing_behind(site):
    site.open.clear()
    before = asyncio.all_tasks()
    async with await Wire.open(site.url) as wire:
        await wire.send(request("GET", "/") * 3)
        await site.asked.wait()
    site.open.set()
    await until(lambda: not site.server.connections and asyncio.all_tasks() == before)


@pytest.mark.parametrize("kept", ["close", "keep-alive"])
async def test_a_sender_of_a_body_that_nobody_reads_has_its_answer(site, monkeypatch, kept):
    monkeypatch.setattr("relay.ingest.connection.LINGERING", 10)
    body = bytes(16 * 2**20)  # more than the buffers on the way take: a reset would find it sending

    def send():
        with socket.create_connection(address(site.sock), timeout=10) as sender:
            sender.sendall(request("POST", "/refused", body, connection=kept))
            return sender.recv(1024)

    assert b"/refused" in await asyncio.to_thread(send)


async def test_a_sender_that_reads_no_answer_is_cut_off_and_the_answer_lost(site, impatient):
    lost = asyncio.Event()
    site.answer = Response(200, bytes(32 * 2**20))  # more than the buffers on the way take
    site.answer.lost = lost.set
    async with await Wire.open(site.url) as wire:
        await wire.send(request("GET", "/"))
        await asyncio.wait_for(lost.wait(), 10)
        await until(lambda: not site.server.connections)


async def test_a_sender_that_reads_not_even_the_last_answer_is_cut_off(site, impatient):
    site.answer = Response(200, bytes(32 * 2**20))
    async with await Wire.open(site.url) as wire:
        await wire.send(request("GET", "/", connection="close"))
        await site.asked.wait()
        await until(lambda: not site.server.connections)


async def test_a_failure_of_the_server_itself_is_logged_and_closes_the_connection(site, monkeypatch, caplog):
    async def fail(*_):
        raise RuntimeError("broken")

    monkeypatch.setattr(Response, "prepare", fail)
    caplog.set_level(logging.ERROR)
    async with await Wire.open(site.url) as wire:
        await wire.send(request("GET", "/"))
        assert await wire.closed()
    assert "a connection failed" in caplog.text
