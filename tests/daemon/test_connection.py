"""Connections: their cost, their idle time, and the order of their requests."""

import asyncio
import contextlib
import gc
import json
import logging
import random
import signal
import socket
import struct
import sys
import time

import pytest
from aiohttp import web
from daemons import SOURCES, Daemon, adorn, running, write_config
from support import until
from wire import Wire, exchange, request

from relay.ingest.body import Budget, Patience, in_time, read_body
from relay.ingest.connection import CHUNKS, READ_AHEAD, SLICE, Connection
from relay.ingest.replies import Response
from relay.ingest.request import Request
from relay.ingest.server import Server
from relay.process.sockets import address, bind, url


class Site:
    """A listener with a handler that the test sets."""

    def __init__(self, listener):
        self.listener = listener
        self.asked = asyncio.Event()
        self.paths = []
        self.open = asyncio.Event()
        self.open.set()
        self.reads = False  # bodies
        self.answer = None  # its path, unless the test has another

    async def __aenter__(self):
        self.sock = bind("127.0.0.1:0", "listen")
        self.server = Server(self.handle, implementation=self.listener)
        await self.server.listen(self.sock)
        self.url = url(self.sock)
        return self

    async def __aexit__(self, *_):
        await self.server.close(grace=0.1)

    async def handle(self, request):
        self.asked.set()
        self.paths.append(request.target)
        await self.open.wait()
        if self.reads:
            await read_body(request, 2**20, Patience(5), Budget(2**20).hold(lambda: ("", True)))
        return self.answer or Response(200, request.target.encode())


@pytest.fixture
async def site(listener):
    async with asyncio.timeout(30), Site(listener) as site:
        yield site


@pytest.fixture
async def relay(tmp_path, listener):
    async with running(write_config(tmp_path, SOURCES)) as relay:
        yield relay


@pytest.fixture
async def complaints(caplog):
    """Return the log records, and the calls of the loop's exception handler."""
    found = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: found.append(context))
    caplog.set_level(logging.WARNING)
    return lambda: [*found, *(record.getMessage() for record in caplog.records)]


async def half_close(url, *pieces):
    """Send these bytes, close the sending side, and return everything until the server closes."""
    async with asyncio.timeout(30), await Wire.open(url) as wire:
        for piece in pieces:
            await wire.send(piece)
            await asyncio.sleep(0.01)
        wire.writer.write_eof()
        return await wire.reader.read()


def reset(wire):
    """Reset the connection, like a process that is killed with unread data."""
    sock = wire.writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    wire.writer.transport.abort()


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr("relay.ingest.connection.KEEPALIVE", 0.02)
    monkeypatch.setattr("relay.ingest.server.SWEEP_EVERY", 0.01)


async def test_the_fast_listener_has_no_task_for_an_idle_connection(site):
    async with await Wire.open(site.url) as unused, await Wire.open(site.url) as kept:
        await until(lambda: len(site.server.connections) == 2)
        before = asyncio.all_tasks()
        await kept.send(request("GET", "/once"))
        assert (await kept.answer()).body == b"/once"
        await until(lambda: asyncio.all_tasks() == before)
        await unused.send(request("GET", "/late"))
        assert (await unused.answer()).body == b"/late"


async def test_the_fast_listener_has_no_task_for_a_request_that_never_waits(site):
    site.answer, asked = Response(200, b"{}"), []

    async def handle(_request):
        asked.append(asyncio.current_task())
        return site.answer

    site.handle = handle
    site.server.handle = handle
    async with await Wire.open(site.url) as wire:
        await wire.send(request("POST", "/", b"{}"))
        await wire.answer()
        await wire.send(request("POST", "/", content_length="2"))
        await until(lambda: len(asked) == 2)
        await wire.send(b"{}")
        await wire.answer()
        site.server.under_way = 1
        await wire.send(request("POST", "/", b"{}"))
        await wire.answer()
    assert asked[0] is None
    assert asked[1] is not None  # as its body has to be waited for
    assert asked[2] is not None  # as others wait for their commit


async def test_a_closed_connection_leaves_nothing_to_the_garbage_collector(site):
    def left():
        return {id(each) for each in gc.get_objects() if isinstance(each, Connection | Request)}

    gc.collect()
    gc.disable()
    try:
        before = left()  # of other tests, whose loops were closed under them
        for kept in ("keep-alive", "close"):
            async with await Wire.open(site.url) as wire:
                await wire.send(request("POST", "/", b"{}", connection=kept))
                assert (await wire.answer()).status == 200
        await until(lambda: not site.server.connections)
        await until(lambda: left() <= before)
    finally:
        gc.enable()


async def test_an_idle_kept_connection_is_closed(site, impatient):
    async with await Wire.open(site.url) as kept:
        await kept.send(request("GET", "/"))
        assert (await kept.answer()).status == 200
        assert await kept.closed()
    await until(lambda: not site.server.connections)


async def test_with_many_open_connections_none_is_kept_after_its_reply(site, monkeypatch):
    """So idle connections never fill the cap."""
    monkeypatch.setattr("relay.ingest.connection.MOST_KEPT", 1)
    async with await Wire.open(site.url) as first:
        await first.send(request("GET", "/"))
        assert "connection" not in (await first.answer()).headers
        async with await Wire.open(site.url) as second:
            await second.send(request("GET", "/"))
            assert (await second.answer()).headers["connection"] == "close"
            assert await second.closed()
        await until(lambda: len(site.server.connections) == 1)
        await first.send(request("GET", "/"))
        assert "connection" not in (await first.answer()).headers


async def test_senders_that_hold_their_connections_do_not_block_others(site, monkeypatch):
    monkeypatch.setattr("relay.ingest.connection.MOST_KEPT", 4)
    site.server.max_connections = 8
    async with contextlib.AsyncExitStack() as held:
        for number in range(20):
            wire = await held.enter_async_context(await Wire.open(site.url))
            await wire.send(request("GET", f"/{number}"))
            assert (await wire.answer()).body == f"/{number}".encode()
        await until(lambda: len(site.server.connections) == 4)


async def test_at_the_limit_the_oldest_idle_connection_is_closed_for_a_new_one(site):
    """After no request, half a head, or an answered request."""
    site.server.max_connections, loop = 4, asyncio.get_running_loop()
    async with contextlib.AsyncExitStack() as opened:

        async def open_one():
            wire = await opened.enter_async_context(await Wire.open(site.url))
            await until(lambda: len(site.server.connections) == min(len(wires) + 1, 4))
            wires.append(wire)
            moment = loop.time()
            await until(lambda: loop.time() > moment)  # uvloop's clock ticks in milliseconds
            return wire

        wires = []
        answered = await open_one()
        await open_one()
        half = await open_one()
        await half.send(b"GET /half HTTP/1.1\r\n")
        await open_one()
        await answered.send(request("GET", "/"))
        assert (await answered.answer()).status == 200
        for gone in (1, 2, 3, 0):  # the first connection sent the latest request
            newest = await open_one()
            assert await wires[gone].closed()
            assert len(site.server.connections) == 4
            await newest.send(request("GET", "/new"))
            assert (await newest.answer()).body == b"/new"


async def test_at_the_limit_a_connection_with_a_request_in_progress_is_kept(site):
    site.server.max_connections = 2
    site.open.clear()
    async with contextlib.AsyncExitStack() as opened:
        busy = await opened.enter_async_context(await Wire.open(site.url))
        await busy.send(request("GET", "/busy"))
        await site.asked.wait()
        wires = [await opened.enter_async_context(await Wire.open(site.url)) for _ in range(5)]
        for silent in wires[:-1]:
            assert await silent.closed()
        site.open.set()
        assert (await busy.answer()).body == b"/busy"


async def test_a_request_beyond_the_limit_gets_an_immediate_reply(site, monkeypatch):
    monkeypatch.setattr("relay.ingest.server.TURNED_AWAY", 3)
    heard, site.server.max_connections = [], 1
    site.server._overhear = lambda request: heard.append(request.target)
    site.open.clear()
    async with contextlib.AsyncExitStack() as opened:
        busy = await opened.enter_async_context(await Wire.open(site.url))
        await busy.send(request("GET", "/busy"))
        await site.asked.wait()
        raws = [
            request("PUT", "/whole", b"{}"),
            request("PUT", "/head", content_length="100000"),
            b"no HTTP\r\n\r\n",
            request("PUT", "/unheard", b"{}"),
        ]
        for raw in raws:
            wire = await opened.enter_async_context(await Wire.open(site.url))
            await wire.send(raw)
            assert (await wire.answer()).status == 503
            assert await wire.closed()
        assert heard == ["/whole", "/head"]
        await until(lambda: not site.server._turned_away)  # each one is read for at most a second
        wire = await opened.enter_async_context(await Wire.open(site.url))
        await wire.send(request("PUT", "/later", b"{}") + request("PUT", "/behind", b"{}"))
        assert (await wire.answer()).status == 503
        await until(lambda: len(heard) == 3)
        site.open.set()
        assert (await busy.answer()).body == b"/busy"
    assert heard == ["/whole", "/head", "/later"]


async def test_a_flood_of_silent_connections_does_not_block_senders(site):
    site.server.max_connections = 100
    async with contextlib.AsyncExitStack() as held:
        for _ in range(500):
            await held.enter_async_context(await Wire.open(site.url))
        async with await Wire.open(site.url) as wire:
            await wire.send(request("GET", "/honest"))
            assert (await wire.answer()).body == b"/honest"
        assert len(site.server.connections) <= 100


async def test_a_connection_with_a_request_in_progress_is_not_idle(site, impatient):
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


async def test_more_requests_than_aiohttp_queues_are_answered_in_order(site):
    paths = [f"/{number}" for number in range(100)]
    async with await Wire.open(site.url) as wire:
        await wire.send(b"".join(request("GET", path) for path in paths))
        assert [(await wire.answer()).body.decode() for _ in paths] == paths


async def test_more_bodies_than_aiohttp_queues_are_answered_in_any_segmentation(site):
    site.reads = True
    dice = random.Random(4)  # without parsing on after a body, some bodies would never arrive
    sizes = [dice.choice((0, 1, 100, 3000, 70_000)) for _ in range(120)]
    raw = b"".join(request("POST", f"/{number}", bytes(size)) for number, size in enumerate(sizes))
    async with asyncio.timeout(30), await Wire.open(site.url) as wire, asyncio.TaskGroup() as group:

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


async def test_pipelined_requests_after_the_last_one_are_not_started(site):
    async with await Wire.open(site.url) as wire:
        site.server.leave()
        await wire.send(request("GET", "/last") + request("GET", "/more"))
        assert (await wire.answer()).body == b"/last"
        assert await wire.closed()
    assert site.paths == ["/last"]


async def test_a_sender_that_disconnects_during_its_reply_leaves_nothing_behind(site):
    site.open.clear()
    before = asyncio.all_tasks()
    async with await Wire.open(site.url) as wire:
        await wire.send(request("GET", "/") * 3)
        await site.asked.wait()
    site.open.set()
    await until(lambda: not site.server.connections and asyncio.all_tasks() == before)


@pytest.mark.parametrize("kept", ["close", "keep-alive"])
async def test_a_sender_of_an_unread_body_gets_its_reply(site, monkeypatch, kept):
    monkeypatch.setattr("relay.ingest.connection.LINGERING", 10)
    body = bytes(16 * 2**20)  # more than the buffers on the way take: a reset would find it sending

    def send():
        with socket.create_connection(address(site.sock), timeout=10) as sender:
            sender.sendall(request("POST", "/refused", body, connection=kept))
            return sender.recv(1024)

    assert b"/refused" in await asyncio.to_thread(send)


async def test_a_sender_that_does_not_read_is_disconnected_and_its_reply_counts_as_unheard(site, impatient):
    lost = asyncio.Event()
    site.answer = Response(200, bytes(32 * 2**20))  # more than the buffers on the way take
    site.answer.on_heard = lambda heard: heard or lost.set()
    async with await Wire.open(site.url) as wire:
        await wire.send(request("GET", "/"))
        await asyncio.wait_for(lost.wait(), 10)
        await until(lambda: not site.server.connections)


async def test_a_sender_that_does_not_read_the_last_reply_is_disconnected(site, impatient):
    site.answer = Response(200, bytes(32 * 2**20))
    async with await Wire.open(site.url) as wire:
        await wire.send(request("GET", "/", connection="close"))
        await site.asked.wait()
        await until(lambda: not site.server.connections)


async def test_a_failing_handler_is_a_500_without_details_and_closes_the_connection(
    site, monkeypatch, caplog
):
    caplog.set_level(logging.ERROR)
    site.answer = Response(200, b"{}")
    site.answer.headers["X"] = "\udcff"  # no bytes: rendering it fails
    async with await Wire.open(site.url) as wire:
        await wire.send(request("GET", "/") * 2)
        answer = await wire.answer()
        assert (answer.status, answer.json["error"]["code"]) == (500, "internal_error")
        assert await wire.closed()
    assert "a request could not be answered" in caplog.text


async def test_a_failure_of_the_connection_itself_is_logged_and_closes_it(site, monkeypatch, caplog):
    def fail(*_):
        raise RuntimeError("broken")

    monkeypatch.setattr(Response, "encode", fail)
    caplog.set_level(logging.ERROR)
    async with await Wire.open(site.url) as wire:
        await wire.send(request("GET", "/"))
        assert await wire.closed()
    assert "a connection failed" in caplog.text
    await until(lambda: not site.server.connections)


async def test_the_next_request_is_not_read_while_one_is_in_progress(site):
    """The relay stops reading; otherwise a fast sender would fill the memory."""
    site.open.clear()
    async with await Wire.open(site.url) as wire:
        await wire.send(request("GET", "/0"))
        await site.asked.wait()
        (connection,) = site.server.connections
        sending = asyncio.create_task(wire.send(b"".join(request("GET", f"/{n}") for n in range(1, 200_000))))
        await until(lambda: connection._unparsed)
        assert not (await asyncio.wait([sending], timeout=0.2))[0]
        assert len(connection._unparsed) <= 2 * READ_AHEAD
        site.open.set()
        for number in range(1000):
            assert (await wire.answer()).body == f"/{number}".encode()
            assert len(connection._unparsed) <= 2 * READ_AHEAD
        sending.cancel()
        wire.writer.transport.abort()  # a close would send the rest first


async def test_bodies_and_following_requests_in_one_segment_are_separated(site):
    site.reads = True
    async with await Wire.open(site.url) as wire:
        await wire.send(request("POST", "/a", b"{}") + request("POST", "/b", b"[1]") + request("GET", "/c"))
        assert [(await wire.answer()).body for _ in "abc"] == [b"/a", b"/b", b"/c"]


@pytest.mark.parametrize("size", [16_384, 16_385, 40_000])
async def test_a_body_of_very_many_chunks_is_read_completely(site, size):
    """The parser is asked to pause after many chunks, and pauses late."""
    site.reads = True
    for _ in range(2):
        async with asyncio.timeout(30), await Wire.open(site.url) as wire:
            head = request("POST", "/many", transfer_encoding="chunked")
            await wire.send(head + b"1\r\nx\r\n" * size + b"0\r\n\r\n")
            assert (await wire.answer()).body == b"/many"


TINY = b"1\r\nx\r\n"


@pytest.mark.parametrize(
    "wasteful",
    [
        TINY * 2_000_000,
        b"1;" + b"a" * 60 + b"\r\nx\r\n",
        b"0" * 100 + b"1\r\nx\r\n",
        b"1;" + b"a" * 8_000_000,
    ],
    ids=["one byte", "extensions", "zeros", "one extension"],
)
async def test_a_body_that_is_mostly_framing_is_refused(relay, wasteful):
    raw = request("POST", "/v1/events", transfer_encoding="chunked")
    wasteful *= max(1, 12_000_000 // len(wasteful))
    latest = [0.0]  # without the time in which other processes had the CPU

    async def tick():
        loop = asyncio.get_running_loop()
        while True:
            due, used = loop.time() + 0.005, time.thread_time()
            await asyncio.sleep(0.005)
            latest.append(min(loop.time() - due, time.thread_time() - used))

    ticking = asyncio.create_task(tick())
    answer = await exchange(relay.addresses.public, raw + wasteful)
    ticking.cancel()
    assert (answer.status, answer.json["message"]) == (400, "The chunks are too small")
    assert max(latest) < 1.0  # generous: this process sends, too
    assert relay.app.ingest._budget.used == 0


async def test_a_body_of_two_megabytes_in_small_chunks_is_read_completely(site):
    site.reads = True
    chunk = b"10\r\n" + b"x" * 16 + b"\r\n"
    head = request("POST", "/small", transfer_encoding="chunked")
    assert (await exchange(site.url, head + chunk * (2**20 // 16) + b"0\r\n\r\n")).body == b"/small"


async def test_chunks_are_parsed_in_slices_with_other_requests_in_between(site, monkeypatch):
    monkeypatch.setattr("relay.ingest.connection.TURN", 0.0)
    site.reads = True
    turns = []

    async def count():
        while True:
            turns.append(1)
            await asyncio.sleep(0)

    async with await Wire.open(site.url) as wire:
        await wire.send(request("POST", "/", transfer_encoding="chunked"))
        await site.asked.wait()
        (connection,) = site.server.connections
        counting = asyncio.create_task(count())
        connection.data_received(TINY * 10_000)  # as one piece from the socket
        assert len(connection._unparsed) >= len(TINY) * 10_000 - 2 * CHUNKS
        connection.data_received(b"0\r\n\r\n")
        before = len(turns)
        assert (await wire.answer()).body == b"/"
        counting.cancel()
    assert len(turns) - before >= len(TINY) * 10_000 // CHUNKS - 1


async def test_a_large_body_in_one_segment_with_head_and_next_request_is_read(site):
    site.reads = True
    bodies = [bytes(size) for size in (SLICE - 1, SLICE, SLICE + 1, 100_000, 700_000)]
    raw = b"".join(request("POST", f"/{len(body)}", body) for body in bodies)
    async with await Wire.open(site.url) as wire:
        sending = asyncio.create_task(wire.send(raw))
        for body in bodies:
            assert (await wire.answer()).body == b"/%d" % len(body)
        await sending


async def test_pipelined_requests_do_not_delay_commits(site, monkeypatch):
    committing = [True]
    monkeypatch.setattr("relay.ingest.connection.YIELDING", (0.01,) * 1000)
    site.server.is_committing = lambda: bool(committing)
    async with await Wire.open(site.url) as hasty, await Wire.open(site.url) as patient:
        await hasty.send(request("GET", "/a") + request("GET", "/b") + request("GET", "/c"))
        assert (await hasty.answer()).body == b"/a"
        await patient.send(request("GET", "/d"))
        assert (await patient.answer()).body == b"/d"
        assert site.paths == ["/a", "/d"]
        committing.clear()
        assert [(await hasty.answer()).body for _ in "bc"] == [b"/b", b"/c"]


async def test_a_pipelined_request_is_answered_despite_a_busy_database(site):
    site.server.is_committing = lambda: True
    async with await Wire.open(site.url) as wire:
        await wire.send(request("GET", "/") * 20)
        for _ in range(20):
            assert (await wire.answer()).status == 200


async def test_closing_does_not_wait_for_a_waiting_pipelined_request(site, monkeypatch):
    monkeypatch.setattr("relay.ingest.connection.YIELDING", (100.0,))
    site.server.is_committing = lambda: True
    async with await Wire.open(site.url) as wire:
        await wire.send(request("GET", "/") * 2)
        assert (await wire.answer()).status == 200
        await site.server.close(grace=0.01)
        assert await wire.closed()
    await until(lambda: not site.server.connections)


async def test_no_trailer_becomes_a_header_of_the_next_request(site):
    """The parser would do that; behind a shared proxy, it would reach another sender's request."""
    site.reads = True
    async with await Wire.open(site.url) as wire:
        chunked = (
            request("POST", "/a", transfer_encoding="chunked") + b"2\r\n{}\r\n0\r\nAuthorization: x\r\n\r\n"
        )
        await wire.send(chunked + request("GET", "/b"))
        answer = await wire.answer()
        assert (answer.body, answer.headers["connection"]) == (b"/a", "close")
        assert await wire.closed()
    assert site.paths == ["/a"]


async def test_a_sender_that_does_not_read_is_disconnected_at_the_stop(site, caplog):
    site.answer, lost = Response(200, bytes(32 * 2**20)), []
    site.answer.on_heard = lambda heard: lost.append(not heard)
    async with await Wire.open(site.url) as wire:
        await wire.send(request("GET", "/"))
        await site.asked.wait()
        await until(lambda: [each for each in site.server.connections if each._unread is not None])
        await site.server.close(grace=0.01)
        assert lost == [True]
        await until(lambda: not site.server.connections)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.mark.parametrize("upgrade", ["h2c", "websocket"])
async def test_an_offer_to_upgrade_is_the_last_request_of_its_connection(site, upgrade):
    """The parser loses the bytes after an offer: a body could be taken for a request."""
    offer = request("POST", "/offer", b"{}", connection="Upgrade", upgrade=upgrade)
    inner = request("GET", "/smuggled")
    async with await Wire.open(site.url) as wire:
        await wire.send(offer + request("POST", "/next", inner))
        answer = await wire.answer()
        assert (answer.body, answer.headers["connection"]) == (b"/offer", "close")
        assert await wire.closed()
    assert site.paths == ["/offer"]


@pytest.mark.parametrize("head", [b"CONNECT \n", b"GET / HTTP/2.0\r\n", b"GET /\r\n"])
async def test_other_http_versions_than_1_0_and_1_1_are_refused(site, head):
    async with await Wire.open(site.url) as wire:
        await wire.send(head + b"Host: a\r\n\r\n")
        assert (await wire.answer()).status == 400
        assert await wire.closed()
    assert site.paths == []


async def test_http_1_0_gets_no_100_continue(site):
    """HTTP/1.0 does not have that response (RFC 9110, 10.1.1)."""
    site.reads = True
    head = request("POST", "/old", content_length="2", expect="100-continue").replace(
        b"HTTP/1.1", b"HTTP/1.0"
    )
    async with await Wire.open(site.url) as wire:
        await wire.send(head.replace(b"HTTP/1.1", b"HTTP/1.0"))
        await site.asked.wait()
        await wire.send(b"{}")
        assert (await wire.answer()).status == 200


async def test_the_last_reply_arrives_despite_further_bytes(site):
    site.open.clear()

    def send():
        with socket.create_connection(address(site.sock), timeout=10) as sender:
            sender.sendall(request("GET", "/last", connection="close") + request("GET", "/more") * 1000)
            loop.call_soon_threadsafe(site.open.set)
            return b"".join(iter(lambda: sender.recv(65_536), b""))  # a reset would be an error

    loop = asyncio.get_running_loop()
    assert (await asyncio.to_thread(send)).endswith(b"/last")
    await until(lambda: not site.server.connections)
    assert site.paths == ["/last"]


async def test_a_request_cancelled_by_its_handler_closes_the_connection(site):
    async def cancel(_request):
        await asyncio.sleep(0)
        raise asyncio.CancelledError

    site.server.handle = cancel
    async with await Wire.open(site.url) as wire:
        await wire.send(request("GET", "/"))
        assert await wire.closed()
    await until(lambda: not site.server.connections)


async def test_a_body_in_progress_is_read_while_the_server_closes(site):
    site.reads = True
    async with await Wire.open(site.url) as wire:
        await wire.send(request("POST", "/", content_length="2") + b"{")
        await site.asked.wait()
        closing = asyncio.create_task(site.server.close(grace=5))
        await asyncio.sleep(0)
        await wire.send(b"}" + request("GET", "/more"))
        assert (await wire.answer()).status == 200
        assert await wire.closed()
        await closing
    assert site.paths == ["/"]


# --- senders that close their own side ----------------------------------------------------------------


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize(
    "pieces",
    [
        [request("GET", "/a")],
        [request("GET", "/a", connection="close")],
        [request("POST", "/a", b"{}")],
        [request("POST", "/a", b"{}")[:-2], b"{", b"}"],
        [request("POST", "/a", transfer_encoding="chunked") + b"2\r\n{}\r\n0\r\n\r\n"],
        [request("POST", "/a", bytes(2**20))],
        [request("POST", "/a", b"{}").replace(b"HTTP/1.1", b"HTTP/1.0")],
    ],
)
async def test_a_sender_that_closes_its_side_gets_its_reply(site, pieces, waits):
    site.reads = True
    fate = []
    site.answer = Response(200, b"the answer")
    site.answer.on_heard = fate.append
    if waits:
        site.open.clear()
        asyncio.get_running_loop().call_later(0.1, site.open.set)
    assert (await half_close(site.url, *pieces)).endswith(b"the answer")
    assert fate == [True]
    await until(lambda: not site.server.connections)


@pytest.mark.parametrize("waits", [False, True])
async def test_a_sender_that_closes_its_side_gets_the_replies_to_all_requests(site, waits):
    site.reads = True
    if waits:
        site.open.clear()
        asyncio.get_running_loop().call_later(0.1, site.open.set)
    asked = [request("GET", "/a"), request("POST", "/b", b"{}"), request("POST", "/c", bytes(70_000))]
    answered = await half_close(site.url, b"".join(asked))
    assert [answered.count(path) for path in (b"/a", b"/b", b"/c")] == [1, 1, 1]
    assert site.paths == ["/a", "/b", "/c"]
    await until(lambda: not site.server.connections)


async def test_requests_are_answered_in_order_although_the_parser_pauses_after_each_slice(site, monkeypatch):
    start = web.RequestHandler.start

    async def start_late(handler):
        await asyncio.sleep(0.05)
        await start(handler)

    monkeypatch.setattr(web.RequestHandler, "start", start_late)
    monkeypatch.setattr("relay.ingest.connection.TURN", -1.0)
    site.reads = True
    site.open.clear()
    asyncio.get_running_loop().call_later(0.1, site.open.set)  # after the sender has closed its side
    asked = [request("GET", "/a"), request("POST", "/b", b"{}"), request("POST", "/c", bytes(70_000))]
    answered = await half_close(site.url, b"".join(asked))
    assert [answered.count(path) for path in (b"/a", b"/b", b"/c")] == [1, 1, 1]
    assert site.paths == ["/a", "/b", "/c"]


async def test_a_large_reply_reaches_a_sender_that_closed_its_side(site):
    site.answer = Response(200, bytes(8 * 2**20))
    assert len(await half_close(site.url, request("GET", "/"))) > 8 * 2**20


@pytest.mark.parametrize("ending", ["close", "reset"])
@pytest.mark.parametrize("behind", [b"", request("GET", "/more")])
async def test_a_reply_to_a_disconnected_sender_is_unheard(site, ending, behind):
    site.open.clear()
    fate = []
    site.answer = Response(200, b"{}")
    site.answer.on_heard = fate.append
    wire = await Wire.open(site.url)
    await wire.send(request("GET", "/") + behind)
    await site.asked.wait()
    if ending == "reset":
        reset(wire)
    await wire.hang_up()
    await asyncio.sleep(0.05)
    site.open.set()
    await until(lambda: not site.server.connections)
    assert fate == [False]


@pytest.mark.parametrize("cut", [b"", b"GET", b"GET / HTTP/1.1\r\nHost: a\r\n"])
async def test_a_sender_that_closes_its_side_within_a_head_is_disconnected(site, cut):
    assert await half_close(site.url, cut) == b""
    await until(lambda: not site.server.connections)


@pytest.mark.parametrize(
    "cut",
    [
        [request("POST", "/v1/events", content_length="9") + b"{"],
        [request("POST", "/v1/events", content_length="9"), b"{"],
        [request("POST", "/v1/events", transfer_encoding="chunked") + b"2\r\n{"],
        [request("GET", "/health") + request("POST", "/v1/events", content_length="9") + b"{"],
    ],
)
async def test_a_sender_that_closes_its_side_within_a_body_gets_an_error(relay, cut):
    answered = await half_close(relay.addresses.public, *cut)
    head, _, body = answered.rpartition(b"\r\n\r\n")
    assert b" 400 " in head
    assert json.loads(body)["status"] == "error"
    assert await relay.rows() == []


@pytest.fixture
async def slow_store(relay, monkeypatch):
    """Make appends wait until the test releases them; yields the number that wait."""
    append, gate = relay.app.store.events.append, asyncio.Event()

    async def slowly(acceptance):
        gate.waiting += 1
        await gate.wait()
        return await append(acceptance)

    gate.waiting = 0
    monkeypatch.setattr(relay.app.store.events, "append", slowly)
    return gate


async def test_identical_posts_of_a_sender_that_closes_its_side_are_separate_events(relay, slow_store):
    raw = request("POST", "/v1/events", adorn("half"))
    for number in range(3):
        sending = asyncio.create_task(half_close(relay.addresses.public, raw))
        await until(lambda number=number: slow_store.waiting == number + 1)
        await until(lambda: all(each.gone() for each in relay.app.ingest._unheard_replies._open.values()))
        slow_store.set()
        assert b" 200 " in await sending
        slow_store.clear()
    slow_store.set()
    await asyncio.gather(*(half_close(relay.addresses.public, raw) for _ in range(3)))
    rows = await relay.rows(subject="half")
    assert (len(rows), [row["duplicate"] for row in rows]) == (6, [False] * 6)
    assert relay.app.ingest._unheard_replies._open == {}


@pytest.mark.parametrize("ending", ["close", "reset"])
async def test_a_repetition_is_distinguished_from_a_second_equal_request(relay, slow_store, ending):
    """It waits until the relay knows whether the first answer arrived."""
    raw = request("POST", "/v1/events", adorn("gone"))
    wire = await Wire.open(relay.addresses.public)
    await wire.send(raw)
    await until(lambda: slow_store.waiting)
    if ending == "reset":
        reset(wire)
    await wire.hang_up()
    await until(lambda: all(each.gone() for each in relay.app.ingest._unheard_replies._open.values()))
    repeating = asyncio.create_task(exchange(relay.addresses.public, raw))
    await until(lambda: any(each.receipt for each in relay.app.ingest._unheard_replies._open.values()))
    slow_store.set()
    answer = await repeating
    [row] = await relay.rows(subject="gone")
    assert (answer.status, answer.json["event_id"], row["duplicate"]) == (200, row["id"], True)


async def test_repetitions_of_repetitions_are_one_event(relay, slow_store, monkeypatch):
    """A sender that gives up three times while the disk hangs has sent one event."""
    echoes, first, lose = (
        relay.app.ingest._unheard_replies,
        relay.app.ingest._unheard_replies.first,
        Connection.connection_lost,
    )
    asked, lost = [], []

    async def ask(mark):
        asked.append(mark)
        return await first(mark)

    monkeypatch.setattr(echoes, "first", ask)
    monkeypatch.setattr(
        Connection, "connection_lost", lambda self, error: (lose(self, error), lost.append(1))
    )
    raw = request("POST", "/v1/events", adorn("gone"))
    for number in range(1, 4):
        wire = await Wire.open(relay.addresses.public)
        await wire.send(raw)
        await until(lambda number=number: len(asked) == number)
        reset(wire)
        await wire.hang_up()
        await until(lambda number=number: len(lost) == number)
    last = asyncio.create_task(exchange(relay.addresses.public, raw))
    await until(lambda: len(asked) == 4)
    slow_store.set()
    answer = await last
    [row] = await relay.rows(subject="gone")
    assert (answer.status, answer.json["event_id"], row["duplicate"]) == (200, row["id"], True)
    assert echoes._open == {}
    again = await exchange(relay.addresses.public, raw)  # the answer has arrived, so this is a new event
    assert again.json["event_id"] != row["id"]


# --- a suspended relay --------------------------------------------------------------------------------


IMPATIENT = """
import sys
if {asyncio}:
    sys.modules["uvloop"] = None
from relay.ingest import connection
connection.KEEPALIVE = connection.FIRST_HEAD = connection.LINGERING = 0.5
from relay.cli import main
main()
"""
FREEZE = 1.5  # seconds, three times as long as anything may take


@pytest.fixture
async def frozen(tmp_path, listener):
    """A daemon with short timeouts on the test's kind of loop; calling it suspends it during a block."""
    is_asyncio = "uvloop" not in type(asyncio.get_running_loop()).__module__
    script = IMPATIENT.format(asyncio=is_asyncio)
    config = write_config(tmp_path, SOURCES)
    config.write_text(config.read_text().replace("[server]", '[server]\nbody_timeout = "500ms"'))
    async with Daemon(config, (sys.executable, "-c", script, "serve")) as daemon:

        @contextlib.asynccontextmanager
        async def frozen():
            daemon.process.send_signal(signal.SIGSTOP)
            try:
                yield
                await asyncio.sleep(FREEZE)
            finally:
                daemon.process.send_signal(signal.SIGCONT)

        frozen.url = daemon.url
        yield frozen


@pytest.mark.parametrize("used", [False, True])
async def test_a_request_that_arrived_while_the_process_stood_still_is_answered(frozen, used):
    raw = request("POST", "/v1/events", adorn("thawed"))
    async with asyncio.timeout(20), contextlib.AsyncExitStack() as stack:
        wires = [await stack.enter_async_context(await Wire.open(frozen.url)) for _ in range(10)]
        if used:
            for wire in wires:
                await wire.send(raw)
                assert (await wire.answer()).status == 200
        async with frozen():
            for wire in wires:
                await wire.send(raw)
        for wire in wires:
            assert (await wire.answer()).status == 200


async def test_a_body_that_arrived_while_the_process_stood_still_is_in_time(frozen):
    body = adorn("late body")
    async with asyncio.timeout(20), contextlib.AsyncExitStack() as stack:
        wires = [await stack.enter_async_context(await Wire.open(frozen.url)) for _ in range(10)]
        for wire in wires:
            await wire.send(request("POST", "/v1/events", body, expect="100-continue")[: -len(body)])
            assert (await wire.answer()).status == 100
        async with frozen():
            for wire in wires:
                await wire.send(body)
        for wire in wires:
            assert (await wire.answer()).status == 200


async def test_the_rest_of_a_refused_body_after_a_standstill_does_not_lose_the_reply(frozen):
    length = 3 * 2**20
    async with asyncio.timeout(20), await Wire.open(frozen.url) as wire:
        await wire.send(request("POST", "/v1/events", content_length=str(length), connection="close"))
        await wire.send(bytes(2**20))
        async with frozen():
            sending = asyncio.create_task(wire.send(bytes(length - 2**20)))
            await asyncio.sleep(0)
        assert (await wire.answer()).status == 413
        await sending
        assert await wire.closed()


async def test_a_standstill_does_not_keep_silent_connections_open(frozen):
    async with asyncio.timeout(20), await Wire.open(frozen.url) as idle, await Wire.open(frozen.url) as slow:
        await slow.send(b"GET / HTTP/1.1\r\n")
        async with frozen():
            await slow.send(b"Host: a\r\n")
        assert await idle.closed()
        assert await slow.closed()


async def test_a_sender_that_never_finishes_its_head_is_disconnected(site, impatient, monkeypatch):
    monkeypatch.setattr("relay.ingest.connection.FIRST_HEAD", 0.02)
    monkeypatch.setattr(Connection, "has_unread", True)
    async with await Wire.open(site.url) as wire:
        await wire.send(b"GET / HTTP/1.1\r\n")
        assert await wire.closed()


async def test_a_deadline_applies_while_the_event_loop_runs():
    async def read():
        await asyncio.sleep(10)

    for unread in (True, False):
        began = asyncio.get_running_loop().time()
        with pytest.raises(TimeoutError):
            await in_time(0.05, read, lambda unread=unread: unread)
        assert asyncio.get_running_loop().time() - began < 5


# --- senders that disconnect at the wrong moment ------------------------------------------------------


@pytest.mark.parametrize("ending", ["close", "reset"])
@pytest.mark.parametrize("size", [2, 30_000, 200_000, 8_000_000])
async def test_a_sender_gone_before_the_last_reply_causes_no_traceback(site, complaints, ending, size):
    """The sender's system answers the reply with a reset, before the relay's side is closed."""
    site.answer = Response(200, bytes(size))
    for _ in range(5):
        site.open.clear()
        site.asked.clear()
        wire = await Wire.open(site.url)
        await wire.send(request("GET", "/last", connection="close"))
        await site.asked.wait()
        (connection,) = site.server.connections
        await wire.send(request("GET", "/more"))
        await until(lambda connection=connection: connection._unparsed)
        if ending == "reset":
            reset(wire)
        await wire.hang_up()
        site.open.set()
        await until(lambda: not site.server.connections)
    gc.collect()
    assert complaints() == []


@pytest.mark.parametrize("ending", ["close", "reset"])
async def test_invalid_bytes_and_a_disconnect_cause_no_traceback(site, complaints, ending):
    for _ in range(20):
        wire = await Wire.open(site.url)
        await wire.send(b"no request\r\n\r\n")
        if ending == "reset":
            reset(wire)
        await wire.hang_up()
    await until(lambda: not site.server.connections)
    assert complaints() == []


async def test_a_sender_that_reads_the_last_reply_slowly_gets_all_of_it(site):
    site.answer = Response(200, bytes(4 * 2**20))

    def send():
        with socket.create_connection(address(site.sock), timeout=10) as sender:
            sender.sendall(request("GET", "/last", connection="close") * 3)
            return len(b"".join(iter(lambda: sender.recv(65_536), b"")))

    assert await asyncio.to_thread(send) > 4 * 2**20
    await until(lambda: not site.server.connections)


@pytest.mark.parametrize(
    "sent",
    [
        request("POST", "/v1/events", content_length="9") + b"{",
        request("POST", "/v1/events", transfer_encoding="chunked") + b"2\r\n{",
        request("POST", "/v1/events", content_length="9", expect="100-continue"),
        request("POST", "/v1/events", content_length="300000") + bytes(100_000),
    ],
)
async def test_a_reset_within_a_body_logs_one_line_with_the_address(relay, caplog, sent):
    caplog.set_level(logging.INFO)
    wire = await Wire.open(relay.addresses.public)
    await wire.send(sent)
    if b"Expect" in sent:
        await wire.reader.readuntil(b"\r\n\r\n")
    else:
        await until(lambda: relay.app.ingest._budget.used)
    reset(wire)
    await wire.hang_up()
    await until(lambda: relay.counted("relay_events_rejected_total", source="adorn", reason="malformed"))
    [line] = [record for record in caplog.records if record.name.startswith("relay.ingest")]
    assert line.getMessage().endswith("The body was cut short (127.0.0.1)")
    assert [record for record in caplog.records if record.levelno > logging.INFO] == []


@pytest.mark.parametrize("size", [SLICE, SLICE + 1, 2**17, 2**23])
@pytest.mark.parametrize(
    "bad", [b"GARBAGE\r\n\r\n", request("POST", "/", transfer_encoding="chunked") + b"zz\r\n"]
)
async def test_a_sender_gets_the_error_despite_further_bytes(site, bad, size):
    """Unread bytes would reset the connection, and the answer would be lost."""
    site.reads = True
    async with await Wire.open(site.url) as wire:
        await wire.send(bad)
        await until(lambda: [each for each in site.server.connections if each._is_ending])
        for _ in range(0, size, 2**16):
            await wire.send(bytes(min(size, 2**16)))
        wire.writer.write_eof()
        assert (await wire.answer()).status in (400, 500)
        assert await wire.closed()


async def test_a_reset_at_any_point_causes_no_traceback(tmp_path, listener):
    """With uvloop, a closed connection has no address."""
    is_asyncio = "uvloop" not in type(asyncio.get_running_loop()).__module__
    hidden = f"import sys; sys.modules.update({'uvloop=None' if is_asyncio else ''}); "
    command = (sys.executable, "-c", hidden + "from relay.cli import main; main()", "serve")
    raw = request("POST", "/v1/events", adorn("reset", payload={"x": "y" * 300_000}))
    async with Daemon(write_config(tmp_path, SOURCES), command) as daemon:
        for sent in (*range(0, 400, 13), *range(100_000, len(raw) + 1, 20_000), len(raw)):
            for ending in ("reset", "close", "half-close"):
                wire = await Wire.open(daemon.url)
                await wire.send(raw[:sent])
                if ending == "half-close" and not wire.writer.transport.is_closing():
                    wire.writer.write_eof()
                if ending != "close":
                    reset(wire)
                await wire.hang_up()
        assert (await exchange(daemon.url, request("GET", "/health"))).status == 200
        assert await daemon.stop() == 0
    logged = [json.loads(line) for line in daemon.lines]
    assert any("The body was cut short" in line["message"] for line in logged)
    assert [line for line in logged if line["level"] == "error" or "exception" in line] == []


@pytest.mark.parametrize("waits", [False, True])
async def test_a_handler_that_calls_exit_fails_only_its_own_request(site, waits):
    async def leave(_request):
        if waits:
            await asyncio.sleep(0)
        raise SystemExit(3)

    site.server.handle = leave
    async with await Wire.open(site.url) as wire:
        await wire.send(request("GET", "/"))
        assert (await wire.answer()).status == 500
    site.server.handle = site.handle
    async with await Wire.open(site.url) as wire:
        await wire.send(request("GET", "/"))
        assert (await wire.answer()).status == 200
