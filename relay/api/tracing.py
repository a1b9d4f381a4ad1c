"""Every request of operators has an id: in its answer, and in the log of what it changed."""

from typing import Any

from aiohttp import web

from relay.api.responses import BEGUN
from relay.base.clock import Clock
from relay.base.ids import given_id, request_id

HEADER = "X-Request-Id"
REQUEST_ID = web.RequestKey("request_id", str)


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
