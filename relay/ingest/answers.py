"""From a source's reply, or a refusal, to the bytes of an answer. Always JSON, never a redirect."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from relay import __version__
from relay.errors import MethodNotAllowed, PluginFailed, Refusal
from relay.incoming import Incoming
from relay.ingest.response import Response
from relay.ingest.routes import Mount
from relay.model import Receipt
from relay.source import Accepted, Reply

_encode = msgspec.json.Encoder().encode
_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # a token, RFC 9110, 5.6.2
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f\ud800-\udfff]")  # RFC 9110, 5.5, and no UTF-8
_OURS = ("connection", "content-length", "transfer-encoding")  # they frame the answer


def render(reply: Reply) -> Response:
    """Turn a reply into a response; `bytes` go out as they are."""
    body = reply.body if isinstance(reply.body, bytes) else _encode(reply.body)
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
        return Response(200, reply if isinstance(reply, bytes) else _encode(reply))
    except Exception as error:
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
    return _annotate(render(Reply(status=refusal.status, body={"error": error})), refusal)


def outside(path: str, method: str, refusal: Refusal) -> Response:
    """Answer a path that no source owns."""
    if path == "/health" and method in ("GET", "HEAD"):
        return render(Reply(body={"status": "ok", "version": __version__}))
    return plain(refusal)


def preflight(handlers: Mapping[str, Any]) -> Response:
    """Answer a browser's CORS preflight."""
    methods = ", ".join(sorted(handlers))
    response = Response(204, b"")
    response.headers.update(
        {
            "Access-Control-Allow-Methods": methods,
            "Access-Control-Allow-Headers": "authorization, content-type",
            "Access-Control-Max-Age": "600",
        }
    )
    return response


def allow_origin(origins: tuple[str, ...], origin: str | None, response: Response) -> None:
    """Let a configured origin's page read the answer."""
    response.headers["Vary"] = "Origin"
    if origin is not None and origin.isascii() and ("*" in origins or origin in origins):
        response.headers["Access-Control-Allow-Origin"] = origin


def ask(plugin: Callable[[Incoming], Any], incoming: Incoming) -> Any:
    """Call a source's method; what is no refusal is the plugin's failure, and shows in its envelope.

    Raises:
        Refusal: the source's own, or PluginFailed.
    """
    try:
        return plugin(incoming)
    except Refusal:
        raise
    except Exception as error:
        raise PluginFailed from error


def _annotate(response: Response, refusal: Refusal) -> Response:
    if refusal.retry_after and response.status in (408, 429, 503):
        response.headers["Retry-After"] = str(refusal.retry_after)
    if isinstance(refusal, MethodNotAllowed):
        response.headers["Allow"] = ", ".join(refusal.allow)
    return response
