"""Destinations for operators: what is owed, since when, why it does not move; and steering them."""

from typing import Any

import msgspec
from aiohttp import web

from relay.api.context import Parts
from relay.api.responses import say
from relay.api.views import ABSENT, counted, moments, owed_to, unknown
from relay.delivery.lane import Lane
from relay.delivery.ping import Pings
from relay.model import DestinationState


class DestinationsApi:
    """The part of the admin API under `/api/destinations`."""

    def __init__(self, parts: Parts) -> None:
        self._store = parts.store
        self._engine = parts.engine
        self._clock = parts.clock
        self._pings = Pings(parts.clock)

    def routes(self) -> list[web.RouteDef]:
        """Return what to mount."""
        return [
            web.get("/api/destinations", self._list),
            web.get("/api/destinations/{name}", self._show),
            web.post("/api/destinations/{name}/{verb:pause|resume|disable|enable}", self._steer),
            web.post("/api/destinations/{name}/test", self._test),
        ]

    async def _list(self, _request: web.Request) -> web.Response:
        counts = await self._store.ledger.totals()
        items = [
            {**_destination(lane), **counted(counts.get(lane.name))} for lane in self._engine.lanes.values()
        ]
        items += [
            {**self._absent(name), **counted(books)}
            for name, books in counts.items()
            if name not in self._engine.lanes and books.pending
        ]
        return say({"items": items, "next_cursor": None})

    async def _show(self, request: web.Request) -> web.Response:
        counts, name = await self._store.ledger.totals(), request.match_info["name"]
        if name not in self._engine.lanes and name in counts:
            told = self._absent(name)
        else:
            lane = self._lane(request)
            told = {**_destination(lane), **_standing(lane)}
        return say({**told, **await owed_to(self._store, name, counts, self._clock.steady())})

    async def _steer(self, request: web.Request) -> web.Response:
        lane = self._lane(request)
        now, state = self._clock.wall(), lane.health.state
        changes: dict[str, dict[str, Any]] = {
            "pause": {"paused": True},
            "resume": {"paused": False},
            "disable": {"disabled_at": state.disabled_at or now, "disabled_reason": "operator"},
            "enable": {"disabled_at": None, "disabled_reason": None},
        }
        change = changes[request.match_info["verb"]]
        await lane.set_state(DestinationState(**{**msgspec.structs.asdict(state), **change}))
        return say(_destination(lane))

    async def _test(self, request: web.Request) -> web.Response:
        return say(await self._pings.send(self._lane(request)))

    def _absent(self, name: str) -> dict[str, Any]:
        return {"name": name, "held": ABSENT, "in_flight": self._engine.in_flight(name)}

    def _lane(self, request: web.Request) -> Lane:
        name = request.match_info["name"]
        if name not in self._engine.lanes:
            raise unknown("destination", name, self._engine.lanes)
        return self._engine.lanes[name]


def _destination(lane: Lane) -> dict[str, Any]:
    return {"name": lane.name, "held": lane.held, "in_flight": lane.in_flight}


def _standing(lane: Lane) -> dict[str, Any]:
    """Say why it is not moving; without the URL, which may hold a token."""
    standing = lane.health
    return {
        "events": lane.config.events,
        **moments(standing.state, standing.held_until if lane.held else None),
    }
