"""Who may ask, and who did: on the socket its file permissions decide, on the listener a token and the Host.

Whoever changes something leaves a line in the log, under `relay.audit`, whatever `[log] level` says.
"""

import hmac
import ipaddress
import logging
import pwd
import socket
import struct
from functools import lru_cache
from typing import Any

from aiohttp import web

from relay.api.responses import BEGUN, DRY, LINES, WISH, refuse
from relay.base.clock import Clock
from relay.base.ids import given_id, request_id
from relay.config.secrets import Secret
from relay.process.logs import fields

HEADER = "X-Request-Id"
REQUEST_ID = web.RequestKey("request_id", str)

log = logging.getLogger("relay.audit")
log.setLevel(logging.INFO)

TOKEN = web.RequestKey("token", int)
"""Which of `[admin] tokens` a request came with, counted from 1."""

_CREDENTIALS = struct.Struct("3i")  # of SO_PEERCRED, unix(7): pid, uid, gid
_READING = frozenset({"GET", "HEAD", "OPTIONS"})


@web.middleware
async def audit(request: web.Request, handler: Any) -> web.StreamResponse:
    """Note every change that was asked for: who, what, and what came of it."""
    if request.method in _READING:
        response: web.StreamResponse = await handler(request)
        return response
    who, outcome = _who(request), "broken off"
    try:
        response = await handler(request)
        outcome = str(response.status)
    finally:
        if not request.get(DRY):
            asked = f" {wish}" if (wish := request.get(WISH)) else ""
            told = fields(request_id=request.get(REQUEST_ID), outcome=outcome)
            log.info("%s: %s %s%s: %s", who, request.method, _path(request), asked, outcome, extra=told)
    return response


def guard(tokens: tuple[Secret, ...]) -> Any:
    """Let the API through only with a token, and only under a name that a web page cannot borrow."""

    @web.middleware
    async def check(request: web.Request, handler: Any) -> web.StreamResponse:
        if not request.path.startswith("/api/"):
            response: web.StreamResponse = await handler(request)
            return response
        if not _is_ours(request):
            hint = "ask by the address that it listens on, or by localhost"
            return refuse(403, "forbidden", "The Host header names neither this listener nor loopback", hint)
        scheme, _, given = request.headers.get("Authorization", "").strip().partition(" ")
        presented = given.strip().encode("utf-8", "surrogateescape")
        known = [hmac.compare_digest(token.reveal().encode(), presented) for token in tokens]
        if scheme.lower() == "bearer" and any(known):
            request[TOKEN] = known.index(True) + 1
        else:
            hint = "set [admin] tokens and send one as a Bearer token, or use the unix socket"
            return refuse(401, "unauthorized", "Missing or unknown token", hint)
        if request.method != "GET" and request.content_type not in ("application/json", LINES):
            return refuse(415, "unsupported_media_type", "Changes need Content-Type: application/json")
        return await handler(request)  # type: ignore[no-any-return]

    return check


def _who(request: web.Request) -> str:
    """Name whoever asked: by the kernel's word on the socket, by token and address on the listener."""
    sock = None if request.transport is None else request.transport.get_extra_info("socket")
    if sock is not None and sock.family == socket.AF_UNIX:
        given = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        pid, uid, _ = _CREDENTIALS.unpack(given)
        return f"{_user(uid)}, pid {pid}"
    token = request.get(TOKEN)
    return f"{'no token' if token is None else f'token {token}'}, {request.remote or 'gone'}"


@lru_cache
def _user(uid: int) -> str:
    try:
        return f"{pwd.getpwuid(uid).pw_name} (uid {uid})"
    except KeyError:
        return f"uid {uid}"


def _path(request: web.Request) -> str:
    """Return the path as it came, which has no line breaks; the query may hold anything."""
    return request.raw_path.partition("?")[0]


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


def named(clock: Clock) -> Any:
    """Give each request its own `X-Request-Id`, or one that is made."""

    @web.middleware
    async def name(request: web.Request, handler: Any) -> web.StreamResponse:
        request[REQUEST_ID] = given_id(request.headers.get(HEADER)) or request_id(clock.wall())
        return await handler(request)  # type: ignore[no-any-return]

    return name


async def show(request: web.Request, response: web.StreamResponse) -> None:
    """Say it in the answer that begins; a signal of aiohttp's, so that streams have it too."""
    request[BEGUN] = True
    if (id_ := request.get(REQUEST_ID)) is not None:
        response.headers[HEADER] = id_
