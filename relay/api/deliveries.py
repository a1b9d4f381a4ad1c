"""Deliveries and their attempts: list, show, retry and cancel them."""

import base64
from typing import Annotated, Any

import msgspec
from aiohttp import web

from relay.api.context import Context
from relay.api.endpoints import IdPage, endpoint
from relay.api.events import load_event
from relay.api.query_params import AttemptsQuery, DeliveriesQuery, Filter, read_field
from relay.api.replays import ReplayView, begin
from relay.api.responses import CountView, respond, selection_of
from relay.api.views import AttemptView, DeliveryShown, DeliveryView, about, list_items, show_delivery
from relay.base.units import parse_rate, render_rate
from relay.errors import RelayError, UnknownError
from relay.jobs.replay import DEFAULT_RATE, ReplayRequest, Retried
from relay.model import Selection
from relay.store import Cancelled


class CancelBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The deliveries to cancel: their ids, or a filter."""

    ids: tuple[str, ...] | None = None
    filter: Filter | None = None
    dry_run: bool = False  # only count


class RetryBody(CancelBody, kw_only=True):
    """The deliveries to retry: their ids, or a filter with a state."""

    rate: str = render_rate(DEFAULT_RATE)


class CancelledView(msgspec.Struct):
    """The result of cancelling deliveries."""

    cancelled: int
    in_flight: int


class RequestView(msgspec.Struct):
    """The request of a delivery."""

    method: str
    url: Annotated[str, about("Scheme and host alone if the URL is a secret.")]
    headers: Annotated[dict[str, str], about("Secrets and signatures are masked.")]
    body: Annotated[str | None, about("The body, if it is UTF-8 text.")]
    body_base64: Annotated[str | None, about("The body otherwise.")]
    grouped: Annotated[bool, about("Whether the relay sends it in one message with other deliveries.")]


class DeliveriesApi:
    """Endpoints under `/api/deliveries` and `/api/attempts`."""

    def __init__(self, context: Context) -> None:
        self._store = context.store
        self._dispatcher = context.dispatcher
        self._clock = context.clock
        self._replays = context.replays
        self._ingest = context.ingest
        self._check_names = context.check_names

    @endpoint(
        "GET", "/api/deliveries", "listDeliveries",
        "List deliveries, newest first; with a filter on events, those of the newest event first.",
        query=DeliveriesQuery, returns=IdPage[DeliveryView],
    )  # fmt: skip
    async def _list(self, _request: web.Request, query: DeliveriesQuery) -> dict[str, Any]:
        return await self._page("deliveries", query)

    @endpoint(
        "GET", "/api/deliveries/{id}", "showDelivery", "Show a delivery with its attempts.",
        returns=DeliveryShown,
    )  # fmt: skip
    async def _show(self, request: web.Request) -> dict[str, Any]:
        return await show_delivery(self._store, request.match_info["id"])

    @endpoint(
        "GET", "/api/deliveries/{id}/request", "showRequest",
        "Show the request that an attempt at a delivery would send now.", returns=RequestView,
    )  # fmt: skip
    async def _request(self, request: web.Request) -> RequestView:
        delivery = await show_delivery(self._store, request.match_info["id"])
        lane = self._dispatcher.lanes.get(delivery["destination"])
        if lane is None:
            raise UnknownError(
                f'the destination "{delivery["destination"]}" is not in config.toml',
                hint="add it, and run: relay reload",
            )
        made = lane.preview(await load_event(self._store, delivery["event_id"]))
        try:
            text, encoded = made.body.decode(), None
        except UnicodeDecodeError:
            text, encoded = None, base64.b64encode(made.body).decode()
        return RequestView(
            method=made.method,
            url=made.url,
            headers=made.headers,
            body=text,
            body_base64=encoded,
            grouped=delivery["group_key"] is not None,
        )

    @endpoint(
        "GET", "/api/attempts", "listAttempts", "List attempts, newest first.",
        query=AttemptsQuery, returns=IdPage[AttemptView],
    )  # fmt: skip
    async def _attempts(self, _request: web.Request, query: AttemptsQuery) -> dict[str, Any]:
        return await self._page("attempts", query)

    async def _page(self, kind: str, query: DeliveriesQuery | AttemptsQuery) -> dict[str, Any]:
        filters = msgspec.structs.asdict(query)
        return await list_items(
            self._store,
            kind,
            limit=filters.pop("limit"),
            cursor=filters.pop("cursor"),
            answers=filters.pop("answer", True),
            filters=filters,
            now=self._clock.wall(),
            sources=self._ingest.mounts.keys(),
            destinations=self._dispatcher.lanes.keys(),
        )

    @endpoint(
        "POST", "/api/deliveries/retry", "retryDeliveries",
        "Send finished deliveries again, make pending ones due now, or count them.",
        body=RetryBody, returns=CountView | Retried | ReplayView, also={201: ReplayView},
    )  # fmt: skip
    async def _retry(self, _request: web.Request, body: RetryBody) -> web.Response:
        selection = selection_of("ids", body.ids, body.filter, self._clock)
        if selection is None:
            named = await self._store.queries.name_deliveries(body.ids or ())
            return respond(CountView(len(named)) if body.dry_run else await self._replays.retry(named))
        await self._check_names(selection)
        if selection.state is None:
            hint = "with pending, deliveries become due now; with any other state, they are sent again"
            raise RelayError("the filter needs a state", hint=hint)
        if selection.state != "pending" and body.dry_run:
            read_field("rate", parse_rate, body.rate)
            return respond(CountView(await self._replays.count_deliveries(selection)))
        if selection.state != "pending":
            replay = ReplayRequest(what=selection, rate=read_field("rate", parse_rate, body.rate))
            return await begin(self._replays, replay, dry_run=False)
        count = hurried = 0
        async for page in self._store.queries.pending(selection):
            count += len(page)
            hurried += 0 if body.dry_run else await self._store.deliveries.make_due(page)
        if body.dry_run:
            return respond(CountView(count))
        return respond(Retried(created=0, hurried=hurried, skipped=max(0, count - hurried)))

    @endpoint(
        "POST", "/api/deliveries/cancel", "cancelDeliveries", "Cancel pending deliveries, or count them.",
        body=CancelBody, returns=CountView | CancelledView,
    )  # fmt: skip
    async def _cancel(self, _request: web.Request, body: CancelBody) -> CountView | CancelledView:
        selection = selection_of("ids", body.ids, body.filter, self._clock)
        if selection is None:
            named = await self._store.queries.name_deliveries(body.ids or ())
            pending = [one.id for one in named if one.state == "pending"]
            count, done = (
                len(pending),
                Cancelled() if body.dry_run else await self._store.deliveries.cancel(pending),
            )
        else:
            await self._check_names(selection)
            count, done = await self._cancel_selection(selection, dry_run=body.dry_run)
        return CountView(count) if body.dry_run else CancelledView(done.ended, done.in_flight)

    async def _cancel_selection(self, selection: Selection, *, dry_run: bool) -> tuple[int, Cancelled]:
        if selection.state not in (None, "pending"):
            raise RelayError(
                f"{selection.state} deliveries have already ended", hint="cancel pending deliveries only"
            )
        count = ended = in_flight = 0
        async for page in self._store.queries.pending(selection):
            count += len(page)
            if not dry_run:
                done = await self._store.deliveries.cancel(page)
                ended, in_flight = ended + done.ended, in_flight + done.in_flight
        return count, Cancelled(ended, in_flight)
