"""Refused requests: list, show and retry them."""

import asyncio
from typing import Annotated, Any

import msgspec
from aiohttp import web

from relay.api.context import Context
from relay.api.endpoints import Page, endpoint
from relay.api.query_params import MOST_ROWS, RefusedQuery, read_filters
from relay.api.responses import CountView
from relay.api.views import Time, about, unknown
from relay.base.clock import rfc3339
from relay.errors import AlreadyRetried, Refusal, RelayError
from relay.model import Cause, RefusedRequest


class FindingView(msgspec.Struct):
    """One reason for the refusal, found by a diagnosis of the whole request."""

    cause: Annotated[Cause, about("Area of the problem.")]
    where: Annotated[str, about("A header, the body, or a key of config.toml.")]
    what: str
    do: Annotated[str, about("What to do.")]


class RefusedView(msgspec.Struct):
    """A refused request in a list."""

    id: Annotated[str, about("ref_ and a UUIDv7.")]
    at: Time
    source: Annotated[str | None, about("null: no source owns the path.")]
    reason: Annotated[str, about("As the label of `relay_events_rejected_total`.")]
    status: Annotated[int, about("Status of the response.")]
    problem: str
    field: Annotated[str, about("The invalid field of the body, or an empty text.")]
    method: str
    target: Annotated[str, about("Path and query; tokens are masked.")]
    remote: Annotated[str, about("Address of the sender.")]
    size: Annotated[int, about("Bytes of the body.")]
    findings: Annotated[
        list[FindingView], about("The diagnosis, made when the request was refused. It contains no secret.")
    ]
    retried_at: Time | None
    event_id: Annotated[str | None, about("The event that a retry stored.")]


class RefusedShown(RefusedView):
    """A refused request with its headers and body."""

    headers: Annotated[list[tuple[str, str]], about("Tokens are masked.")]
    body: Annotated[str | None, about("Invalid UTF-8 is replaced; null: the body was not kept.")]
    can_retry: Annotated[bool, about("Whether the body was kept.")]


class RefusedRetried(msgspec.Struct):
    """The result of a retry."""

    id: str
    status: Annotated[int, about("Status with which the source answers.")]
    event_id: Annotated[str | None, about("The stored event; null if the request creates none.")]


class RetryIdsBody(msgspec.Struct, forbid_unknown_fields=True):
    """The requests to handle again or to count."""

    ids: Annotated[
        list[str], about("Ids or unique prefixes of ids."), msgspec.Meta(min_length=1, max_length=MOST_ROWS)
    ]
    dry_run: Annotated[bool, about("Only count the requests that can be handled again.")] = False


class RetriedItem(msgspec.Struct):
    """The result for one request."""

    id: str
    event_id: Annotated[str | None, about("The stored event; null if there is none.")] = None
    error: Annotated[str | None, about("Why the request was not accepted.")] = None


class RetriedRequests(msgspec.Struct):
    """The results of a retry of several requests, the oldest first."""

    accepted: Annotated[int, about("Requests that the sources accepted.")]
    refused: Annotated[int, about("Requests that were refused again or cannot be handled again.")]
    items: list[RetriedItem]


class RefusedApi:
    """Endpoints under `/api/refused`."""

    def __init__(self, context: Context) -> None:
        self._store = context.store
        self._ingest = context.ingest
        self._clock = context.clock
        self._retrying = asyncio.Lock()  # held during a retry; the store decides between nodes

    @endpoint(
        "GET", "/api/refused", "listRefused", "List refused requests, newest first.",
        query=RefusedQuery, returns=Page[RefusedView],
    )  # fmt: skip
    async def _list(self, _request: web.Request, query: RefusedQuery) -> dict[str, Any]:
        filters = msgspec.structs.asdict(query)
        limit, cursor = filters.pop("limit"), filters.pop("cursor")
        if query.source is not None and query.source not in self._ingest.mounts:
            raise unknown("source", query.source, self._ingest.mounts)
        wanted = read_filters("refused", filters, self._clock.wall())
        await self._ingest.refused.flush()
        found, cursor = await self._store.refused.page(limit=limit, cursor=cursor, **wanted)
        return {"items": [_view(each) for each in found], "next_cursor": cursor}

    @endpoint(
        "GET", "/api/refused/{id}", "showRefused", "Show a refused request with its headers and body.",
        returns=RefusedShown,
    )  # fmt: skip
    async def _show(self, request: web.Request) -> dict[str, Any]:
        await self._ingest.refused.flush()
        found = await self._store.refused.named(request.match_info["id"])
        return {
            **_view(found),
            "headers": found.headers,
            "body": None if found.body is None else found.body.decode("utf-8", "replace"),
            "can_retry": found.body is not None,
        }

    @endpoint(
        "POST", "/api/refused/{id}/retry", "retryRefused",
        "Handle a refused request again; an accepted one becomes an event.", returns=RefusedRetried,
    )  # fmt: skip
    async def _retry(self, request: web.Request) -> RefusedRetried:
        return await self._handle_again(request.match_info["id"])

    @endpoint(
        "POST", "/api/refused/retry", "retryRefusedRequests",
        "Handle several refused requests again, oldest first, or count those that can be handled.",
        body=RetryIdsBody, returns=CountView | RetriedRequests,
    )  # fmt: skip
    async def _retry_all(self, _request: web.Request, body: RetryIdsBody) -> CountView | RetriedRequests:
        chosen: dict[str, tuple[int, bool]] = {}  # the bodies may be large, so they are not kept here
        for each in body.ids:
            found = await self._store.refused.named(each)
            chosen[found.id] = found.at, found.body is not None and found.event_id is None
        if body.dry_run:
            return CountView(sum(can_retry for _, can_retry in chosen.values()))
        items = []
        for id_ in sorted(chosen, key=lambda id_: chosen[id_]):
            try:
                done = await self._handle_again(id_)
            except RelayError as error:
                items.append(RetriedItem(id_, error=error.message))
            else:
                items.append(RetriedItem(id_, event_id=done.event_id))
        refused = sum(each.error is not None for each in items)
        return RetriedRequests(len(items) - refused, refused, items)

    async def _handle_again(self, given: str) -> RefusedRetried:
        """Pass a kept request to its source again.

        Raises:
            RelayError: it is refused again, was stored by an earlier retry, or was kept without its body.
        """
        async with self._retrying:
            return await self._pass_on(await self._store.refused.named(given))

    async def _pass_on(self, found: RefusedRequest) -> RefusedRetried:
        if found.event_id is not None:
            raise _stored_before(found, found.event_id)
        try:
            response = await self._ingest.retry(found)
        except AlreadyRetried as refusal:  # on another node, since the request was read
            raise _stored_before(found, refusal.event_id) from refusal
        except Refusal as refusal:
            await self._store.refused.note_retry(found.id, self._clock.wall())
            note = f": {refusal.note}" if refusal.note else ""
            raise RelayError(
                f"refused again with {refusal.status}, {refusal.reason}: {refusal.detail}{note}",
                hint=f"correct the plugin or the configuration; relay refused show {found.id}",
            ) from refusal
        if not response.event_id:
            await self._store.refused.note_retry(found.id, self._clock.wall())
        return RefusedRetried(id=found.id, status=response.status, event_id=response.event_id or None)


def _stored_before(request: RefusedRequest, event_id: str) -> RelayError:
    return RelayError(
        f"{request.id} was already retried and stored as an event", hint=f"relay events show {event_id}"
    )


def _view(kept: RefusedRequest) -> dict[str, Any]:
    return {
        "id": kept.id,
        "at": rfc3339(kept.at),
        "source": kept.source,
        "reason": kept.reason,
        "status": kept.status,
        "problem": kept.problem,
        "field": kept.field,
        "method": kept.method,
        "target": kept.target,
        "remote": kept.remote,
        "size": kept.size,
        "findings": [msgspec.structs.asdict(each) for each in kept.findings],
        "retried_at": None if kept.retried_at is None else rfc3339(kept.retried_at),
        "event_id": kept.event_id,
    }
