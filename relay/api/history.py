"""`GET /api/history`: the last hour or day of sources and destinations, of all nodes of a cluster."""

from collections.abc import Iterable
from typing import Annotated, Any

import msgspec
from aiohttp import web

from relay.api.context import Context
from relay.api.endpoints import endpoint
from relay.api.query_params import HistoryQuery
from relay.base.clock import rfc3339
from relay.base.turns import Turns
from relay.jobs.history import Past, Series, merged

SHOW = "show history"
"""The request of another node."""

PATIENCE = 2.0  # seconds within which the other nodes must answer

_Counts = list[float | None]


def _about(text: str) -> msgspec.Meta:
    return msgspec.Meta(description=text)


class SourceHistory(msgspec.Struct):
    """One source, oldest period first; null where the relay did not run."""

    name: str
    events: Annotated[_Counts, _about("Stored events.")]
    refused: Annotated[_Counts, _about("Refused requests.")]


class DestinationHistory(msgspec.Struct):
    """One destination, oldest period first; null where the relay did not run or made no attempt."""

    name: str
    succeeded: Annotated[_Counts, _about("Attempts that succeeded.")]
    failed: Annotated[_Counts, _about("Attempts that failed.")]
    p50_ms: Annotated[_Counts, _about("Half of the attempts took at most this long.")]
    p95_ms: Annotated[_Counts, _about("95 % of the attempts took at most this long.")]
    pending: Annotated[_Counts, _about("Highest number of pending deliveries.")]


class HistoryView(msgspec.Struct):
    """Figures in periods of equal length."""

    until: Annotated[str, _about("End of the last period.")]
    step_seconds: Annotated[float, _about("Length of a period. With `running`, the last one may be shorter.")]
    sources: list[SourceHistory]
    destinations: list[DestinationHistory]
    silent: Annotated[list[str], _about("Nodes that did not answer in time, so their figures are missing.")]
    unable: Annotated[list[str], _about("Nodes of another version, so their figures are missing.")]


class HistoryApi:
    """The endpoint `/api/history`."""

    def __init__(self, context: Context) -> None:
        self._history = context.history
        self._check_names = context.check_names
        self._nodes = context.store.nodes
        self._nodes.handle(SHOW, self._show_here)

    @endpoint(
        "GET", "/api/history", "history", "Show the last hour or day of each source and destination.",
        query=HistoryQuery, returns=HistoryView,
    )  # fmt: skip
    async def _show(self, _request: web.Request, query: HistoryQuery) -> dict[str, Any]:
        await self._check_names(query)
        asked = (query.minutes, query.periods, query.source, query.destination, query.running == "1")
        others = await self._nodes.ask_others(SHOW, asked, PATIENCE)
        mine = await self._show_here("", asked)
        found, unable = others.read(Past)
        parts = [part for _, part in found if part.step == mine.step]
        unable += tuple(name for name, part in found if part.step != mine.step)  # keeps no last day
        past = await merged([mine, *parts])
        return {
            "until": rfc3339(past.until),
            "step_seconds": past.step,
            "sources": [{"name": each.name, **each.figures} for each in past.sources],
            "destinations": await _in_milliseconds(past.destinations),
            "silent": others.silent,
            "unable": unable,
        }

    async def _show_here(self, _to: str, asked: tuple[Any, ...]) -> Past:
        """Return the history of this node, also for another one."""
        minutes, periods, source, destination, running = asked
        return await self._history.past(minutes, periods, source, destination, running=running)


async def _in_milliseconds(destinations: Iterable[Series]) -> list[dict[str, Any]]:
    turns, found = Turns(), list[dict[str, Any]]()
    for series in destinations:
        figures: dict[str, Any] = dict(series.figures)
        for name in ("p50", "p95"):
            values = figures.pop(name)
            figures[f"{name}_ms"] = [None if value is None else round(value * 1000, 1) for value in values]
        found.append({"name": series.name, **figures})
        await turns.give()
    return found
