"""An answer of one write: all that `web.Response` can do beyond that costs an event four times as much."""

from collections.abc import Callable
from http import HTTPStatus

from aiohttp import HttpVersion11, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.helpers import rfc822_formatted_time
from aiohttp.http import SERVER_SOFTWARE
from multidict import CIMultiDict

_JSON = "application/json"
_EMPTY = (204, 304)  # statuses without a body
_PHRASES = {status.value: status.phrase for status in HTTPStatus}


class Response:
    """JSON on its way out; to aiohttp's server it is what it uses of a `web.StreamResponse`.

    Where anything is out of the ordinary (headers of its own, HTTP/1.0, HEAD, the last answer of a
    connection), a `web.Response` takes over; else that one would write these very bytes.
    """

    __slots__ = ("_is_last", "_other", "body", "event_id", "headers", "lost", "status")

    def __init__(self, status: int, body: bytes) -> None:
        self.status = int(status)  # a plugin's mistake shows here, before anything is stored
        self.body = body
        self.headers: CIMultiDict[str] = CIMultiDict()  # beside the content type
        self.event_id = ""  # of the event that it acknowledges
        self.lost: Callable[[], None] | None = None  # called when it could not be written
        self._is_last = False
        self._other: web.Response | None = None

    @property
    def keep_alive(self) -> bool | None:
        """Say whether the connection goes on after this."""
        return True if self._other is None else self._other.keep_alive

    def force_close(self) -> None:
        """Close the connection after this answer."""
        self._is_last = True

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        """Write head and body, unless a `web.Response` has to."""
        if not self._is_plain(request):
            self._other = web.Response(status=self.status, body=self.body, content_type=_JSON)
            self._other.headers.update(self.headers)
            if self._is_last:
                self._other.force_close()
            return await self._other.prepare(request)
        head = (
            f"HTTP/1.1 {self.status} {_PHRASES.get(self.status, '')}\r\nContent-Type: {_JSON}\r\n"
            f"Content-Length: {len(self.body)}\r\nDate: {rfc822_formatted_time()}\r\n"
            f"Server: {SERVER_SOFTWARE}\r\n\r\n"
        )
        writer = request.writer
        await writer.write_eof(head.encode() + self.body)
        return writer

    async def write_eof(self) -> None:
        """End the answer."""
        if self._other is not None:
            await self._other.write_eof()

    def _is_plain(self, request: web.BaseRequest) -> bool:
        return (
            not (self.headers or self._is_last)
            and request.keep_alive
            and request.version == HttpVersion11
            and request.method != "HEAD"
            and self.status not in _EMPTY
        )
