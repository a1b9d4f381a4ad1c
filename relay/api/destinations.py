"""Destinations: list and show them with their backlog, pause, resume, disable, enable and test them."""

import asyncio
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from aiohttp import web

from relay.api.context import Context
from relay.api.endpoints import ErrorView, Page, endpoint
from relay.api.query_params import read_field
from relay.api.views import (
    ABSENT,
    DestinationShown,
    DestinationSteered,
    DestinationView,
    ShardView,
    about,
    backlog_of,
    counted,
    destination_fields,
    pause_of,
    unknown,
)
from relay.base.clock import SECOND
from relay.base.turns import Turns
from relay.base.units import parse_time_span
from relay.config.document import read
from relay.config.problems import KeyPath, dotted
from relay.delivery.destination_health import ELSEWHERE
from relay.delivery.lane import Lane
from relay.delivery.ping import Pings
from relay.errors import RelayError, SetInConfigError, StorageUnavailableError
from relay.model import AttemptResult, Counts

SHOW = "show destinations"
"""The request by which a node asks the others for the destinations that they own."""

PATIENCE = 2.0  # seconds within which the other nodes must answer

_OF_OWNER = (
    "held", "paused_by", "paused_until", "circuit", "failing_since", "disabled_at", "held_until",
    "last_error", "last_error_at", "attempts_per_minute", "failed_per_minute", "certificate_expires",
)  # fmt: skip
"""Fields that only the owner of the lane knows."""


class TimingView(msgspec.Struct):
    """Milliseconds per step; null if the step was not reached or does not apply."""

    dns: float | None
    connect: float | None
    tls: float | None
    first_byte: float | None


class PingView(msgspec.Struct):
    """The result of a test request."""

    destination: str
    id: Annotated[str, about("Its webhook-id.")]
    type: Literal["relay.ping"]
    ok: Annotated[bool, about("Whether the response was a 2xx.")]
    result: Annotated[AttemptResult, about("As in the metrics of attempts.")]
    status: Annotated[int | None, about("null: no response.")]
    error: str | None
    verdict: Annotated[str, about("The outcome that this response would have for a delivery.")]
    hint: Annotated[str, about("What to do next. May be empty.")]
    held: Annotated[str | None, about("Why the destination is still held; null if it is not held.")]
    circuit_closed: Annotated[
        bool, about("Whether this test closed the circuit, or ended a pause that the receiver requested.")
    ]
    signatures: int
    duration_ms: float
    timing_ms: TimingView
    answer: Annotated[str, about("The first KiB of the response body.")]
    truncated: bool


class PingBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The change by a successful test; the body may be missing."""

    close_circuit: Annotated[
        bool, about("Close the circuit after a 2xx; deliveries start at once, one at a time at first.")
    ] = False


class PauseBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """How long a pause lasts; the body may be missing."""

    for_: Annotated[str, about('Duration such as "1h"; without it, the pause has no end.')] | None = (
        msgspec.field(default=None, name="for")
    )


class DestinationsApi:
    """Endpoints under `/api/destinations`."""

    def __init__(self, context: Context) -> None:
        self._store = context.store
        self._dispatcher = context.dispatcher
        self._clock = context.clock
        self._state = context.state
        self._activity = context.activity
        self._owner = context.owner
        self._history = context.history
        self._ledger_check = context.ledger_check
        self._node = context.state.config.cluster.node or socket.gethostname()
        self._nodes = context.store.nodes
        self._nodes.handle(SHOW, self._show_here)
        self._known: Mapping[str, Counts] | None = None  # the ledger as last listed
        self._pings = Pings(context.clock, context.owner.close_circuit)

    @endpoint(
        "GET", "/api/destinations", "listDestinations", "List destinations with their delivery counts.",
        returns=Page[DestinationView],
    )  # fmt: skip
    async def _list(self, _request: web.Request) -> dict[str, Any]:
        totals, lanes = await self._totals(), self._dispatcher.lanes
        recent, turns, items = await self._recent(), Turns(), list[dict[str, Any]]()
        for lane in tuple(lanes.values()):
            items.append({**self._fields(lane, recent), **counted(totals.get(lane.name))})
            await turns.give()
        await self._add_owners(items)
        items += [
            {**self._absent(name), **counted(counts)}
            for name, counts in totals.items()
            if name not in lanes and counts.pending
        ]
        return {"items": items, "next_cursor": None}

    async def _totals(self) -> Mapping[str, Counts]:
        """Return the ledger, or its latest known state while the store cannot be read.

        Raises:
            StorageUnavailableError: the store has been unreadable since the start.
        """
        try:
            self._known = await self._store.ledger.totals()
        except StorageUnavailableError:
            known = self._ledger_check.counts if self._known is None else self._known
            if known is None:
                raise
            return known
        return self._known

    @endpoint(
        "GET", "/api/destinations/{name}", "showDestination", "Show a destination with its backlog.",
        returns=DestinationShown,
    )  # fmt: skip
    async def _show(self, request: web.Request) -> dict[str, Any]:
        totals, name = await self._store.ledger.totals(), request.match_info["name"]
        if name not in self._dispatcher.lanes and name in totals:
            shown = self._absent(name)
        else:
            lane = self._lane(request)
            shown = {**self._fields(lane, await self._recent(lane.name)), "events": lane.config.events}
            await self._add_owners([shown])
        checked, now = self._ledger_check.backlog.get(name), self._clock.steady()
        start = None if checked is None else checked.row
        return {**shown, **await backlog_of(self._store, name, totals, now, start)}

    @endpoint(
        "POST", "/api/destinations/{name}/pause", "pauseDestination",
        "Pause a destination, for some time or until it is resumed.",
        body=PauseBody, optional_body=True, find="_lane", returns=DestinationSteered,
    )  # fmt: skip
    async def _pause(self, request: web.Request, body: PauseBody) -> dict[str, Any]:
        lane, until = self._lane(request), None
        if body.for_ is not None:
            seconds = read_field("for", parse_time_span, body.for_)
            until = self._clock.steady() + int(seconds * SECOND)
        return _steered(lane, await self._owner.steer(lane, {"paused": True, "paused_until": until}))

    @endpoint(
        "POST", "/api/destinations/{name}/{verb:resume|disable|enable}", "steerDestination",
        "Resume, disable or enable a destination.", returns=DestinationSteered, also={409: ErrorView},
    )  # fmt: skip
    async def _steer(self, request: web.Request) -> dict[str, Any]:
        lane = self._lane(request)
        if request.match_info["verb"] == "resume" and lane.config.paused:
            raise await asyncio.to_thread(_paused_in_config, self._state.config.path, lane.name)
        changes: dict[str, dict[str, Any]] = {
            "resume": {"paused": False, "paused_until": None},
            "disable": {"disabled_at": self._clock.wall(), "disabled_reason": "operator"},
            "enable": {"disabled_at": None, "disabled_reason": None},
        }
        change = changes[request.match_info["verb"]]
        return _steered(lane, await self._owner.steer(lane, change))

    @endpoint(
        "POST", "/api/destinations/{name}/test", "testDestination",
        "Send one signed ping to a destination; on request, a 2xx closes its circuit.",
        body=PingBody, optional_body=True, find="_lane", returns=PingView, also={409: ErrorView},
    )  # fmt: skip
    async def _test(self, request: web.Request, body: PingBody) -> dict[str, Any]:
        return await self._pings.send(self._lane(request), close_circuit=body.close_circuit)

    async def _show_here(self, _to: str, _argument: None) -> list[dict[str, Any]]:
        """Return the destinations whose lanes this node owns, for another node."""
        recent = await self._recent()
        lanes = tuple(self._dispatcher.lanes.values())
        return [self._fields(lane, recent) for lane in lanes if lane.is_owned]

    async def _add_owners(self, items: Sequence[dict[str, Any]]) -> None:
        """Add the fields that only the owners of lanes know to the destinations of other nodes."""
        elsewhere = {each["name"]: each for each in items if each["held"] == ELSEWHERE}
        if not elsewhere:
            return
        for _, lanes in (await self._nodes.ask_others(SHOW, None, PATIENCE)).given:
            for owned in lanes:
                if (shown := elsewhere.pop(owned["name"], None)) is not None:
                    mine = 0 if "shards" in owned else shown["in_flight"]  # an owner of shards counts all
                    known = {name: owned[name] for name in _OF_OWNER if name in owned}
                    last = max(shown["last_success"] or "", owned["last_success"] or "") or None
                    shown.update(known, in_flight=owned["in_flight"] + mine, last_success=last)

    async def _recent(self, name: str | None = None) -> dict[str, tuple[float | None, float | None]]:
        """Return the attempts of the last minute by destination, all and failed; `name` selects one."""
        found = {}
        for each in (await self._history.past(minutes=1, periods=1, destination=name)).destinations:
            [succeeded], [failed] = each.figures["succeeded"], each.figures["failed"]
            found[each.name] = None if succeeded is None else succeeded + (failed or 0), failed
        return found

    def _fields(self, lane: Lane, recent: Mapping[str, tuple[float | None, float | None]]) -> dict[str, Any]:
        activity, health = self._activity, lane.health
        backlog = self._ledger_check.backlog.get(lane.name)
        return {
            **_destination(lane),
            **self._shards(lane),
            **destination_fields(
                lane.config,
                state=health.state,
                circuit=_circuit(is_open=lane.is_open_anywhere),
                held_until=health.held_until if lane.held else None,
                oldest_pending=None if backlog is None else backlog.oldest,
                last_failure=lane.last_failure,
                recent=recent.get(lane.name, (None, None)),
                last_success=activity.last_success(lane.name),
                certificate_expires=activity.certificate_expires(lane.name),
            ),
        }

    def _shards(self, lane: Lane) -> dict[str, tuple[ShardView, ...]]:
        if lane.shards is None:
            return {}
        is_open = lane.health.circuit.is_open
        mine = [
            ShardView(number, self._node, lane.in_flight_of(number), _circuit(is_open=is_open))
            for number in lane.shards.numbers
        ]
        others = [
            ShardView(each.number, each.node, each.in_flight, _circuit(is_open=each.circuit is not None))
            for each in lane.others
        ]
        return {"shards": tuple(sorted(mine + others, key=lambda each: each.shard))}

    def _absent(self, name: str) -> dict[str, Any]:
        backlog = self._ledger_check.backlog.get(name)
        return {
            "name": name,
            "held": ABSENT,
            **pause_of(),
            "in_flight": self._dispatcher.in_flight(name),
            **destination_fields(None, oldest_pending=None if backlog is None else backlog.oldest),
        }

    def _lane(self, request: web.Request) -> Lane:
        name = request.match_info["name"]
        if name not in self._dispatcher.lanes:
            raise unknown("destination", name, self._dispatcher.lanes)
        return self._dispatcher.lanes[name]


def _destination(lane: Lane) -> dict[str, Any]:
    """Describe a destination without its URL, which may contain a token."""
    pause = pause_of(lane.health.paused_by, lane.health.paused_until)
    shown = {"name": lane.name, "held": lane.held, **pause, "in_flight": lane.in_flight_everywhere}
    return {**shown, "node": lane.node} if lane.node else shown


def _circuit(*, is_open: bool) -> Literal["open", "closed"]:
    return "open" if is_open else "closed"


def _steered(lane: Lane, fields: dict[str, Any]) -> dict[str, Any]:
    """Describe a destination after a change; `fields` are from the node that owns its lane."""
    return {"name": lane.name, **fields, **pause_of(fields["paused_by"], fields["paused_until"])}


def _paused_in_config(path: Path, name: str) -> SetInConfigError:
    """Return the error for resuming a destination that config.toml pauses; it names file and line."""
    key: KeyPath = ("destinations", name, "paused")
    hint = "set it to false, or delete the line, and run: relay reload"
    try:
        document = read(path)
        place = str(document.problem(key, "true"))
        if key not in document.lines:
            hint = "the file has changed since the daemon read it; run: relay reload"
    except RelayError:  # the file is unreadable or has problems now
        place = f"{path}: {dotted(key)}: true"
    return SetInConfigError(f"{name} is paused in the configuration: {place}", hint=hint)
