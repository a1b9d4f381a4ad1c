"""An answer of one write: all that `web.Response` can do beyond that costs an event four times as much."""

import time
from collections.abc import Callable
from email.utils import formatdate
from http import HTTPStatus

import msgspec
from multidict import CIMultiDict

from relay.ingest.request import Request

_JSON = "application/json"
_CLOSE = "Connection: close\r\n"
_EMPTY = (204, 304)  # statuses without a body
_rendered = (0, "")  # the second that was rendered last, and its text
_PHRASES = {status.value: status.phrase for status in HTTPStatus}


class Response:
    """JSON on its way out, in the bytes that a `web.Response` would write, but for the header `Server`.

    Senders need not know which versions of Python and aiohttp answer them.
    """

    __slots__ = ("_headers", "_is_last", "body", "event_id", "status", "told")

    def __init__(self, status: int, body: bytes) -> None:
        self.status = int(status)  # a plugin's mistake shows here, before anything is stored
        self.body = body
        self.event_id = ""  # of the event that it acknowledges
        self.told: Callable[[bool], None] | None = None  # called once, with whether the sender has heard it
        self._is_last = False
        self._headers: CIMultiDict[str] | None = None

    @property
    def headers(self) -> CIMultiDict[str]:
        """Headers beside those that every answer has; most have none."""
        if self._headers is None:
            self._headers = CIMultiDict()
        return self._headers

    def force_close(self) -> None:
        """Close the connection after this answer."""
        self._is_last = True

    def keeps(self, request: Request) -> bool:
        """Say whether the connection goes on after this."""
        return request.is_kept and not self._is_last

    def tell(self, *, heard: bool) -> None:
        """Say whether the sender has heard the answer."""
        if self.told is not None:
            self.told(heard)

    def encode(self, request: Request) -> bytes:
        """Render head and body for the request that this answers."""
        if self._headers or self.status in _EMPTY or not request.is_1_1:
            return self._encode_uncommon(request)
        head = (
            f"HTTP/1.1 {self.status} {_PHRASES.get(self.status, '')}\r\nContent-Type: {_JSON}\r\n"
            f"Content-Length: {len(self.body)}\r\nDate: {_date()}\r\n"
            f"{'' if self.keeps(request) else _CLOSE}\r\n"
        )
        return head.encode() if request.method == "HEAD" else head.encode() + self.body

    def _encode_uncommon(self, request: Request) -> bytes:
        has_body, goes_on = self.status not in _EMPTY, self.keeps(request)
        fields = CIMultiDict(self.headers)
        fields.setdefault("Content-Type", _JSON)
        if has_body:
            fields["Content-Length"] = str(len(self.body))
        if goes_on != request.is_1_1:  # else it is what the version implies
            fields["Connection"] = "keep-alive" if goes_on else "close"
        head = _head("1.1" if request.is_1_1 else "1.0", self.status, fields)
        return head + self.body if has_body and request.method != "HEAD" else head


def farewell(status: int, code: str, message: str, **headers: str) -> bytes:
    """Render the last answer of a connection, to what cannot be called a request."""
    body = msgspec.json.encode({"error": {"code": code, "message": message}})
    fields = {"Content-Type": _JSON, "Content-Length": str(len(body)), "Connection": "close", **headers}
    return _head("1.1", status, CIMultiDict(fields)) + body


def _head(version: str, status: int, fields: CIMultiDict[str]) -> bytes:
    fields.setdefault("Date", _date())
    lines = [f"{name}: {value}" for name, value in fields.items()]
    return "\r\n".join([f"HTTP/{version} {status} {_PHRASES.get(status, '')}", *lines, "", ""]).encode()


def _date() -> str:
    """Return the time for a `Date` header; rendered once a second."""
    global _rendered  # noqa: PLW0603 - the cache
    now = int(time.time())
    if _rendered[0] != now:
        _rendered = (now, formatdate(now, usegmt=True))
    return _rendered[1]
