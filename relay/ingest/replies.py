"""Replies: rendering a source's reply or a refusal as an HTTP response. Always JSON, never a redirect."""

import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from email.utils import formatdate
from http import HTTPStatus
from typing import Any

import msgspec
from multidict import CIMultiDict

from relay.base.json_text import encode, escape
from relay.errors import Forbidden, MethodNotAllowed, PluginFailed, Refusal, UnsupportedEncoding
from relay.ingest.request import Request
from relay.ingest.routes import Mount
from relay.model import Receipt
from relay.source import Accepted, Incoming, Reply

_JSON = "application/json"
_CLOSE = "Connection: close\r\n"
_EMPTY = (204, 304)  # statuses without a body
_rendered = (0, "")  # the last rendered second, and its text
_PHRASES = {status.value: status.phrase for status in HTTPStatus}

_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # a token, RFC 9110, 5.6.2
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f\ud800-\udfff]")  # RFC 9110, 5.5, and no UTF-8
_UNSENDABLE = "must not contain line breaks, or characters that UTF-8 cannot encode"
_encode = msgspec.json.Encoder().encode
BROWSER_HEADERS = (
    "authorization",
    "content-type",
    "idempotency-key",
    "webhook-id",
    "x-request-id",
    "traceparent",
)
"""Request headers that a web page of a listed origin may set."""

_LEAST, _MOST = 200, 599  # statuses of a final answer; 1xx announce another one (RFC 9110, 15.2)
REFUSING = range(400, _MOST + 1)
_OURS = ("connection", "content-length", "transfer-encoding")  # they frame the answer


MOST_REPLIED = 4096
"""Maximum number of events in each of the two parts of `RecentReplies`."""

MOST_REPLIES = 10
"""Maximum number of replies about one event in a part: the first ones and the latest one."""

OnHeard = Callable[[bool], None]
"""A function that the connection calls once, with whether the sender has received the answer."""


class Response:
    """A JSON response. Its bytes are those of a `web.Response`, without the `Server` header.

    That header would tell strangers the versions of Python and aiohttp.
    """

    __slots__ = ("_headers", "body", "content_type", "event_id", "is_last", "on_heard", "status")

    def __init__(self, status: int, body: bytes) -> None:
        self.status = int(status)  # fails on a plugin's mistake, before anything is stored
        self.body = body
        self.content_type = _JSON  # "" for an empty body
        self.event_id = ""  # of the acknowledged event
        self.on_heard: OnHeard | None = None
        self.is_last = False  # close the connection after this response, even a keep-alive one
        self._headers: CIMultiDict[str] | None = None

    @property
    def headers(self) -> CIMultiDict[str]:
        """Headers in addition to those of every response; usually empty."""
        if self._headers is None:
            self._headers = CIMultiDict()
        return self._headers

    def force_close(self) -> None:
        """Close the connection after this answer."""
        self.is_last = True

    def encode(self, request: Request) -> bytes:
        """Return the bytes of the response to a request."""
        if self._headers or not self.body or self.status in _EMPTY or not request.is_1_1:
            return self._encode_uncommon(request)
        date = _rendered[1] if _rendered[0] == int(time.time()) else _date()
        head = (
            f"HTTP/1.1 {self.status} {_PHRASES.get(self.status, '')}\r\nContent-Type: {self.content_type}\r\n"
            f"Content-Length: {len(self.body)}\r\nDate: {date}\r\n"
            f"{'' if request.is_kept and not self.is_last else _CLOSE}\r\n"
        )
        return head.encode() if request.method == "HEAD" else head.encode() + self.body

    def _encode_uncommon(self, request: Request) -> bytes:
        has_body, goes_on = self.status not in _EMPTY, request.is_kept and not self.is_last
        fields = CIMultiDict(self.headers)
        if self.content_type:
            fields.setdefault("Content-Type", self.content_type)
        if has_body:
            fields["Content-Length"] = str(len(self.body))
        if goes_on != request.is_1_1:  # otherwise the version implies it
            fields["Connection"] = "keep-alive" if goes_on else "close"
        head = _head("1.1" if request.is_1_1 else "1.0", self.status, fields)
        return head + self.body if has_body and request.method != "HEAD" else head


class Sent(msgspec.Struct, frozen=True, gc=False):
    """A reply about an event."""

    received_at: int  # receipt of the request, wall clock; equals the event's for the first request
    status: int
    duration: int  # microseconds from the head of the request until the reply was ready
    heard: bool = True  # False: the sender disconnected before the reply


class RecentReplies:
    """The replies to the senders of the latest events since the start, in memory.

    When `recent` is full, it becomes the older part, and the previous older part is dropped.
    """

    def __init__(self) -> None:
        self.recent: dict[str, tuple[Sent, ...]] = {}  # by the public id of the event
        self._older: dict[str, tuple[Sent, ...]] = {}

    def note(self, event_ids: Iterable[str], sent: Sent) -> None:
        """Note a reply about several events. For a single event, `Ingest.handle` does this inline."""
        for id_ in event_ids:
            self.recent[id_] = (*self.recent.get(id_, ())[: MOST_REPLIES - 1], sent)
        if len(self.recent) >= MOST_REPLIED:
            self.drop_older()

    def drop_older(self) -> None:
        """Begin a new part, and drop the older one."""
        self.recent, self._older = {}, self.recent

    def lose(self, event_ids: Sequence[str], received_at: int) -> None:
        """Note that a sender did not receive the reply about events to its request, received at this time.

        The sender may disconnect seconds after the reply, so other replies may have followed, and the reply
        may be in the older part.
        """
        for part in (self.recent, self._older):
            for id_ in event_ids:
                known = part.get(id_, ())
                if any(each.received_at == received_at for each in known):
                    part[id_] = tuple([_unheard(each, received_at) for each in known])

    def of(self, event_id: str) -> tuple[Sent, ...]:
        """Return the known replies about an event, oldest first."""
        return (*self._older.get(event_id, ()), *self.recent.get(event_id, ()))


def _unheard(sent: Sent, received_at: int) -> Sent:
    return msgspec.structs.replace(sent, heard=False) if sent.received_at == received_at else sent


def closing_response(status: int, code: str, message: str, **headers: str) -> bytes:
    """Return the bytes of a response to something that is not a request; the connection ends after it."""
    body = msgspec.json.encode({"error": {"code": code, "message": message}})
    fields = {"Content-Type": _JSON, "Content-Length": str(len(body)), "Connection": "close", **headers}
    return _head("1.1", status, CIMultiDict(fields)) + body


def _head(version: str, status: int, fields: CIMultiDict[str]) -> bytes:
    fields.setdefault("Date", _date())
    lines = [f"{name}: {value}" for name, value in fields.items()]
    return "\r\n".join([f"HTTP/{version} {status} {_PHRASES.get(status, '')}", *lines, "", ""]).encode()


def _date() -> str:
    """Return the value of the `Date` header; it is rendered once a second."""
    global _rendered  # noqa: PLW0603 - the cache
    now = int(time.time())
    if _rendered[0] != now:
        _rendered = (now, formatdate(now, usegmt=True))
    return _rendered[1]


def render(reply: Reply) -> Response:
    """Render a reply.

    Raises:
        ValueError: the status, the content type or a header cannot be sent.
    """
    if not _LEAST <= reply.status <= _MOST:
        raise ValueError(f"a reply's status must be from {_LEAST} to {_MOST}, got {reply.status}")
    body, type_ = reply.body, reply.content_type
    if isinstance(body, str) and type_ is not None:
        body = escape(body).encode()  # a header may contain bytes that are not UTF-8
    response = Response(reply.status, body if isinstance(body, bytes) else encode(body))
    if type_ is not None:
        if not type_ or _CONTROL.search(type_):
            raise ValueError(f"the content type must not be empty and {_UNSENDABLE}")
        response.content_type = type_
    elif body == b"":
        response.content_type = ""
    for name, value in reply.headers.items():
        if not _NAME.fullmatch(name) or name.lower() in _OURS:
            raise ValueError(f"a reply may not have a header {name!r}")
        if _CONTROL.search(value):
            raise ValueError(f"the header {name} {_UNSENDABLE}")
        response.headers[name] = value
    return response


def answer(accepted: Accepted, receipt: Receipt) -> Response:
    """Render the reply to an accepted request for one receipt.

    Raises:
        PluginFailed: the reply cannot be rendered, so nothing may be stored.
    """
    reply = accepted.reply
    try:
        if callable(reply):
            reply = reply(receipt)
        if isinstance(reply, Reply):
            return render(reply)
        if not isinstance(reply, bytes):
            try:
                reply = _encode(reply)
            except UnicodeEncodeError:
                reply = encode(reply)  # shows lone surrogates as escapes
        return Response(200, reply)
    except BaseException as error:
        raise PluginFailed from error


def answer_again(accepted: Accepted, receipt: Receipt, ready: Response) -> Response:
    """Render the reply again for the store's receipt; `ready` if that fails, because the event is stored."""
    if not callable(accepted.reply):
        return ready
    try:
        return answer(accepted, receipt)
    except PluginFailed:
        return ready


def refuse(mount: Mount, refusal: Refusal, incoming: Incoming) -> Response:
    """Render a refusal in the source's own envelope; passes on every exception of the plugin."""
    return _annotate(render(mount.source.refuse(refusal, incoming)), refusal)


def plain(refusal: Refusal) -> Response:
    """Render a refusal in the relay's own envelope."""
    error = {"code": refusal.code, "message": refusal.message}
    status = refusal.status if refusal.status in REFUSING else PluginFailed.status  # a plugin's own class
    return _annotate(render(Reply(status=status, body={"error": error})), refusal)


def health() -> Response:
    """Answer `GET /health`, which no source owns. Contains no version, because strangers may send it."""
    return render(Reply(body={"status": "ok"}))


def preflight(handlers: Mapping[str, Any]) -> Response:
    """Answer a browser's CORS preflight; `allow_origin` adds the headers for listed origins."""
    response = Response(204, b"")
    response.headers.update(
        {
            "Access-Control-Allow-Methods": ", ".join(sorted(handlers)),
            "Access-Control-Allow-Headers": ", ".join(BROWSER_HEADERS),
            "Access-Control-Max-Age": "600",
        }
    )
    return response


def check_origin(mount: Mount, incoming: Incoming) -> None:
    """Refuse requests of web pages that are not in `cors_origins` to a source without secrets.

    Browsers send simple requests without a preflight (Fetch, 2.2.2: text/plain, no custom headers) and only
    hide the response from the page. If a source demands a token, `Authorization` forces a preflight.

    Raises:
        Forbidden: the origin is not listed, is `null`, or there are several `Origin` headers.
    """
    if mount.is_open and "Origin" in incoming.headers:
        origins = incoming.headers.getall("Origin")
        if len(origins) > 1 or not _is_listed(mount.config.cors_origins, origins[0]):
            raise Forbidden("The web page's origin is not in cors_origins")


def allow_origin(origins: tuple[str, ...], origin: str | None, response: Response) -> None:
    """Let a web page of a listed origin read the response.

    `navigator.sendBeacon` sends in the credentials mode "include", for which browsers demand the second
    header and no `*`. The relay reads no cookies.
    """
    response.headers["Vary"] = "Origin"
    if origin is not None and _is_listed(origins, origin):
        response.headers["Access-Control-Allow-Origin"] = origin
        response.headers["Access-Control-Allow-Credentials"] = "true"


def _is_listed(origins: tuple[str, ...], origin: str) -> bool:
    return origin.isascii() and ("*" in origins or origin in origins)


def ask(plugin: Callable[[Incoming], Any], incoming: Incoming) -> Any:
    """Call a source's method.

    Raises:
        Refusal: the source's own, or PluginFailed for every other exception.
    """
    try:
        return plugin(incoming)
    except Refusal:
        raise
    except BaseException as error:  # a SystemExit would end the daemon
        raise PluginFailed from error


def _annotate(response: Response, refusal: Refusal) -> Response:
    if refusal.retry_after and response.status in (408, 429, 503):
        response.headers["Retry-After"] = str(refusal.retry_after)
    if isinstance(refusal, UnsupportedEncoding) and refusal.accepts:
        response.headers["Accept-Encoding"] = ", ".join(refusal.accepts)
    if isinstance(refusal, MethodNotAllowed):
        response.headers["Allow"] = ", ".join(refusal.allow)
    return response
