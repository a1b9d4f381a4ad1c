"""Events and deliveries once more, now or not at all, for operators; and why an event goes where."""

from typing import Any, TypeVar

import msgspec
from aiohttp import web

from relay.api.context import Parts
from relay.api.events import whole
from relay.api.query_params import FIELDS, Filter, read_field
from relay.api.responses import body_of, say
from relay.base.clock import rfc3339
from relay.base.units import parse_rate, render_rate
from relay.errors import RelayError
from relay.jobs.replay import DEFAULT_RATE, Replay, ReplayRequest
from relay.model import Named, Selection
from relay.routing.router import explained
from relay.store import Cancelled

W = TypeVar("W", bound="_Wish")


class _Wish(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What every one of these requests has."""

    filter: Filter | None = None
    dry_run: bool = False  # only count


class _Replay(_Wish, kw_only=True):
    events: tuple[str, ...] | None = None
    to: str | None = None
    rate: str = render_rate(DEFAULT_RATE)


class _Retry(_Wish, kw_only=True):
    ids: tuple[str, ...] | None = None
    rate: str = render_rate(DEFAULT_RATE)


class _Cancel(_Wish, kw_only=True):
    ids: tuple[str, ...] | None = None


class RepeatsApi:
    """The part of the admin API about replays, retries by hand and cancelling."""

    def __init__(self, parts: Parts) -> None:
        self._store = parts.store
        self._clock = parts.clock
        self._replays = parts.replays
        self._state = parts.state

    def routes(self) -> list[web.RouteDef]:
        """Return what to mount."""
        return [
            web.get("/api/events/{id}/explain", self._explain),
            web.post("/api/deliveries/retry", self._retry),
            web.post("/api/deliveries/cancel", self._cancel),
            web.get("/api/replays", self._list),
            web.post("/api/replays", self._start),
            web.get("/api/replays/{id}", self._show),
            web.delete("/api/replays/{id}", self._stop),
        ]

    async def _explain(self, request: web.Request) -> web.Response:
        event = await whole(self._store, request.match_info["id"])
        return say(
            {
                "id": event.public_id,
                "type": event.type,
                "destinations": explained(self._state.router, event, self._state.config.destinations),
            }
        )

    async def _start(self, request: web.Request) -> web.Response:
        asked = await _body(request, _Replay)
        rate = read_field("rate", parse_rate, asked.rate)
        if asked.events is not None:
            _either(asked, "events")
            wish = ReplayRequest(
                what=await self._store.queries.name_events(asked.events), to=asked.to, rate=rate
            )
        else:
            wish = ReplayRequest(what=self._selection(asked, "events"), to=asked.to, rate=rate)
        return await self._begin(wish, dry_run=asked.dry_run)

    async def _begin(self, wish: ReplayRequest, *, dry_run: bool) -> web.Response:
        if dry_run:
            return say({"count": await self._replays.count(wish)})
        return say(_item(await self._replays.start(wish)), 201)

    async def _list(self, _request: web.Request) -> web.Response:
        return say({"items": [_item(replay) for replay in self._replays.all()], "next_cursor": None})

    async def _show(self, request: web.Request) -> web.Response:
        return say(_item(self._replays.get(request.match_info["id"])))

    async def _stop(self, request: web.Request) -> web.Response:
        return say(_item(await self._replays.cancel(request.match_info["id"])))

    async def _retry(self, request: web.Request) -> web.Response:
        asked = await _body(request, _Retry)
        if asked.ids is not None:
            _either(asked, "ids")
            named = await self._store.queries.name_deliveries(asked.ids)
            return say({"count": len(named)} if asked.dry_run else await self._retried(named))
        selection = self._selection(asked, "ids")
        if selection.state is None:
            hint = "dead, expired, cancelled and delivered ones are repeated, pending ones made due now"
            raise RelayError("the filter must name a state", hint=hint)
        if selection.state != "pending":
            wish = ReplayRequest(what=selection, rate=read_field("rate", parse_rate, asked.rate))
            return await self._begin(wish, dry_run=asked.dry_run)
        count = hurried = 0
        async for page in self._store.queries.pending(selection):
            count += len(page)
            hurried += 0 if asked.dry_run else await self._store.deliveries.hurry(page)
        if asked.dry_run:
            return say({"count": count})
        return say({"created": 0, "hurried": hurried, "skipped": max(0, count - hurried)})

    async def _retried(self, named: tuple[Named, ...]) -> dict[str, int]:
        return msgspec.structs.asdict(await self._replays.retry(named))

    async def _cancel(self, request: web.Request) -> web.Response:
        asked = await _body(request, _Cancel)
        if asked.ids is not None:
            _either(asked, "ids")
            named = await self._store.queries.name_deliveries(asked.ids)
            pending = [one.id for one in named if one.state == "pending"]
            count, done = (
                len(pending),
                Cancelled() if asked.dry_run else await self._store.deliveries.cancel(pending),
            )
        else:
            count, done = await self._cancel_selection(self._selection(asked, "ids"), dry_run=asked.dry_run)
        if asked.dry_run:
            return say({"count": count})
        return say({"cancelled": done.ended, "in_flight": done.in_flight})

    async def _cancel_selection(self, selection: Selection, *, dry_run: bool) -> tuple[int, Cancelled]:
        if selection.state not in (None, "pending"):
            raise RelayError(
                f"{selection.state} deliveries have ended", hint="only pending ones can be cancelled"
            )
        count = ended = in_flight = 0
        async for page in self._store.queries.pending(selection):
            count += len(page)
            if not dry_run:
                done = await self._store.deliveries.cancel(page)
                ended, in_flight = ended + done.ended, in_flight + done.in_flight
        return count, Cancelled(ended, in_flight)

    def _selection(self, asked: _Wish, other: str) -> Selection:
        if asked.filter is None:
            raise RelayError(f'neither "{other}" nor "filter" says which', hint="send one of them")
        return asked.filter.selection(self._clock)


async def _body(request: web.Request, wish: type[W]) -> W:
    return await body_of(request, wish, f"it has {', '.join(wish.__struct_fields__)}; a filter {FIELDS}")


def _either(asked: _Wish, other: str) -> None:
    if asked.filter is not None:
        raise RelayError(f'both "{other}" and "filter" say which', hint="send one of them")


def _item(replay: Replay) -> dict[str, Any]:
    return {
        "id": replay.id,
        "state": replay.state,
        "count": replay.total,
        "done": replay.done,
        "created": replay.created,
        "skipped": replay.skipped,
        "to": replay.request.to,
        "rate": render_rate(replay.request.rate),
        "per_second": round(replay.per_second, 1),
        "eta_seconds": None if replay.eta is None else round(replay.eta, 1),
        "reached": None if replay.reached is None else rfc3339(replay.reached),
        "began_at": rfc3339(replay.began_at),
        "ended_at": None if replay.ended_at is None else rfc3339(replay.ended_at),
        "error": replay.error,
    }
