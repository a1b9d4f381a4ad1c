"""Logging in to the dashboard with a one-time code or an admin token, and logging out."""

import msgspec
from aiohttp import web

from relay.api.logins import Logins
from relay.api.operators import OPERATOR
from relay.api.responses import respond
from relay.errors import RelayError
from relay.ui.markup import join, tag
from relay.ui.page import Visit
from relay.ui.parts import command

PATH = "/login"
"""Path of the login below `/ui`. It is an endpoint only of the dashboard's own script."""


LARGEST_BODY = 4096
"""Bytes that are read of a request without a login."""


class LoginBody(msgspec.Struct, kw_only=True):
    """A code or a token."""

    code: str = ""
    token: str = ""


def page(visit: Visit) -> web.Response:
    """Return the page for a browser that has not logged in.

    The script reads a code from the address, or sends the token that the operator pastes.
    """
    hint = join("On the machine of the relay, run ", command("ui"), ". It opens this page and logs you in.")
    token = tag(
        "label", tag("span", "Or paste one of ", tag("code", "[admin] tokens")),
        tag("input", type="password", name="token", required=True, autocomplete="current-password"),
    )  # fmt: skip
    form = tag("form", token, tag("button", "Log in"), data_login=True, class_="scripted login")
    without = tag("noscript", tag("p", "Logging in needs JavaScript; the other pages do not."))
    return visit.page("Log in", tag("p", hint), form, without, status=401)


async def _start_of(request: web.Request) -> bytes:
    """Return the body of a request, at most `LARGEST_BODY` bytes of it."""
    read = b""
    while part := await request.content.read(LARGEST_BODY - len(read)):
        read += part
    return read


def routes(logins: Logins, path: str) -> list[web.RouteDef]:
    """Return the endpoints for the script; `relay.api.auth.Access` has checked where requests come from."""

    async def state(request: web.Request) -> web.Response:
        return respond({"logged_in": OPERATOR in request})

    async def log_in(request: web.Request) -> web.Response:
        try:
            body = msgspec.json.decode(await _start_of(request), type=LoginBody)
        except (ValueError, RecursionError) as error:
            raise RelayError(f"invalid body: {error}", hint='send {"code": "…"} or {"token": "…"}') from None
        return await logins.log_in(request, code=body.code, token=body.token)

    async def log_out(request: web.Request) -> web.Response:
        return await logins.log_out(request)

    return [web.get(path, state), web.post(path, log_in), web.delete(path, log_out)]
