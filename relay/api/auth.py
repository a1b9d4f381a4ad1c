"""Access control, and the headers that protect browsers.

On the socket, file permissions decide who may connect. The admin listener needs a token, a login to the
dashboard, or a trusted proxy that names the user, and a Host header that names the listener. A browser sends
its login, and a proxy adds its headers, even to requests that another web page causes. So requests without
a token must come from the dashboard itself. Each request has an id, which its response and its log lines
contain.
"""

import hmac
import ipaddress
from collections.abc import Awaitable, Callable
from typing import Any, get_args

from aiohttp import web

from relay.api.guesses import Guesses
from relay.api.operators import OPERATOR, Operator, is_name, operator_at_socket, peer_of
from relay.api.responses import LINES, STARTED, error_response
from relay.base.clock import Clock
from relay.base.ids import REQUEST, given_id, new_id
from relay.config.schema import Admin, AdminToken, Scope
from relay.errors import ForbiddenError

HEADER = "X-Request-Id"
REQUEST_ID = web.RequestKey("request_id", str)
TOKEN = web.RequestKey("token", AdminToken)
"""The token in `[admin] tokens` that the request used."""

SECRET_HEADER = "X-Relay-Proxy-Secret"  # noqa: S105 - the name of a header
"""The header in which a trusted proxy sends `[admin] proxy_secret`."""

SOCKET_PROXY = "unix:"
"""Start of an entry of `[admin] trusted_proxies` that names the user of a proxy at the socket."""

_SCOPES = get_args(Scope)
READ_ONLY = frozenset({"GET", "HEAD", "OPTIONS"})
"""Methods that change nothing."""

_PRIVATE = (".localhost", ".test", ".invalid")
"""Domains that the public DNS never has (RFC 6761), so no stranger can give one the socket's address."""

_DEFAULT_PORTS = {"http": ":80", "https": ":443"}


def is_page(path: str) -> bool:
    """Return whether a path belongs to the dashboard, to which `/` leads."""
    return path in ("/", PAGES) or path.startswith(f"{PAGES}/")


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
"""A page of the dashboard may load and run the dashboard's own files, and no inline code."""

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


FindLogin = Callable[[web.Request], Awaitable[Operator | None]]
"""Returns the operator of the login in a request's cookie; None: the request has no valid login."""


class Access:
    """Finds the operator of each request, and refuses requests without one.

    A page of the dashboard is served without an operator, too: it is then the page to log in.
    """

    def __init__(self, config: Admin, find_login: FindLogin, guesses: Guesses) -> None:
        self._config = config
        self._find_login = find_login
        self._guesses = guesses  # of Bearer tokens
        self._tokens = [(token, token.secret.reveal().encode()) for token in config.tokens]
        proxies = config.trusted_proxies
        self._users = {each.removeprefix(SOCKET_PROXY) for each in proxies if each.startswith(SOCKET_PROXY)}
        self._networks = [
            ipaddress.ip_network(each, strict=False) for each in proxies if not each.startswith(SOCKET_PROXY)
        ]

    def at_listener(self) -> Any:
        """Return the middleware for the admin listener."""

        @web.middleware
        async def check(request: web.Request, handler: Any) -> web.StreamResponse:
            if not request.path.startswith("/api/") and not is_page(request.path):
                return await handler(request)  # type: ignore[no-any-return]
            if not self._names_listener(request):
                hint = "use the listener's own address or localhost, or add the name to [admin] hosts"
                return error_response(403, "forbidden", "the Host header does not name this listener", hint)
            trusted = self._is_trusted_address(request)
            return await self._admit(request, handler, trusted=trusted)

        return check

    def at_socket(self) -> Any:
        """Return the middleware for the unix socket.

        A browser may reach it as well, through a forwarded port: then another page must not use it.
        """

        @web.middleware
        async def check(request: web.Request, handler: Any) -> web.StreamResponse:
            peer = peer_of(request)
            if peer is not None and peer.user not in self._users:
                request[OPERATOR] = operator_at_socket(request, peer)
                if not self._names_socket(request):
                    hint = "connect with the name localhost, or add the name to [admin] hosts"
                    message = "the Host header does not name this socket"
                    return error_response(403, "forbidden", message, hint)
                from_browser = "Origin" in request.headers or "Sec-Fetch-Site" in request.headers
                if from_browser and (refused := _check_origin(request)) is not None:
                    return refused
                return await handler(request)  # type: ignore[no-any-return]
            if not self._names_listener(request):
                hint = "add the name of the proxy to [admin] hosts"
                return error_response(403, "forbidden", "the Host header does not name this socket", hint)
            return await self._admit(request, handler, trusted=peer is not None)

        return check

    async def _admit(self, request: web.Request, handler: Any, *, trusted: bool) -> web.StreamResponse:
        """Handle a request if its operator is known and no other web page has caused it."""
        scheme, _, given = request.headers.get("Authorization", "").strip().partition(" ")
        operator = None
        if scheme.lower() == "bearer":
            if self._guesses.is_flooded:
                return _flooded()
            operator = self._of_token(request, given.strip())
            if operator is None:
                await self._guesses.delay(request.remote)
                return _unauthorized()
        else:
            operator = await self._find_login(request) or (self._of_proxy(request) if trusted else None)
            if operator is None and not is_page(request.path):
                return _unauthorized()
            must_be_own = operator is not None or request.method not in READ_ONLY
            if must_be_own and (refused := _check_origin(request)) is not None:
                return refused
        if operator is not None:
            request[OPERATOR] = operator
        if request.method not in READ_ONLY and request.content_type not in ("application/json", LINES):
            message = "changes need Content-Type: application/json"
            return error_response(415, "unsupported_media_type", message)
        return await handler(request)  # type: ignore[no-any-return]

    def _of_token(self, request: web.Request, given: str) -> Operator | None:
        presented = given.encode("utf-8", "surrogateescape")
        matches = [hmac.compare_digest(secret, presented) for _, secret in self._tokens]
        if not any(matches):
            return None
        at = matches.index(True)
        request[TOKEN] = token = self._tokens[at][0]
        token.secret.usage.count += 1
        name = token.title or f"token {at + 1}"
        label = f"token {token.title or at + 1}"
        return Operator(
            name=name, scope=token.scope, access="token", label=label, remote=request.remote or "gone"
        )

    def _of_proxy(self, request: web.Request) -> Operator | None:
        """Return the operator that a trusted proxy names.

        Raises:
            ForbiddenError: the header occurs twice, because the proxy does not remove the client's own
                header; or its value cannot be a name.
        """
        names = request.headers.getall(self._config.user_header or "", ())
        if not names:
            return None
        if len(names) > 1 or not is_name(names[0]):
            raise ForbiddenError(
                f"expected one {self._config.user_header} header with the name of a user, got {len(names)}",
                hint="let the proxy replace the client's own header instead of adding another one",
            )
        name, scope = names[0], self._config.user_scope
        return Operator(
            name=name, scope=scope, access="proxy", label=f"{name} (proxy)", remote=request.remote or "gone"
        )

    def _is_trusted_address(self, request: web.Request) -> bool:
        """Return whether a request comes from a trusted proxy.

        Each user of this machine can connect from its addresses. So a proxy on this machine needs the secret.
        """
        transport = request.transport
        peer = None if transport is None else transport.get_extra_info("peername")
        own = None if transport is None else transport.get_extra_info("sockname")
        address = None if not peer else _address(peer[0])
        if not self._config.user_header or address is None or own is None:
            return False
        secret = self._config.proxy_secret
        if secret is None:
            if address.is_loopback or address == _address(own[0]):
                return False
        else:
            given = request.headers.getall(SECRET_HEADER, ())
            presented = given[0].encode("utf-8", "surrogateescape") if len(given) == 1 else b""
            if not hmac.compare_digest(secret.reveal().encode(), presented):
                return False
        return any(address in network for network in self._networks)

    def _names_listener(self, request: web.Request) -> bool:
        """Return whether the Host is one of `[admin] hosts`, loopback or the address of the connection.

        This prevents DNS rebinding.
        """
        host = _host(request)
        sockname = request.transport.get_extra_info("sockname") if request.transport else None
        if host in ("localhost", *self._config.hosts) or (sockname and host == sockname[0]):
            return True
        address = _address(host)
        return address is not None and address.is_loopback

    def _names_socket(self, request: web.Request) -> bool:
        """Return whether no stranger can own the name in the Host header, which the client chooses."""
        host = _host(request)
        return "." not in host or host.endswith(_PRIVATE) or self._names_listener(request)


def check_scope(request: web.Request, needed: Scope) -> None:
    """Check that the operator of a request has a scope.

    Raises:
        ForbiddenError: the operator lacks the scope.
    """
    operator = request.get(OPERATOR)
    if operator is not None and not includes(operator.scope, needed):
        who = f'the token "{operator.name}"' if operator.access == "token" else operator.name
        raise ForbiddenError(
            f'{who} has the scope "{operator.scope}", and this request needs "{needed}"',
            hint="use a token with that scope, change its `scope` in [admin] tokens, or use the unix socket",
        )


def includes(scope: Scope, other: Scope) -> bool:
    """Return whether a scope allows everything that another one allows."""
    return _SCOPES.index(scope) >= _SCOPES.index(other)


def least(scope: Scope, other: Scope) -> Scope:
    """Return the smaller of two scopes."""
    return other if includes(scope, other) else scope


def _unauthorized() -> web.Response:
    hint = "set [admin] tokens and send one as a Bearer token, or use the unix socket"
    return error_response(401, "unauthorized", "missing or unknown token", hint)


def _flooded() -> web.Response:
    refused = error_response(429, "too_many_requests", "too many wrong tokens", "try again in a second")
    refused.headers["Retry-After"] = "1"
    return refused


def _check_origin(request: web.Request) -> web.Response | None:
    """Return the refusal of a request that another web page caused; None: the dashboard itself sent it.

    A change must come from the same origin. A browser reports that in `Sec-Fetch-Site`; on plain HTTP to
    another machine, it sends only `Origin`. A page may be opened from everywhere, but not embedded.
    """
    site = request.headers.get("Sec-Fetch-Site")
    if request.method in READ_ONLY:
        is_visit = is_page(request.path) and request.headers.get("Sec-Fetch-Mode") == "navigate"
        if site in (None, "same-origin", "none") or is_visit:
            return None
    elif site == "same-origin" or (site is None and _is_own_origin(request)):
        return None
    hint = "open the dashboard in this browser and try again; scripts use a Bearer token or the unix socket"
    return error_response(403, "forbidden", "the request comes from another web page", hint)


def origin_scheme(request: web.Request) -> str:
    """Return the scheme by which the browser reached the dashboard, from `Origin`; "" without one."""
    scheme, separator, _ = request.headers.get("Origin", "").partition("://")
    return scheme if separator else ""


def _is_own_origin(request: web.Request) -> bool:
    origins = request.headers.getall("Origin", ())
    if len(origins) != 1:
        return False
    scheme, _, address = origins[0].partition("://")
    port = _DEFAULT_PORTS.get(scheme, "")
    return bool(port) and address.removesuffix(port).lower() == request.host.removesuffix(port).lower()


def _host(request: web.Request) -> str:
    """Return the host name or address in the Host header, without the port."""
    host = request.host.rpartition(":")[0] if request.host.count(":") == 1 else request.host
    return host.partition("]")[0].removeprefix("[").lower()


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return (address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None) or address
