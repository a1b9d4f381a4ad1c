"""Logins to the dashboard: one-time codes, cookies, and how long they are valid.

The store has only digests of codes and cookies. A login that an admin token began is bound to this token: it
ends when the token is removed from `[admin] tokens`, and never has more than the token's current scope.
"""

import hashlib
import hmac
import math
import secrets
from contextlib import suppress
from typing import Annotated

import msgspec
from aiohttp import web

from relay.api.auth import TOKEN, least, origin_scheme
from relay.api.context import Context
from relay.api.endpoints import endpoint
from relay.api.guesses import Guesses
from relay.api.operators import OPERATOR, SUSPECT, Operator
from relay.api.responses import respond
from relay.api.views import Time, about
from relay.base.clock import SECOND, Clock, rfc3339
from relay.config.schema import Admin, AdminToken, Scope
from relay.errors import ForbiddenError, RelayError, StorageError, ThrottledError
from relay.model import Login
from relay.store import Store

CODE_FOR = 60 * SECOND
"""Microseconds for which a code is valid."""

IDLE_FOR = 12 * 3600 * SECOND
"""Microseconds after which an unused login ends."""

VALID_FOR = 7 * 86_400 * SECOND
"""Microseconds after which every login ends."""

MOST = 1000
"""Logins and codes in the store; beyond that, those that were unused for longest end."""

NOTE_EVERY = 300 * SECOND
"""Microseconds between two notes in the store that a login is used."""

_SECURE = "__Host-relay"
"""Name of the cookie on https: browsers then accept it only with `Secure`, for this host, from https."""

_CODE = "code"


class Logins:
    """The logins in the store."""

    def __init__(self, store: Store, clock: Clock, config: Admin) -> None:
        self._store = store
        self._clock = clock
        self._enabled = config.ui
        self._tokens = config.tokens
        self._guesses = Guesses(clock)

    async def find(self, request: web.Request) -> Operator | None:
        """Return the operator of the login in a request's cookie; None: the request has no valid login."""
        found = await self._find(request)
        if found is None:
            return None
        login, scope = found
        return _operator(login.name, scope, request)

    async def _find(self, request: web.Request) -> tuple[Login, Scope] | None:
        for name in (_SECURE, _plain(request)):
            value = request.cookies.get(name)
            if value is None or not self._enabled:
                continue
            login = await self._store.logins.find(_digest(name, value))
            now = self._clock.wall()
            if login is None or now - login.seen_at >= IDLE_FOR or now - login.created_at >= VALID_FOR:
                continue
            scope = self._scope(login, value)
            if scope is None:
                continue
            if now - login.seen_at >= NOTE_EVERY:
                with suppress(StorageError):  # a full disk must not lock operators out
                    await self._store.logins.note_use(login.digest, now)
            return login, scope
        return None

    def _scope(self, login: Login, value: str) -> Scope | None:
        """Return the current scope of a login or code; None: the token that began it is gone."""
        scope: Scope = msgspec.convert(login.scope, Scope)
        if login.binding is None:
            return scope
        token = self._token_of(login.binding, value)
        return None if token is None else least(scope, token.scope)

    def _token_of(self, binding: bytes, value: str) -> AdminToken | None:
        for token in self._tokens:
            if hmac.compare_digest(_binding(value, token), binding):
                return token
        return None

    async def new_code(self, name: str, scope: Scope, token: AdminToken | None) -> str:
        """Return a code that one browser may exchange for a login within `CODE_FOR`."""
        code = secrets.token_urlsafe(16)
        await self._add(_CODE, code, name, scope, token)
        return code

    async def log_in(self, request: web.Request, *, code: str = "", token: str = "") -> web.Response:
        """Begin a login with a code or an admin token, and return the response with its cookie.

        Raises:
            ForbiddenError: the code was used, is older than `CODE_FOR` or unknown; or the token is unknown.
            ThrottledError: the client, or all clients together, sent too many wrong tokens.
        """
        operator, chosen = await self._of_code(code) if code else self._checked_token(request, token)
        is_secure = origin_scheme(request) == "https"
        name, value = _SECURE if is_secure else _plain(request), secrets.token_urlsafe(32)
        await self._add(name, value, operator[0], operator[1], chosen)
        request[OPERATOR] = _operator(*operator, request)
        response = respond({"name": operator[0], "scope": operator[1]})
        response.set_cookie(name, value, path="/", httponly=True, samesite="Strict", secure=is_secure)
        return response

    async def _of_code(self, code: str) -> tuple[tuple[str, Scope], AdminToken | None]:
        digest = _digest(_CODE, code)
        found = await self._store.logins.find(digest)  # strangers may guess, but not write
        if found is not None:
            found = await self._store.logins.take(digest)
        scope = None if found is None else self._scope(found, code)
        if found is None or scope is None or self._clock.wall() - found.created_at >= CODE_FOR:
            raise ForbiddenError(
                "this code was used already, or is older than a minute", hint="run again: relay ui"
            )
        token = None if found.binding is None else self._token_of(found.binding, code)
        return (found.name, scope), token

    def _checked_token(self, request: web.Request, given: str) -> tuple[tuple[str, Scope], AdminToken]:
        """Return the name, the scope and the token that a client sent, unless it has tried too many."""
        seconds = self._guesses.wait(request.remote)
        if seconds:
            if self._guesses.may_report():
                request[SUSPECT] = Operator(
                    name="unknown",
                    scope="read",
                    access="none",
                    label="unknown",
                    remote=request.remote or "gone",
                )
            raise ThrottledError(
                "too many logins with a wrong token",
                seconds=seconds,
                hint=f"try again in {math.ceil(seconds)} s, or run on the machine of the relay: relay ui",
            )
        try:
            return self._of_token(given)
        except ForbiddenError:
            self._guesses.note(request.remote)
            raise

    def _of_token(self, given: str) -> tuple[tuple[str, Scope], AdminToken]:
        presented = given.strip().encode("utf-8", "surrogateescape")
        matches = [hmac.compare_digest(each.secret.reveal().encode(), presented) for each in self._tokens]
        if not any(matches):
            raise ForbiddenError("unknown token", hint="use one of [admin] tokens in config.toml")
        at = matches.index(True)
        token = self._tokens[at]
        token.secret.usage.count += 1
        return (token.title or f"token {at + 1}", token.scope), token

    async def log_out(self, request: web.Request) -> web.Response:
        """End the login of a request, and return the response that deletes its cookie."""
        response = respond({})
        for name in (_SECURE, _plain(request)):
            if (value := request.cookies.get(name)) is not None:
                await self._store.logins.take(_digest(name, value))
                response.del_cookie(name, path="/", httponly=True, samesite="Strict", secure=name == _SECURE)
        return response

    async def _add(self, kind: str, value: str, name: str, scope: Scope, token: AdminToken | None) -> None:
        now = self._clock.wall()
        binding = None if token is None else _binding(value, token)
        login = Login(_digest(kind, value), name, scope, binding, now, now)
        await self._store.logins.add(login, before=now - IDLE_FOR, most=MOST)


def _operator(name: str, scope: Scope, request: web.Request) -> Operator:
    remote = request.remote or "gone"
    return Operator(name=name, scope=scope, access="login", label=f"{name} (dashboard)", remote=remote)


def _plain(request: web.Request) -> str:
    """Return the name of the cookie on http. Browsers send cookies to each port of a host."""
    host, _, port = request.host.rpartition(":")
    return f"relay-{port}" if host and port.isdecimal() else "relay-80"


def _digest(kind: str, value: str) -> bytes:
    """Return the digest of a code or cookie for the store. A cookie is valid only under its own name."""
    return hashlib.sha256(f"{kind}={value}".encode("utf-8", "surrogateescape")).digest()


def _binding(value: str, token: AdminToken) -> bytes:
    """Return a digest of a token and a cookie or code; without the cookie or code, it proves nothing."""
    key = value.encode("utf-8", "surrogateescape")
    return hmac.digest(key, token.secret.reveal().encode(), "sha256")


class CodeBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The login that a code begins."""

    scope: Annotated[Scope | None, about("Its scope, at most the caller's own, which is the default.")] = None


class CodeView(msgspec.Struct):
    """A one-time code for a login to the dashboard."""

    code: str
    url: Annotated[str, about("Address of the dashboard with the code.")]
    scope: Scope
    expires_at: Time


class EndedView(msgspec.Struct):
    """The logins that were ended."""

    ended: Annotated[int, about("Number of logins and unused codes.")]


class LoginsApi:
    """Endpoints under `/api/logins`."""

    def __init__(self, context: Context) -> None:
        self._logins = Logins(context.store, context.clock, context.state.config.admin)
        self._store = context.store
        self._clock = context.clock
        self._state = context.state
        self._addresses = context.addresses

    @endpoint(
        "POST", "/api/logins", "createLogin", "Create a one-time code for a login to the dashboard.",
        body=CodeBody, optional_body=True, returns=CodeView,
    )  # fmt: skip
    async def _create(self, request: web.Request, body: CodeBody) -> CodeView:
        operator = request[OPERATOR]
        if operator.access not in ("socket", "token"):
            hint = "run `relay ui` on the machine of the relay, or use an admin token"
            raise ForbiddenError("a login to the dashboard cannot begin another one", hint=hint)
        if not self._state.config.admin.ui:
            raise RelayError("the dashboard is off", hint="set `[admin] ui = true` and restart the daemon")
        address = self._addresses.get("admin")
        if address is None:
            hint = "set `[admin] listen`, for example to 127.0.0.1:8081, and restart the daemon"
            raise RelayError("the admin listener is off, so no browser can reach the dashboard", hint=hint)
        scope = operator.scope if body.scope is None else least(operator.scope, body.scope)
        code = await self._logins.new_code(operator.name, scope, request.get(TOKEN))
        for everywhere, here in (("//0.0.0.0:", "//127.0.0.1:"), ("//[::]:", "//[::1]:")):
            address = address.replace(everywhere, here)
        expires_at = rfc3339(self._clock.wall() + CODE_FOR)
        return CodeView(code=code, url=f"{address}/ui/#code={code}", scope=scope, expires_at=expires_at)

    @endpoint(
        "DELETE", "/api/logins", "endLogins", "End all logins to the dashboard.",
        returns=EndedView, scope="admin",
    )  # fmt: skip
    async def _end(self, _request: web.Request) -> EndedView:
        return EndedView(await self._store.logins.clear())
