"""Server-sent events on their way out: to as many as want to follow, and no longer than they are there."""

import asyncio
from typing import TypeVar

from aiohttp import web

from relay.api.followers import MOST, Follower, Followers
from relay.api.responses import refuse

T = TypeVar("T")

HEARTBEAT = 15.0
"""Seconds of silence after which a comment is sent: a reader whose machine is gone shows by it."""

LOOK = 1.0  # seconds between looks whether a reader that hears nothing is still there

_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-store",
    "X-Accel-Buffering": "no",  # nginx would keep lines until its buffer is full
}
_GREETING = b": hookferry\n\n"  # aiohttp holds the head back until there is something to send with it
_STILL_HERE = b": still here\n\n"


async def stream(request: web.Request, followers: Followers[T], wish: T) -> web.StreamResponse:
    """Send what comes for one follower, until it goes or the relay does."""
    if followers.ended:
        return refuse(503, "draining", "The relay is stopping", "ask again once it is back")
    if followers.full:
        hint = "end one first: every `relay tail` and `relay top` that runs is one"
        return refuse(503, "too_many_followers", f"{MOST} follow this already", hint)
    transport = request.transport
    if transport is None:
        raise ConnectionResetError
    with followers.joined(wish, transport.abort) as follower:
        response = web.StreamResponse(headers=_HEADERS)
        try:
            await response.prepare(request)
            await _write(response, follower, _GREETING)
            await _follow(response, follower, transport)
        except ConnectionError:
            pass  # it has gone, which is how a stream ends
    return response


async def _follow(response: web.StreamResponse, follower: Follower[T], transport: asyncio.Transport) -> None:
    now = asyncio.get_running_loop().time
    spoken = now()
    while not transport.is_closing():
        ended = follower.ended
        if frames := follower.take():
            await _write(response, follower, frames)
            spoken = now()
        elif ended:
            return
        elif now() - spoken >= HEARTBEAT:
            await _write(response, follower, _STILL_HERE)
            spoken = now()
        else:
            await follower.wait(LOOK)


async def _write(response: web.StreamResponse, follower: Follower[T], frames: bytes) -> None:
    follower.writing = True
    try:
        await response.write(frames)
    finally:
        follower.writing = False
