"""A well-behaved HTTP proxy on loopback; those that misbehave are receivers, asked as a proxy."""

import asyncio
from contextlib import suppress

from receivers import receiver
from yarl import URL

_HOP_BY_HOP = {"proxy-authorization", "connection"}


@receiver
async def forwards(peer):
    """Open tunnels, and hand on whole requests over connections of their own."""
    while True:
        request = await peer.request()
        method, target, _ = request.line.split(" ")
        if method == "CONNECT":
            host, _, port = target.rpartition(":")
            there = await asyncio.open_connection(host.strip("[]"), int(port))
            await peer.send(b"HTTP/1.1 200 Connection established\r\n\r\n")
            await _both_ways(peer, *there)
            return
        url = URL(target, encoded=True)
        reader, writer = await asyncio.open_connection(url.host, url.port)
        kept = [f"{name}: {value}" for name, value in request.headers.items() if name not in _HOP_BY_HOP]
        head = "\r\n".join([f"{method} {url.raw_path_qs} HTTP/1.1", *kept, "connection: close", "", ""])
        writer.write(head.encode() + request.body)
        answer = await reader.readuntil(b"\r\n\r\n")
        size = int(answer.lower().partition(b"content-length:")[2].split()[0])
        await peer.send(answer + await reader.readexactly(size))
        writer.close()


async def _both_ways(peer, reader, writer):
    async def pump(source, sink):
        with suppress(ConnectionError):
            while data := await source.read(65_536):
                sink.write(data)
                await sink.drain()
        sink.close()

    try:
        await asyncio.gather(pump(peer.reader, writer), pump(reader, peer.writer))
    finally:
        writer.close()
