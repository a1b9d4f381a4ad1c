"""Shared by all endpoints: JSON responses, errors with a hint, request bodies, and lines of progress."""

import asyncio
import logging
import math
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import msgspec
from aiohttp import web

from relay.api.query_params import FIELDS, Filter
from relay.base.clock import Clock
from relay.base.json_text import encode
from relay.config.problems import ConfigError
from relay.errors import (
    BusyError,
    ForbiddenError,
    RelayError,
    RestartNeededError,
    SetInConfigError,
    StorageError,
    StorageUnavailableError,
    ThrottledError,
    UnknownError,
    UnsupportedError,
)
from relay.model import Selection
from relay.store.opening import is_storage_failure

T = TypeVar("T")

log = logging.getLogger("relay.api")

LOGGED_BODY = web.RequestKey("logged_body", str)
"""The request body for the log of changes; only of bodies without unknown fields."""

STORED_BODY = web.RequestKey("stored_body", str)
"""The request body for the audit trail, without values that may identify a person."""

DRY_RUN = web.RequestKey("dry_run", bool)
"""Whether the request only counts and changes nothing."""

STARTED = web.RequestKey("started", bool)
"""Whether the response has started. A second response would be read as part of it."""

LINES = "application/x-ndjson"
"""Content type of lines of JSON."""

EVERY = 0.5  # seconds between two lines of progress

_CLIENT_CLOSED = 499  # nginx logs this status too; nobody receives it
_LONGEST_LOGGED = 400  # characters of a request body in the log

_encode = msgspec.json.Encoder(enc_hook=str).encode

_STATUSES: Mapping[type[RelayError], tuple[int, str]] = {
    ForbiddenError: (403, "forbidden"),
    UnknownError: (404, "not_found"),
    RestartNeededError: (409, "restart_needed"),
    BusyError: (409, "busy"),
    SetInConfigError: (409, "set_in_config"),
    UnsupportedError: (409, "unsupported"),
    ThrottledError: (429, "too_many_requests"),
    StorageError: (503, "unavailable"),
    RelayError: (400, "bad_request"),
}


class CountView(msgspec.Struct):
    """The result of a dry run."""

    count: int


def respond(value: Any, status: int = 200) -> web.Response:
    """Return a response with a value as JSON."""
    return web.Response(status=status, body=encode(value, _encode), content_type="application/json")


def error_response(status: int, code: str, message: str, hint: str = "", **more: Any) -> web.Response:
    """Return a response with `{"error": {"code", "message", "hint"}}`; the hint is the next step."""
    return respond({"error": {"code": code, "message": message, "hint": hint, **more}}, status)


def error_of(error: RelayError) -> tuple[int, dict[str, str]]:
    """Return the status and the JSON of an error."""
    status, code = next(answer for kind, answer in _STATUSES.items() if isinstance(error, kind))
    return status, {"code": code, "message": error.message, "hint": error.hint}


async def body_of(request: web.Request, type_: type[T], *, optional: bool = False) -> T:
    """Return the decoded request body; with `optional`, an empty body counts as `{}`.

    Raises:
        RelayError: the body is not valid JSON, or does not match `type_`.
    """
    try:
        content = await request.read()
        body = msgspec.json.decode(b"{}" if optional and not content else content, type=type_)
    except (ValueError, RecursionError) as error:  # ValueError: of msgspec and of invalid UTF-8
        raise RelayError(f"invalid body: {error}", hint=_fields_of(type_)) from None
    if isinstance(body, msgspec.Struct) and body.__struct_config__.forbid_unknown_fields:
        request[DRY_RUN] = bool(getattr(body, "dry_run", False))
        text = msgspec.json.encode(body).decode()
        request[LOGGED_BODY] = "" if text == "{}" else text[:_LONGEST_LOGGED]
        request[STORED_BODY] = "" if text == "{}" else _anonymous(text)[:_LONGEST_LOGGED]
    return body


def _anonymous(text: str) -> str:
    """Return a body with its filter's `subject` and `where` masked.

    The store keeps the audit trail longer than the events that `relay events delete --subject` deletes.
    """
    content = msgspec.json.decode(text)
    filter_ = content.get("filter")
    masked = {name: "<masked>" for name in ("subject", "where") if filter_ and name in filter_}
    return text if not masked else msgspec.json.encode(content | {"filter": filter_ | masked}).decode()


def _fields_of(type_: Any) -> str:
    names = getattr(type_, "__struct_encode_fields__", ())
    filters = f"; fields of a filter: {FIELDS}" if "filter" in names else ""
    return f"send a JSON object with the fields {', '.join(names)}{filters}"


def check_selected_once(ids_name: str, ids: Sequence[str] | None, filter_: Filter | None) -> None:
    """Check that a body selects by ids or by a filter.

    Raises:
        RelayError: it has both, or neither.
    """
    if (ids is None) == (filter_ is None):
        both = "both are set" if ids is not None else "neither is set"
        raise RelayError(
            f'send either "{ids_name}" or "filter"', hint=f"{both}; fields of a filter: {FIELDS}"
        )


def selection_of(
    ids_name: str, ids: Sequence[str] | None, filter_: Filter | None, clock: Clock
) -> Selection | None:
    """Return the selection of a body's filter, None if the body has ids.

    Raises:
        RelayError: the body has both or neither, or the filter is empty or invalid.
    """
    check_selected_once(ids_name, ids, filter_)
    return None if filter_ is None else filter_.selection(clock)


@web.middleware
async def errors(request: web.Request, handler: Any) -> web.StreamResponse:
    """Turn every error into the API's JSON. A response that has started is cut off instead."""
    try:
        response: web.StreamResponse = await _unless_started(request, handler)
    except web.HTTPException as error:
        hint = (
            "GET /api/openapi.json lists every endpoint"
            if error.status == web.HTTPNotFound.status_code
            else ""
        )
        response = error_response(error.status, error.reason.lower().replace(" ", "_"), error.reason, hint)
        if "Allow" in error.headers:
            response.headers["Allow"] = error.headers["Allow"]
    except ConfigError as error:
        hint = "nothing was changed; correct the file and reload again"
        problems = [msgspec.structs.asdict(problem) for problem in error.problems]
        return error_response(400, "bad_config", error.message, hint, problems=problems)
    except RelayError as error:
        status, described = error_of(error)
        refused = respond({"error": described}, status)
        if isinstance(error, ThrottledError):
            refused.headers["Retry-After"] = str(math.ceil(error.seconds))
        return refused
    except ConnectionError:  # the client has disconnected
        return web.Response(status=_CLIENT_CLOSED)
    except Exception as error:
        if is_storage_failure(error):
            failure = StorageUnavailableError(f"cannot read the database: {error}", hint="run: relay doctor")
            status, described = error_of(failure)
            return respond({"error": described}, status)
        log.exception("%s %s failed", request.method, request.rel_url.raw_path)
        hint = "this is a bug in the relay; the traceback is in its log"
        return error_response(500, "internal_error", "internal error", hint)
    return response


async def _unless_started(request: web.Request, handler: Any) -> web.StreamResponse:
    try:
        return await handler(request)  # type: ignore[no-any-return]
    except Exception as error:
        if not request.get(STARTED):
            raise
        if not isinstance(error, ConnectionError):
            log.exception(
                "%s %s failed after the response had started", request.method, request.rel_url.raw_path
            )
        if request.transport is not None:
            request.transport.abort()
        raise ConnectionResetError from error


async def stream_lines(
    request: web.Request,
    work: Coroutine[Any, Any, T],
    *,
    progress: Callable[[], Mapping[str, Any]] = dict,
    result: Callable[[T], Any] = lambda done: done,
) -> web.StreamResponse:
    """Do long work, and respond with lines of JSON.

    The lines are `{"progress": …}` repeatedly, then `{"result": …}` or `{"error": …}`. A failure before the
    first line is an ordinary error. If the client disconnects, the work is cancelled at the next line; its
    changes so far stay.
    """
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait((task,), timeout=EVERY)
        if task.done():
            answer = respond({"result": result(await task)})
            answer.content_type = LINES
            return answer
        return await _stream_lines(request, task, progress, result)
    finally:
        if not task.done():
            task.cancel()
            with suppress(asyncio.CancelledError, RelayError):
                await task


async def _stream_lines(
    request: web.Request,
    task: "asyncio.Future[T]",
    progress: Callable[[], Mapping[str, Any]],
    result: Callable[[T], Any],
) -> web.StreamResponse:
    lines = web.StreamResponse(headers={"Content-Type": LINES, "Cache-Control": "no-store"})
    await lines.prepare(request)
    with suppress(ConnectionError):  # the client has disconnected
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
