"""What every resource of the API has in common: JSON out, questions read strictly, errors with a hint."""

import asyncio
import logging
import sqlite3
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from typing import Any, TypeVar

import msgspec
from aiohttp import web

from relay.api.query_params import Q, read_query
from relay.base.json_text import encode
from relay.config.problems import ConfigError
from relay.errors import (
    BusyError,
    RelayError,
    RestartNeededError,
    StorageError,
    StorageUnavailableError,
    UnknownError,
)
from relay.store.writer import DAMAGED, TRANSIENT

T = TypeVar("T")

log = logging.getLogger("relay.api")

WISH = web.RequestKey("wish", str)
"""What a request asks for in its body, for the log of changes; only of bodies whose every field is known."""

DRY = web.RequestKey("dry", bool)
"""Whether it only counts, and changes nothing."""

BEGUN = web.RequestKey("begun", bool)
"""Whether its answer has begun: a second one would be read as a piece of it."""

LINES = "application/x-ndjson"
"""The content type of a line of JSON after the other."""

_HUNG_UP = 499  # as nginx has it in its log; nobody hears it
_LONGEST_WISH = 400  # characters of it in the log

_encode = msgspec.json.Encoder(enc_hook=str).encode

_ANSWERS: Mapping[type[RelayError], tuple[int, str]] = {
    UnknownError: (404, "not_found"),
    RestartNeededError: (409, "restart_needed"),
    BusyError: (409, "busy"),
    StorageError: (503, "unavailable"),
    RelayError: (400, "bad_request"),
}


def say(value: Any, status: int = 200) -> web.Response:
    """Answer with a value as JSON."""
    return web.Response(status=status, body=encode(value, _encode), content_type="application/json")


def refuse(status: int, code: str, message: str, hint: str = "", **more: Any) -> web.Response:
    """Answer with `{"error": {"code", "message", "hint"}}`; the hint is what to try next."""
    return say({"error": {"code": code, "message": message, "hint": hint, **more}}, status)


def error_of(error: RelayError) -> tuple[int, dict[str, str]]:
    """Return the status that an error has, and its words."""
    status, code = next(answer for kind, answer in _ANSWERS.items() if isinstance(error, kind))
    return status, {"code": code, "message": error.message, "hint": error.hint}


def query_of(request: web.Request, type_: type[Q]) -> Q:
    """Return the query parameters of a request.

    Raises:
        RelayError: a parameter is unknown or has an invalid value.
    """
    return read_query(dict(request.query), type_)


async def body_of(request: web.Request, wish: type[T], hint: str) -> T:
    """Read what a request's body asks for.

    Raises:
        RelayError: it is not what is expected; `hint` says what that is.
    """
    try:
        asked = msgspec.json.decode(await request.read(), type=wish)
    except (ValueError, RecursionError) as error:  # msgspec's and Unicode's are ValueErrors
        raise RelayError(f"the body is wrong: {error}", hint=hint) from None
    if isinstance(asked, msgspec.Struct):
        request[DRY] = bool(getattr(asked, "dry_run", False))
        request[WISH] = msgspec.json.encode(asked).decode()[:_LONGEST_WISH]
    return asked


@web.middleware
async def errors(request: web.Request, handler: Any) -> web.StreamResponse:
    """Say every error in the API's own words; an answer that has begun is broken off instead."""
    try:
        response: web.StreamResponse = await _unless_begun(request, handler)
    except web.HTTPException as error:
        hint = "relay --help lists what there is" if error.status == web.HTTPNotFound.status_code else ""
        response = refuse(error.status, error.reason.lower().replace(" ", "_"), error.reason, hint)
        if "Allow" in error.headers:
            response.headers["Allow"] = error.headers["Allow"]
    except ConfigError as error:
        hint = "nothing was changed; correct the file and reload again"
        problems = [msgspec.structs.asdict(problem) for problem in error.problems]
        return refuse(400, "bad_config", error.message, hint, problems=problems)
    except RelayError as error:
        status, told = error_of(error)
        return say({"error": told}, status)
    except ConnectionError:  # nobody is there to be answered any more
        return web.Response(status=_HUNG_UP)
    except Exception as error:
        if isinstance(error, sqlite3.Error) and _is_the_disks(error):
            what = StorageUnavailableError(f"the database cannot be read: {error}", hint="relay doctor")
            status, told = error_of(what)
            return say({"error": told}, status)
        log.exception("%s %s failed", request.method, request.rel_url.raw_path)
        hint = "this is a bug of the relay; its log has the traceback"
        return refuse(500, "internal_error", "The relay could not answer that", hint)
    return response


def _is_the_disks(error: sqlite3.Error) -> bool:
    """Say whether the file, its disk or another program is to blame, and not a statement of ours."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in TRANSIENT | DAMAGED


async def _unless_begun(request: web.Request, handler: Any) -> web.StreamResponse:
    try:
        return await handler(request)  # type: ignore[no-any-return]
    except Exception as error:
        if not request.get(BEGUN):
            raise
        if not isinstance(error, ConnectionError):
            log.exception("%s %s broke off", request.method, request.rel_url.raw_path)
        if request.transport is not None:
            request.transport.abort()
        raise ConnectionResetError from error


EVERY = 0.5  # seconds between two lines


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
