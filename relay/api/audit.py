"""The audit trail: changes over the admin API with their operators, in the log and in the store.

Every change is logged under `relay.audit`, with any `[log] level`. The store keeps the latest changes for
`GET /api/audit`. It leaves out requests beyond an operator's scope, which change nothing: they could displace
the changes.
"""

import asyncio
import logging
from http import HTTPStatus
from typing import Annotated, Any

import msgspec
from aiohttp import web

from relay.api.auth import READ_ONLY, REQUEST_ID
from relay.api.context import Context
from relay.api.endpoints import Page, endpoint
from relay.api.operators import OPERATOR, SUSPECT
from relay.api.query_params import AuditQuery, read_filters
from relay.api.responses import DRY_RUN, LOGGED_BODY, STORED_BODY
from relay.api.views import Time, about
from relay.base.clock import Clock, rfc3339
from relay.model import AuditEntry
from relay.process.logs import fields
from relay.store import Audit

log = logging.getLogger("relay.audit")
log.setLevel(logging.INFO)

MOST = 10_000
"""Entries in the store."""

MOST_WAITING = 100
"""Entries that wait for the store; further ones are only in the log."""

PATIENCE = 5.0
"""Seconds for which a response waits until its entry is stored."""


class AuditView(msgspec.Struct):
    """One change over the admin API."""

    at: Time
    operator: Annotated[str, about("Name of the user, the token, or the user that a proxy named.")]
    access: Annotated[
        str,
        about(
            "How the name was proved: `socket`, `token`, `login` to the dashboard, or `proxy`; `none`: not "
            "at all, because a login was refused after too many wrong tokens."
        ),
    ]
    remote: Annotated[str, about("Address of the client; empty on the socket.")]
    method: str
    path: str
    body: Annotated[
        str,
        about(
            "The first 400 characters; `subject` and `where` of a filter are masked; empty if it may contain "
            "a secret."
        ),
    ]
    status: Annotated[int | None, about("Of the response; null: the client disconnected before it.")]
    request_id: str
    node: Annotated[str, about("The node that handled it.")]


class Trail:
    """Notes each change."""

    def __init__(self, store: Audit | None, clock: Clock, node: str = "") -> None:
        """Write entries to this store and to the log; None: only to the log."""
        self._store = store
        self._clock = clock
        self._node = node
        self._adding: set[asyncio.Task[None]] = set()

    def middleware(self) -> Any:
        """Return the middleware that notes the operator, the request and the status of its response."""

        @web.middleware
        async def note(request: web.Request, handler: Any) -> web.StreamResponse:
            if request.method in READ_ONLY:
                response: web.StreamResponse = await handler(request)
                return response
            status = adding = None
            try:
                response = await handler(request)
                status = response.status
            finally:
                if (OPERATOR in request or SUSPECT in request) and not request.get(DRY_RUN):
                    adding = self._note(request, status)
            if adding is not None and status is not None:
                await asyncio.wait((adding,), timeout=PATIENCE)
            return response

        return note

    def _note(self, request: web.Request, status: int | None) -> "asyncio.Task[None] | None":
        """Log a change, and begin to store it."""
        operator, body = request.get(OPERATOR) or request[SUSPECT], request.get(LOGGED_BODY, "")
        outcome = "client disconnected" if status is None else str(status)
        text, path = f" {body}" if body else "", _path(request)
        extra = fields(request_id=request.get(REQUEST_ID), outcome=outcome)
        log.info("%s: %s %s%s: %s", operator, request.method, path, text, outcome, extra=extra)
        if self._store is None or status == HTTPStatus.FORBIDDEN or len(self._adding) >= MOST_WAITING:
            return None
        entry = AuditEntry(
            at=self._clock.wall(),
            operator=operator.name,
            access=operator.access,
            remote=operator.remote,
            method=request.method,
            path=path,
            body=request.get(STORED_BODY, ""),
            status=status,
            request_id=request.get(REQUEST_ID, ""),
            node=self._node,
        )
        task = asyncio.create_task(self._add(self._store, entry))
        self._adding.add(task)
        task.add_done_callback(self._adding.discard)
        return task

    async def _add(self, store: Audit, entry: AuditEntry) -> None:
        try:
            await store.add(entry, MOST)
        except Exception as error:  # noqa: BLE001 - of the database engine; the log has the entry
            log.warning("the audit trail could not be stored: %s", error)


def _path(request: web.Request) -> str:
    """Return the raw path, which has no line breaks. The query may contain secrets and is left out."""
    return request.raw_path.partition("?")[0]


class AuditApi:
    """The endpoint `/api/audit`."""

    def __init__(self, context: Context) -> None:
        self._store = context.store
        self._clock = context.clock

    @endpoint(
        "GET", "/api/audit", "listAudit", "List changes over the admin API, newest first.",
        query=AuditQuery, returns=Page[AuditView],
    )  # fmt: skip
    async def _list(self, _request: web.Request, query: AuditQuery) -> dict[str, Any]:
        filters = msgspec.structs.asdict(query)
        limit, cursor = filters.pop("limit"), filters.pop("cursor")
        wanted = read_filters("audit", filters, self._clock.wall())
        page, after = await self._store.audit.page(limit=limit, cursor=cursor, **wanted)
        items = [{**msgspec.structs.asdict(each), "at": rfc3339(each.at)} for each in page]
        return {"items": items, "next_cursor": after}
