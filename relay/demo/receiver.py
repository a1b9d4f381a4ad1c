"""The demo's own receiver: checks every signature, and hands on what arrived."""

import asyncio
import time
from datetime import UTC, datetime
from typing import Self

import msgspec
from aiohttp import web

from relay.base.json_text import decode
from relay.config.secrets import Secret
from relay.process.sockets import bind, listen, url
from relay.signing import SignatureError, verify

LARGEST = 8 * 2**20  # bytes: the sources' 2 MiB, wrapped in an envelope


class Envelope(msgspec.Struct):
    """What the receiver reads of the standard format."""

    type: str
    timestamp: datetime  # when the relay received it
    subject: str | None = None


_envelope = msgspec.json.Decoder(Envelope)


class Arrival(msgspec.Struct, frozen=True, kw_only=True):
    """One delivery, as the receiver saw it."""

    type: str  # full type
    subject: str | None
    milliseconds: float  # from the relay's receipt
    problem: str | None  # what is wrong with the signature; None: it is valid


class Receiver:
    """Listens on a free loopback port while entered; says 204, or 401 to what is not signed well."""

    def __init__(self, secret: Secret) -> None:
        self.arrivals: asyncio.Queue[Arrival] = asyncio.Queue()
        self.url = ""  # known once entered
        self._secret = secret

    async def __aenter__(self) -> Self:
        app = web.Application(client_max_size=LARGEST)
        app.router.add_post("/", self._receive)
        sock = bind("127.0.0.1:0", "the receiver's port")
        self.url = url(sock)
        self._runner = await listen(app, sock, grace=1.0)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    async def _receive(self, request: web.Request) -> web.Response:
        body = await request.read()
        problem = None
        try:
            verify((self._secret,), request.headers, body, int(time.time()))
        except SignatureError as error:
            problem = str(error)
        envelope = decode(_envelope, body)
        waited = datetime.now(UTC) - envelope.timestamp
        self.arrivals.put_nowait(
            Arrival(
                type=envelope.type,
                subject=envelope.subject,
                milliseconds=waited.total_seconds() * 1000,
                problem=problem,
            )
        )
        return web.Response(status=401 if problem else 204)
