"""HTTP/1.1 by hand: a test sends exact bytes and reads responses strictly; and server-sent events."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

from aiohttp import ClientSession, ClientTimeout, UnixConnector

CONTINUE = 100


@dataclass(frozen=True)
class Answer:
    """A response."""

    status: int
    headers: dict[str, str]  # lower-case names
    body: bytes

    @property
    def json(self) -> Any:
        """Decode the body; its content type must be JSON."""
        assert self.headers["content-type"].partition(";")[0] == "application/json", self
        return json.loads(self.body)


class Wire:
    """One connection to a server."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def open(cls, url: str | Path) -> Self:
        """Connect to the server of an `http://` URL, or to a unix socket."""
        if isinstance(url, Path):
            return cls(*await asyncio.open_unix_connection(url, limit=2**20))
        parts = urlsplit(url)
        return cls(*await asyncio.open_connection(parts.hostname, parts.port, limit=2**20))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_) -> None:
        await self.hang_up()

    async def send(self, data: bytes) -> None:
        """Send data, no faster than the server reads; a server that closed its side may still respond."""
        with contextlib.suppress(ConnectionError):
            self.writer.write(data)
            await self.writer.drain()

    async def answer(self, *, bodiless: bool = False) -> Answer:
        """Read one response, whose head must give its length."""
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        line, *fields = head.rstrip("\r\n").split("\r\n")
        version, status, *_ = line.split(" ", 2)
        assert version.startswith("HTTP/"), line
        headers = {name.lower(): value.strip() for name, _, value in (f.partition(":") for f in fields)}
        silent = bodiless or status in ("100", "204")
        if silent:
            body = b""
        elif headers.get("transfer-encoding") == "chunked":
            body = b"".join([chunk async for chunk in self.chunks()])
        else:
            body = await self.reader.readexactly(int(headers["content-length"]))
        return Answer(int(status), headers, body)

    async def chunks(self) -> AsyncIterator[bytes]:
        """Read a chunked body."""
        while size := int(await self.reader.readuntil(b"\r\n"), 16):
            yield (await self.reader.readexactly(size + 2))[:-2]
        await self.reader.readexactly(2)

    async def closed(self) -> bool:
        """Wait until the server closes the connection; return False if it sends bytes instead."""
        try:
            return not await self.reader.read(1)
        except ConnectionError:
            return True

    async def hang_up(self) -> None:
        """Close at once, even if bytes are still to come."""
        self.writer.close()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()


async def exchange(url: str | Path, raw: bytes, *, bodiless: bool = False) -> Answer:
    """Send one request on a new connection and return the response."""
    async with asyncio.timeout(30), await Wire.open(url) as wire:
        sending = asyncio.create_task(wire.send(raw))  # the response may come before the end of the body
        try:
            while (answer := await wire.answer(bodiless=bodiless)).status == CONTINUE:
                pass
            return answer
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)


def request(method: str, path: str, body: bytes | None = None, **headers: str) -> bytes:
    """Render a request: `request("POST", "/v1/events", b"{}", x_event_type="a")`."""
    fields = {"host": "relay.test", **headers}
    if body is not None:
        fields = {"content_type": "application/json", "content_length": str(len(body)), **fields}
    lines = [f"{name.replace('_', '-').title()}: {value}" for name, value in fields.items()]
    head = "\r\n".join([f"{method} {path} HTTP/1.1", *lines, "", ""])
    return head.encode("utf-8", "surrogateescape") + (body or b"")


def raw_request(method: str, target: str, body: bytes, headers: Mapping[str, str]) -> bytes:
    """Render a request with its headers as they are."""
    fields = {"Host": "relay.test", "Content-Length": str(len(body)), **headers}
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"{method} {target} HTTP/1.1\r\n{head}\r\n".encode() + body


# --- server-sent events -------------------------------------------------------------------------------


class Reader:
    """A reader of one stream."""

    def __init__(self, response) -> None:
        self.response = response
        self.comments = []
        self.ids = []

    async def next(self, seconds=30.0):
        """Return the name and data of the next event, or None at the end of the stream."""
        name = data = None
        async with asyncio.timeout(seconds):
            async for raw in self.response.content:
                field, _, value = raw.decode().rstrip("\n").partition(": ")
                match field:
                    case "event":
                        name = value
                    case "data":
                        data = json.loads(value)
                    case "id":
                        self.ids.append(value)
                    case "" if value:
                        self.comments.append(value)
                    case "" if name:
                        return name, data
        return None

    async def rest(self, seconds=30.0):
        """Return all further events."""
        found = []
        while (item := await self.next(seconds)) is not None:
            found.append(item)
        return found


@asynccontextmanager
async def following(socket, path):
    """Open a stream on a unix socket, and wait for its head and first comment."""
    session = ClientSession(connector=UnixConnector(str(socket)), timeout=ClientTimeout(total=None))
    async with session, session.get(f"http://relay{path}") as response:
        assert response.status == 200, await response.text()
        reader = Reader(response)
        reader.comments.append((await response.content.readline()).decode().strip())
        yield reader
