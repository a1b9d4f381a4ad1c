"""The reference listener: aiohttp's own server reads requests, and the relay answers them.

It uses the public classes of `aiohttp.web`, so that it works with every aiohttp 3.x. It costs more CPU than
the fast listener. Both give the same answers: `tests/daemon/test_listeners.py` compares them.
"""

import asyncio
import re
from typing import Any, cast

from aiohttp import HttpVersion10, HttpVersion11, StreamReader, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http import HttpProcessingError, RawRequestMessage
from yarl import URL

from relay.ingest.connection import READ_AHEAD, Connection, Owner, Parsed
from relay.ingest.request import Request, VersionError

_HEAD_END = b"\r\n\r\n"
_NOTHING: Parsed = ((), False, b"")
_CHUNKED = re.compile(rb"\r\ntransfer-encoding[ \t]*:", re.IGNORECASE)
_ROOT = URL("/")


class ReferenceConnection(Connection):
    """A connection whose requests are read by `aiohttp.web.Server`.

    aiohttp's server queues requests, and an error among them hides the requests before the error in the same
    bytes. So the server gets one head at a time, and the next one after it has called the handler.
    """

    __slots__ = (
        "_aiohttp",
        "_awaits_call",
        "_gone",
        "_head",
        "_head_text",
        "_held",
        "_is_feeding",
        "_is_late",
    )

    def __init__(self, owner: Owner) -> None:
        super().__init__(owner)
        self._parser = self
        self._aiohttp: _Protocol | None = None
        self._head: RawRequestMessage | None = None  # of the request that aiohttp calls the handler for
        self._head_text = bytearray()  # of an unfinished head
        self._is_feeding = False  # aiohttp's parser is running
        self._awaits_call = False  # a head was parsed, and aiohttp has not called the handler yet
        self._is_late = False  # the current head was sent before the last answer
        self._gone: asyncio.Transport | None = None  # lost after the head, before the handler's call
        self._held = b""  # bytes that wait for the handler's call, or for the next request's turn

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `Connection.connection_made`."""
        server = web.Server(self._handle, request_factory=self._note_head)
        self._aiohttp = _Protocol(
            server,
            loop=self._loop,
            access_log=None,  # type: ignore[arg-type] # None turns it off
            auto_decompress=False,
            lingering_time=0,
            read_bufsize=READ_AHEAD,
            tcp_keepalive=False,
        )
        self._aiohttp.connection = self
        self._aiohttp.connection_made(_Transport(self, cast("asyncio.Transport", transport)))
        super().connection_made(transport)

    def connection_lost(self, error: Exception | None) -> None:
        """See `Connection.connection_lost`; a request that has arrived completely is still answered."""
        if self._is_waiting and not self._is_over:
            self._gone = self._transport
            self._held += self._unparsed
        super().connection_lost(error)
        if self._task is None and self._gone is None:
            self._end_aiohttp()

    def _end_aiohttp(self) -> None:
        protocol, self._aiohttp = self._aiohttp, None
        if protocol is not None:
            protocol.connection_lost(None)

    # --- as `Parser` ----------------------------------------------------------------------------------

    def feed_data(self, data: bytes, /) -> Parsed:
        """Hand bytes to aiohttp's server; a request begins when that calls the handler."""
        request = self._request
        data, self._held = self._held + data, b""
        if self._is_waiting or self._aiohttp is None:
            self._held = data
            return _NOTHING
        is_head = is_chunked = False
        if request is None:
            size, is_head, is_chunked = self._head_size(data)
        elif request.is_chunked:
            size = len(data)
        else:
            size = min(len(data), self._missing)
        self._is_feeding = True
        self._aiohttp.data_received(data[:size])
        if is_head and is_chunked:  # its body is parsed with it, as the fast listener does
            self._aiohttp.data_received(data[size:])
            size = len(data)
        self._is_feeding = False
        if is_head:
            self._is_waiting = self._awaits_call = True
            self._is_late = self._is_catching_up
            self._idle_since = self._loop.time()
        self._held = data[size:]
        if request is None or not request.content.is_eof():
            self._raise_failure()
        return _NOTHING

    def _head_size(self, data: bytes) -> tuple[int, bool, bool]:
        """Return the bytes that belong to the current head, whether it ends, and whether chunks follow."""
        text, known = self._head_text, len(self._head_text)
        text += data if text else data.lstrip(b"\r\n")  # empty lines may precede a request
        end = text.find(_HEAD_END, max(0, known - len(_HEAD_END)))
        if end < 0:
            return len(data), False, False
        size = len(data) - (len(text) - end - len(_HEAD_END))
        is_chunked = _CHUNKED.search(text, 0, end) is not None
        text.clear()
        return size, True, is_chunked

    def _raise_failure(self) -> None:
        """Raise the error that aiohttp's parser has found.

        aiohttp's server reports it only after the current request, which may wait for the rest of its body.
        If a version of aiohttp keeps its queue elsewhere, such a request is refused at its deadline.
        """
        for message, content in getattr(self._aiohttp, "_messages", ()):
            if not hasattr(message, "exc") and content.is_eof():
                return  # the error follows a complete request
            if isinstance(error := getattr(message, "exc", None), HttpProcessingError):
                self._is_waiting = self._awaits_call = False
                raise error

    def _parse_later(self) -> None:
        """Continue after a pause of the parser, unless the handler's call does."""
        if not self._awaits_call:
            super()._parse_later()

    def message_consumed(self) -> None:
        """Do nothing: aiohttp's server continues without this call."""

    # --- as aiohttp's server needs it -----------------------------------------------------------------

    def pause_reading(self) -> None:
        """Stop reading: the bytes of a body that wait have reached their limit."""
        self._is_full = True
        self._read_or_not()

    def resume_reading(self, resume_parser: bool = True) -> None:  # noqa: ARG002, FBT001, FBT002 - as its base
        """Continue after a body has been read."""
        was_full, self._is_full = self._is_full, False
        if self._is_half_closed:
            self._cut_short()
        if was_full and not self._is_feeding:
            self._parse_more()
        else:
            self._read_or_not()

    def refuse(self, error: BaseException | None) -> None:
        """Respond to bytes that are not HTTP, unless a response was written already."""
        self._is_waiting = self._awaits_call = False
        if not self._is_over and self._transport is not None:
            self._refuse(error if isinstance(error, Exception) else VersionError())

    def _note_head(
        self,
        message: RawRequestMessage,
        payload: StreamReader,
        protocol: web.RequestHandler,
        writer: AbstractStreamWriter,
        task: "asyncio.Task[None]",
    ) -> web.BaseRequest:
        """Keep the parsed head. aiohttp cannot build a request from some targets, so it gets another one."""
        self._head = message
        return web.BaseRequest(message._replace(url=_ROOT), payload, protocol, writer, task, self._loop)

    async def _handle(self, message: web.BaseRequest) -> web.StreamResponse:
        """Answer a request; called by aiohttp's server."""
        try:
            goes_on = await self._take(cast("RawRequestMessage", self._head), message.content)
        finally:
            if self._transport is None:
                self._end_aiohttp()
        return _Answered(goes_on=goes_on)

    async def _take(self, head: RawRequestMessage, content: StreamReader) -> bool:
        """Answer a request; return whether the connection stays open."""
        self._is_waiting = self._awaits_call = False
        transport, self._gone = self._transport or self._gone, None
        if transport is None or self._is_leaving or (self._is_over and self._transport is not None):
            return False
        request = Request(head, content, transport)
        if self._is_turned_away:
            self._is_over = True
            self._owner.overhear(request)
            return False
        if not head.path or head.version not in (HttpVersion11, HttpVersion10):
            self._refuse(VersionError(message="expected HTTP/1.0 or HTTP/1.1"))
            return False
        request.is_half_closed = self._is_half_closed
        self._request, self._task = request, asyncio.current_task()
        if self._transport is not None:
            self._parse(b"")
            self._parse_later()
        elif not content.is_eof():
            self.feed_data(b"")
            if not content.is_eof():
                content.set_exception(ConnectionResetError("the sender disconnected"))
        return await self._serve(request, is_late=self._is_late)


class _Protocol(web.RequestHandler):
    """aiohttp's protocol of one connection."""

    connection: ReferenceConnection

    def handle_error(
        self,
        request: web.BaseRequest,  # noqa: ARG002 - aiohttp's name
        status: int = 500,  # noqa: ARG002 - aiohttp's name
        exc: BaseException | None = None,
        message: str | None = None,  # noqa: ARG002 - aiohttp's name
    ) -> web.StreamResponse:
        """Answer bytes that are not HTTP as the fast listener does."""
        self.connection.refuse(exc)
        return _Answered(goes_on=False)


class _Transport(asyncio.Transport):
    """The transport that aiohttp's protocol sees: it pauses reading. The connection writes and closes."""

    def __init__(self, connection: ReferenceConnection, transport: asyncio.Transport) -> None:
        super().__init__()
        self._connection = connection
        self._transport = transport

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._transport.get_extra_info(name, default)

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def close(self) -> None:
        pass

    def pause_reading(self) -> None:
        self._connection.pause_reading()

    def resume_reading(self) -> None:
        self._connection.resume_reading()


class _Answered(web.StreamResponse):
    """Signals to aiohttp's server that the connection has written the answer."""

    def __init__(self, *, goes_on: bool) -> None:
        super().__init__()
        self._goes_on = goes_on

    @property
    def keep_alive(self) -> bool:
        return self._goes_on

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:  # noqa: ARG002 - aiohttp's name
        return None

    async def write_eof(self, data: bytes = b"") -> None:
        pass
