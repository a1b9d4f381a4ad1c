"""A response has the same bytes as aiohttp's own, for every request, except for `Server`."""

import asyncio
import re

import pytest
from aiohttp import web

from relay.ingest.fast import FastConnection
from relay.ingest.replies import Response
from relay.ingest.server import Server

BODY = b'{"fine":true}'
LAST = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"


async def answers_to(request, make, serve):
    """Send a raw request to such a server and return everything it sends until it closes."""

    async def handle(_request):
        return make()

    server = await asyncio.get_running_loop().create_server(serve(handle), "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    try:
        writer.write(request)
        answer = await asyncio.wait_for(reader.read(), 2)
    finally:
        writer.close()
        await writer.wait_closed()
        server.close()
        await server.wait_closed()
    lines = re.sub(rb"Date: [^\r]+", b"Date: now", answer).split(b"\r\n")
    return sorted(line for line in lines if not line.startswith(b"Server: ") or serve is by_us)


def by_us(handle):
    server = Server(handle)
    return lambda: FastConnection(server)


def by_them(handle):
    return web.Server(handle, access_log=None)


def ours(status, headers, *, last):
    response = Response(status, BODY)
    response.headers.update(headers)
    if last:
        response.force_close()
    return response


def theirs(status, headers, *, last):
    response = web.Response(status=status, body=BODY, content_type="application/json")
    response.headers.update(headers)
    if last:
        response.force_close()
    return response


@pytest.mark.parametrize("status", [200, 201, 204, 304, 404, 422, 503, 599])
@pytest.mark.parametrize(
    "request_",
    [
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n{}" + LAST,
        LAST,
        b"GET / HTTP/1.0\r\n\r\n",
        b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n" + LAST,
        b"HEAD / HTTP/1.1\r\nHost: a\r\n\r\n" + LAST,
    ],
    ids=["kept", "closed", "1.0", "1.0 kept", "HEAD"],
)
async def test_a_reply_has_the_bytes_that_aiohttp_would_write(request_, status):
    found = await answers_to(request_, lambda: ours(status, {}, last=False), by_us)
    assert found == await answers_to(request_, lambda: theirs(status, {}, last=False), by_them)
    assert b" ".join(found).count(b"Date: now") == request_.count(b"\r\n\r\n")


@pytest.mark.parametrize("last", [False, True])
async def test_custom_headers_and_connection_close_are_written_like_aiohttp(last):
    request = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n" + (b"" if last else LAST)
    headers = {"retry-after": "7", "content-type": "text/plain"}
    found = await answers_to(request, lambda: ours(503, headers, last=last), by_us)
    assert found == await answers_to(request, lambda: theirs(503, headers, last=last), by_them)
    assert b"Connection: close" in found
    assert found.count(b"Retry-After: 7") + found.count(b"retry-after: 7") == (1 if last else 2)


def test_a_status_that_is_not_a_number_is_refused_at_once():
    with pytest.raises(ValueError, match="fine"):
        Response("fine", BODY)
