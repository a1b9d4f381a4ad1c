"""Long work that an operator asks for: done while its request lasts, telling how far it is line by line."""

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from typing import Any, TypeVar

import msgspec
from aiohttp import web

from relay.api.responses import LINES, error_of, say
from relay.errors import RelayError

T = TypeVar("T")

EVERY = 0.5  # seconds between two lines

_encode = msgspec.json.Encoder(enc_hook=str).encode


async def tell(
    request: web.Request,
    work: Coroutine[Any, Any, T],
    *,
    progress: Callable[[], Mapping[str, Any]] = dict,
    result: Callable[[T], Any] = lambda done: done,
) -> web.StreamResponse:
    """Answer with lines of JSON: `{"progress": …}` now and then, at last `{"result": …}` or `{"error": …}`.

    What fails before the first line is an ordinary error. Whoever hangs up ends the work: it is
    cancelled at the next line, and what it has done by then stays done.
    """
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait((task,), timeout=EVERY)
        if task.done():
            answer = say({"result": result(await task)})
            answer.content_type = LINES
            return answer
        return await _tell(request, task, progress, result)
    finally:
        if not task.done():
            task.cancel()
            with suppress(asyncio.CancelledError, RelayError):
                await task


async def _tell(
    request: web.Request,
    task: "asyncio.Future[T]",
    progress: Callable[[], Mapping[str, Any]],
    result: Callable[[T], Any],
) -> web.StreamResponse:
    lines = web.StreamResponse(headers={"Content-Type": LINES, "Cache-Control": "no-store"})
    await lines.prepare(request)
    with suppress(ConnectionError):  # nobody listens any more
        while not task.done():
            await lines.write(_encode({"progress": progress()}) + b"\n")
            await asyncio.wait((task,), timeout=EVERY)
        try:
            last = {"result": result(await task)}
        except RelayError as error:
            last = {"error": error_of(error)[1]}
        await lines.write(_encode(last) + b"\n")
        await lines.write_eof()
    return lines
