"""Who may ask: on the socket its file permissions decide, on the listener a token and the Host header."""

import hmac
import ipaddress
from typing import Any

from aiohttp import web

from relay.api.answers import refuse
from relay.config.secret import Secret


def guard(tokens: tuple[Secret, ...]) -> Any:
    """Let the API through only with a token, and only under a name that a web page cannot borrow."""

    @web.middleware
    async def check(request: web.Request, handler: Any) -> web.StreamResponse:
        if not request.path.startswith("/api/"):
            response: web.StreamResponse = await handler(request)
            return response
        if not _is_ours(request):
            return refuse(403, "forbidden", "The Host header names neither this listener nor loopback")
        scheme, _, given = request.headers.get("Authorization", "").strip().partition(" ")
        presented = given.strip().encode("utf-8", "surrogateescape")
        known = [hmac.compare_digest(token.reveal().encode(), presented) for token in tokens]
        if scheme.lower() != "bearer" or not any(known):
            hint = "set [admin] tokens and send one as a Bearer token, or use the unix socket"
            return refuse(401, "unauthorized", "Missing or unknown token", hint)
        if request.method != "GET" and request.content_type != "application/json":
            return refuse(415, "unsupported_media_type", "Changes need Content-Type: application/json")
        return await handler(request)  # type: ignore[no-any-return]

    return check


def _is_ours(request: web.Request) -> bool:
    """Refuse DNS rebinding: the Host must be loopback or the address that was connected to."""
    host = request.host.rpartition(":")[0] if request.host.count(":") == 1 else request.host
    host = host.partition("]")[0].removeprefix("[")
    sockname = request.transport.get_extra_info("sockname") if request.transport else None
    if host == "localhost" or (sockname and host == sockname[0]):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
