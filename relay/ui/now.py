"""Now: the problems, each with the next command."""

from collections.abc import Mapping, Sequence
from typing import Any

from aiohttp import web

from relay.ui.destinations import count_link, held
from relay.ui.markup import Content, Markup, tag
from relay.ui.page import Visit
from relay.ui.parts import NONE, command_line, duration, number, spark, state, table
from relay.ui.sources import state_of

PERIODS = 30
"""Bars of a history of an hour."""


async def show(visit: Visit) -> web.Response:
    """Show problems with their commands, then sources and destinations with their last hour."""
    status = await visit.ask("status")
    history = await visit.ask("history", query={"periods": str(PERIODS)})
    sources = await visit.ask("listSources")
    destinations = await visit.ask("listDestinations")
    nodes = (await visit.ask("listNodes"))["items"]
    past = {kind: {each["name"]: each for each in history[kind]} for kind in ("sources", "destinations")}
    return visit.page(
        "Now",
        _summary(visit, status, nodes),
        _problems(status["problems"]),
        table(
            "Sources",
            ("Source", "Events in 60 min", "", "Refused in 60 min", "State"),
            [_source(visit, each, past["sources"].get(each["name"], {})) for each in sources["items"]],
            empty="config.toml has no sources.",
        ),
        table(
            "Destinations",
            ("Destination", "Attempts in 60 min", "", "Failed", "p95", "Pending", "State"),
            [
                _destination(visit, each, past["destinations"].get(each["name"], {}))
                for each in destinations["items"]
            ],
            empty="config.toml has no destinations.",
        ),
        section="",
    )


def _summary(visit: Visit, status: Mapping[str, Any], nodes: Sequence[Mapping[str, Any]]) -> Markup:
    ready = state("online", "ready") if status["ready"] else state("offline", "not ready")
    disk = status["disk"]
    days = disk and disk["days_left"]
    return tag(
        "p",
        ready,
        f" · up {duration(status['uptime_seconds'])}",
        [" · ", tag("a", f"{len(nodes)} nodes", href=visit.link("nodes"))] if len(nodes) > 1 else None,
        f" · disk full in {days:,.0f} days" if days is not None else None,
        class_="summary",
    )


def _problems(problems: Sequence[Mapping[str, Any]]) -> Markup:
    """Return the problems, the most severe first, each with the next command."""
    if not problems:
        return tag("p", state("delivered", "No problems."), class_="calm")
    items = [tag("li", state("dead", each["what"]), " ", command_line(each["next"])) for each in problems]
    heading = tag("h2", f"Problems ({len(problems)})", id="needs")
    return tag("section", heading, tag("ul", items, class_="problems"), aria_labelledby="needs")


def _source(visit: Visit, source: Mapping[str, Any], past: Mapping[str, Any]) -> tuple[Content, ...]:
    name, events, refused = source["name"], past.get("events", ()), past.get("refused", ())
    return (
        tag("a", name, href=visit.link("sources", name)),
        tag("a", _sum(events), href=visit.link("events", source=name, since="1h")),
        spark(events, f"Events of {name} in the last hour"),
        tag("a", _sum(refused), href=visit.link("refused", source=name, since="1h")),
        state_of(source),
    )


def _destination(visit: Visit, each: Mapping[str, Any], past: Mapping[str, Any]) -> tuple[Content, ...]:
    name, failed, good = each["name"], past.get("failed", ()), past.get("succeeded", ())
    slow = [value for value in past.get("p95_ms", ()) if value is not None]
    attempts = [None if a is None and b is None else (a or 0) + (b or 0)
                for a, b in zip(good, failed, strict=True)]  # fmt: skip
    return (
        tag("a", name, href=visit.link("destinations", name)),
        tag("a", _sum(attempts), href=visit.link("attempts", destination=name, since="1h")),
        spark(attempts, f"Attempts to {name} in the last hour"),
        tag("a", _sum(failed), href=visit.link("attempts", destination=name, failed="1", since="1h")),
        f"{slow[-1]:,.0f} ms" if slow else NONE,
        count_link(visit, name, "pending", each["pending"]),
        held(visit, each),
    )


def _sum(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return number(round(sum(known))) if known else NONE
