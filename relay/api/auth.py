"""Access control and the log of changes.

On the socket, file permissions decide who may connect. The admin listener needs a token and a Host header
that names it. Every change is logged under `relay.audit`, with any `[log] level`. Each request has an id,
which its response and its log lines contain.
"""

import hmac
import ipaddress
import logging
import pwd
import socket
import struct
from collections.abc import Collection
from functools import lru_cache
from typing import Any, get_args

from aiohttp import web

from relay.api.responses import DRY_RUN, LINES, LOGGED_BODY, STARTED, error_response
from relay.base.clock import Clock
from relay.base.ids import REQUEST, given_id, new_id
from relay.config.schema import AdminToken, Scope
from relay.errors import ForbiddenError
from relay.process.logs import fields

log = logging.getLogger("relay.audit")
log.setLevel(logging.INFO)

HEADER = "X-Request-Id"
REQUEST_ID = web.RequestKey("request_id", str)
TOKEN = web.RequestKey("token", AdminToken)
"""The token in `[admin] tokens` that the request used."""

CALLER = web.RequestKey("caller", str)
"""Name of that token, for the audit log."""

_CREDENTIALS = struct.Struct("3i")  # of SO_PEERCRED, unix(7): pid, uid, gid
_SCOPES = get_args(Scope)
_READ_ONLY = frozenset({"GET", "HEAD", "OPTIONS"})


def is_page(path: str) -> bool:
    """Return whether a path belongs to the dashboard."""
    return path == PAGES or path.startswith(f"{PAGES}/")


def name_requests(clock: Clock) -> Any:
    """Return a middleware that gives each request an id: its `X-Request-Id`, or a new one."""

    @web.middleware
    async def name(request: web.Request, handler: Any) -> web.StreamResponse:
        request[REQUEST_ID] = given_id(request.headers.get(HEADER)) or new_id(REQUEST, clock.wall())
        return await handler(request)  # type: ignore[no-any-return]

    return name


PAGES = "/ui"
"""Path of the dashboard."""

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "form-action 'none'; base-uri 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
"""What a page of the dashboard may load and run: its own files, and no inline code."""

_PROTECTION = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


async def set_headers(request: web.Request, response: web.StreamResponse) -> None:
    """Put the request's id and the headers for browsers into the response.

    aiohttp's header with its and Python's version is removed. This is a signal of aiohttp, because streams
    need it too. A browser may open an answer of the API as a page: the policy lets that page do nothing.
    """
    request[STARTED] = True
    response.headers.pop("Server", None)
    if is_page(request.path) or request.path.startswith("/api/"):
        policy = POLICY if is_page(request.path) else "default-src 'none'; frame-ancestors 'none'; sandbox"
        for name, value in {**_PROTECTION, "Content-Security-Policy": policy}.items():
            response.headers.setdefault(name, value)
    if (id_ := request.get(REQUEST_ID)) is not None:
        response.headers[HEADER] = id_


@web.middleware
async def audit(request: web.Request, handler: Any) -> web.StreamResponse:
    """Log each change: the caller, the request and the status of its response."""
    if request.method in _READ_ONLY:
        response: web.StreamResponse = await handler(request)
        return response
    caller, outcome = _caller(request), "broken off"
    try:
        response = await handler(request)
        outcome = str(response.status)
    finally:
        if not request.get(DRY_RUN):
            body = f" {text}" if (text := request.get(LOGGED_BODY)) else ""
            extra = fields(request_id=request.get(REQUEST_ID), outcome=outcome)
            log.info("%s: %s %s%s: %s", caller, request.method, _path(request), body, outcome, extra=extra)
    return response


def require_token(tokens: tuple[AdminToken, ...], hosts: Collection[str]) -> Any:
    """Return a middleware that requires a token and a Host that is known for requests to the API.

    `hosts` are further names of the listener, as a reverse proxy passes them on.
    """

    @web.middleware
    async def check(request: web.Request, handler: Any) -> web.StreamResponse:
        if not request.path.startswith("/api/") and not is_page(request.path):
            response: web.StreamResponse = await handler(request)
            return response
        if not _has_own_host(request, hosts):
            hint = "use the listener's own address or localhost, or add the name to [admin] hosts"
            return error_response(403, "forbidden", "the Host header does not name this listener", hint)
        scheme, _, given = request.headers.get("Authorization", "").strip().partition(" ")
        presented = given.strip().encode("utf-8", "surrogateescape")
        matches = [hmac.compare_digest(token.secret.reveal().encode(), presented) for token in tokens]
        if scheme.lower() == "bearer" and any(matches):
            at = matches.index(True)
            request[TOKEN], request[CALLER] = tokens[at], tokens[at].title or str(at + 1)
            tokens[at].secret.usage.count += 1
        else:
            hint = "set [admin] tokens and send one as a Bearer token, or use the unix socket"
            return error_response(401, "unauthorized", "missing or unknown token", hint)
        if request.method != "GET" and request.content_type not in ("application/json", LINES):
            message = "changes need Content-Type: application/json"
            return error_response(415, "unsupported_media_type", message)
        return await handler(request)  # type: ignore[no-any-return]

    return check


def check_scope(request: web.Request, needed: Scope) -> None:
    """Check that a request's token has a scope; requests on the unix socket have no token and every scope.

    Raises:
        ForbiddenError: the token lacks the scope.
    """
    token = request.get(TOKEN)
    if token is not None and _SCOPES.index(token.scope) < _SCOPES.index(needed):
        raise ForbiddenError(
            f'the token "{request[CALLER]}" has the scope "{token.scope}", and this request needs "{needed}"',
            hint="use a token with that scope, change its `scope` in [admin] tokens, or use the unix socket",
        )


def name_and_scope(request: web.Request) -> tuple[str, Scope]:
    """Return the name of the operator who sent a request, and the scope of the request."""
    token = request.get(TOKEN)
    if token is not None:
        return f"token {request[CALLER]}", token.scope
    return _caller(request).partition(" ")[0], "admin"


def _caller(request: web.Request) -> str:
    """Return the caller: user and process id on the socket (from the kernel), else token and address."""
    sock = None if request.transport is None else request.transport.get_extra_info("socket")
    if sock is not None and sock.family == socket.AF_UNIX:
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        pid, uid, _ = _CREDENTIALS.unpack(credentials)
        return f"{_user(uid)}, pid {pid}"
    name = request.get(CALLER)
    return f"{'no token' if name is None else f'token {name}'}, {request.remote or 'gone'}"


@lru_cache
def _user(uid: int) -> str:
    try:
        return f"{pwd.getpwuid(uid).pw_name} (uid {uid})"
    except KeyError:
        return f"uid {uid}"


def _path(request: web.Request) -> str:
    """Return the raw path, which has no line breaks. The query may contain secrets and is left out."""
    return request.raw_path.partition("?")[0]


def _has_own_host(request: web.Request, hosts: Collection[str]) -> bool:
    """Return whether the Host is one of `hosts`, loopback or the address of the connection.

    This prevents DNS rebinding.
    """
    host = request.host.rpartition(":")[0] if request.host.count(":") == 1 else request.host
    host = host.partition("]")[0].removeprefix("[")
    sockname = request.transport.get_extra_info("sockname") if request.transport else None
    if host == "localhost" or host.lower() in hosts or (sockname and host == sockname[0]):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
