"""From a source's reply, or a refusal, to the bytes of an answer. Always JSON, never a redirect."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from relay.base.json_text import encode
from relay.errors import Forbidden, MethodNotAllowed, PluginFailed, Refusal
from relay.incoming import Incoming
from relay.ingest.response import Response
from relay.ingest.routes import Mount
from relay.model import Receipt
from relay.source import Accepted, Reply

_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # a token, RFC 9110, 5.6.2
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f\ud800-\udfff]")  # RFC 9110, 5.5, and no UTF-8
_encode = msgspec.json.Encoder().encode
BROWSER_HEADERS = (
    "authorization",
    "content-type",
    "idempotency-key",
    "webhook-id",
    "x-request-id",
    "traceparent",
)
"""Request headers that a page at a listed origin may set."""

_LEAST, _MOST = 200, 599  # statuses of a final answer; 1xx announce another one (RFC 9110, 15.2)
_REFUSING = range(400, _MOST + 1)
_OURS = ("connection", "content-length", "transfer-encoding")  # they frame the answer


def render(reply: Reply) -> Response:
    """Turn a reply into a response; `bytes` go out as they are.

    Raises:
        ValueError: its status or a header cannot be sent.
    """
    if not _LEAST <= reply.status <= _MOST:
        raise ValueError(f"a reply's status must be from {_LEAST} to {_MOST}, got {reply.status}")
    body = reply.body if isinstance(reply.body, bytes) else encode(reply.body)
    response = Response(reply.status, body)
    for name, value in reply.headers.items():
        if not _NAME.fullmatch(name) or name.lower() in _OURS:
            raise ValueError(f"a reply may not have a header {name!r}")
        if _CONTROL.search(value):
            raise ValueError(f"the header {name} may have no line ends, and only what UTF-8 can say")
        response.headers[name] = value
    return response


def answer(accepted: Accepted, receipt: Receipt) -> Response:
    """Render the reply of an accepted request for one receipt.

    Raises:
        PluginFailed: the reply cannot be made; nothing may be stored then.
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
                reply = encode(reply)  # which shows lone surrogates
        return Response(200, reply)
    except BaseException as error:
        raise PluginFailed from error


def answer_again(accepted: Accepted, receipt: Receipt, ready: Response) -> Response:
    """Render the reply anew for what the store said; nothing that fails here may become an error."""
    if not callable(accepted.reply):
        return ready
    try:
        return answer(accepted, receipt)
    except PluginFailed:
        return ready


def refuse(mount: Mount, refusal: Refusal, incoming: Incoming) -> Response:
    """Render a refusal in the source's own envelope; whatever its plugin raises comes through."""
    return _annotate(render(mount.source.refuse(refusal, incoming)), refusal)


def plain(refusal: Refusal) -> Response:
    """Render a refusal where no source can."""
    error = {"code": refusal.code, "message": refusal.message}
    status = refusal.status if refusal.status in _REFUSING else PluginFailed.status  # a plugin chose another
    return _annotate(render(Reply(status=status, body={"error": error})), refusal)


def health() -> Response:
    """Answer `GET /health`, which no source owns; who asks may be anybody, so it tells no version."""
    return render(Reply(body={"status": "ok"}))


def preflight(handlers: Mapping[str, Any]) -> Response:
    """Answer a browser's CORS preflight; `allow_origin` adds what only a listed origin may have."""
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
    """Refuse what a web page that is not in `cors_origins` has a browser send to a source without secrets.

    Browsers send simple requests without a preflight (Fetch, 2.2.2: text/plain, no headers of the page's own)
    and only keep the answer from it. Where a source demands a token, `Authorization` forces a preflight.

    Raises:
        Forbidden: the origin is not listed; `null` and several headers are not either.
    """
    if mount.is_open and "Origin" in incoming.headers:
        origins = incoming.headers.getall("Origin")
        if len(origins) > 1 or not _is_listed(mount.config.cors_origins, origins[0]):
            raise Forbidden("The web page's origin is not in cors_origins")


def allow_origin(origins: tuple[str, ...], origin: str | None, response: Response) -> None:
    """Let a configured origin's page read the answer.

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
    """Call a source's method; what is no refusal is the plugin's failure, and shows in its envelope.

    Raises:
        Refusal: the source's own, or PluginFailed.
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
    if isinstance(refusal, MethodNotAllowed):
        response.headers["Allow"] = ", ".join(refusal.allow)
    return response
