"""Now: the problems, each with the next command."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from aiohttp import web

from relay.ui.destinations import count_link, held, steering
from relay.ui.markup import Content, Markup, join, tag
from relay.ui.page import Visit
from relay.ui.parts import NONE, action, command_line, duration, number, spark, state, table, total, when
from relay.ui.sources import state_of

PERIODS = 30
"""Bars of a history of an hour."""

MOST_WORKERS = 5
"""Silent workers that are shown; the rest is a link."""

Item = Mapping[str, Any]


async def show(visit: Visit) -> web.Response:
    """Show the problems, then sources and destinations with their last hour."""
    status = await visit.ask("status")
    history = await visit.ask("history", query={"periods": str(PERIODS)})
    sources = (await visit.ask("listSources"))["items"]
    destinations = (await visit.ask("listDestinations"))["items"]
    silent = await visit.ask("listWorkers", query={"status": "OFFLINE", "limit": str(MOST_WORKERS)})
    nodes = (await visit.ask("listNodes"))["items"]
    past = {kind: {each["name"]: each for each in history[kind]} for kind in ("sources", "destinations")}
    sick = {each["name"] for each in status["problems"] if each["kind"] == "destination"}
    return visit.page(
        "Now",
        _summary(visit, status, nodes),
        _silent(history["silent"]),
        _problems(visit, status["problems"], {each["name"]: each for each in destinations}, silent),
        await table(
            visit,
            "Sources",
            ("Source", "Events/s", "Events in 60 min", "By minute", "Refused in 60 min", "State"),
            (_source(visit, each, past["sources"].get(each["name"], {})) for each in sources),
            empty="config.toml has no sources.",
        ),
        await table(
            visit,
            "Destinations",
            (
                "Destination",
                "Attempts/s",
                "Attempts in 60 min",
                "By minute",
                "Failed",
                "p95",
                "Pending",
                "State",
            ),
            (
                _destination(visit, each, past["destinations"].get(each["name"], {}))
                for each in sorted(destinations, key=lambda each: each["name"] not in sick)
            ),
            empty="config.toml has no destinations.",
        ),
        _ledger(visit, status["problems"], destinations),
        section="",
    )


def _summary(visit: Visit, status: Item, nodes: Sequence[Item]) -> Markup:
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


def _silent(names: Sequence[str]) -> Content:
    """Return a note about nodes whose figures are missing."""
    if not names:
        return None
    return tag(
        "p", state("offline", f"No answer from {', '.join(names)}: the figures below lack these nodes.")
    )


def _problems(
    visit: Visit, problems: Sequence[Item], destinations: Mapping[str, Item], silent: Item
) -> Markup:
    """Return the problems, the most severe first, each with its cause and the next command."""
    items = [*(_problem(visit, each, destinations) for each in problems), *_silent_workers(visit, silent)]
    if not items:
        return tag("p", state("delivered", "No problems."), class_="calm")
    heading = tag("h2", f"Problems ({len(items)})", id="problems")
    return tag("section", heading, tag("ul", items, class_="problems"), aria_labelledby="problems")


def _problem(visit: Visit, problem: Item, destinations: Mapping[str, Item]) -> Markup:
    name, kind = problem["name"], problem["kind"]
    shown = destinations.get(name) if kind == "destination" else None
    details = list(_details(visit, shown)) if shown else []
    return tag(
        "li",
        state("expired" if kind == "source" else "dead", problem["what"]),
        tag("div", [[each, " · " if each is not details[-1] else None] for each in details], class_="note")
        if details
        else None,
        tag(
            "div",
            steering(visit, shown) if shown else None,
            tag("a", "Why", href=visit.link("destinations", name)) if shown else None,
            _source_action(visit, problem) if kind == "source" else None,
            command_line(problem["next"]),
            class_="actions",
        ),
    )


def _details(visit: Visit, shown: Item) -> Iterator[Content]:
    """Yield why a destination does not get its deliveries, and for how long they have waited."""
    if shown["last_error"]:
        yield join(shown["last_error"], " ", when(visit, shown["last_error_at"]))
    if shown["pending"] and shown["oldest_pending"]:
        yield join("oldest pending delivery ", when(visit, shown["oldest_pending"]))
    if shown["held_until"] and not shown["paused_until"]:
        yield join("next attempt ", when(visit, shown["held_until"]))
    if shown["last_success"]:
        yield join("last success ", when(visit, shown["last_success"]))


def _source_action(visit: Visit, problem: Item) -> Content:
    name = problem["name"]
    resume = problem["next"] == f"relay sources resume {name}"
    return [
        action(visit, "Resume", "sources", "resume", name, call=f"POST sources/{name}/resume",
               count="the source; its senders are accepted again") if resume else None,
        tag("a", "Why", href=visit.link("sources", name)),
    ]  # fmt: skip


def _silent_workers(visit: Visit, silent: Item) -> Iterator[Markup]:
    """Yield workers that send no heartbeats."""
    for each in silent["items"]:
        name, source = each["id"], each["source"]
        sessions = each["session_count"]
        yield tag(
            "li",
            state("expired", f"the worker {name} of {source} is silent"),
            tag("div", "last heartbeat ", when(visit, each["last_heartbeat"]), f" · {sessions} sessions",
                class_="note"),
            tag("div", tag("a", "Why", href=visit.link("workers", source, name)), class_="actions"),
        )  # fmt: skip
    if silent["next_cursor"] is not None:
        more = tag("a", "All silent workers", href=visit.link("workers", status="OFFLINE"))
        yield tag("li", state("expired", f"more than {MOST_WORKERS} workers are silent"), " ", more)


def _source(visit: Visit, source: Item, past: Item) -> tuple[Content, ...]:
    name, events, refused = source["name"], past.get("events", ()), past.get("refused", ())
    return (
        tag("a", name, href=visit.link("sources", name)),
        tag("span", NONE, data_rate=f"sources {name}"),
        tag("a", total(events), href=visit.link("events", source=name, since="1h")),
        spark(events, f"Events of {name} in the last hour"),
        tag("a", total(refused), href=visit.link("refused", source=name, since="1h")),
        state_of(source),
    )


def _destination(visit: Visit, each: Item, past: Item) -> tuple[Content, ...]:
    name, failed, good = each["name"], past.get("failed", ()), past.get("succeeded", ())
    slow = [value for value in past.get("p95_ms", ()) if value is not None]
    attempts = [None if a is None and b is None else (a or 0) + (b or 0)
                for a, b in zip(good, failed, strict=True)]  # fmt: skip
    return (
        tag("a", name, href=visit.link("destinations", name)),
        tag("span", NONE, data_rate=f"destinations {name}"),
        tag("a", total(attempts), href=visit.link("attempts", destination=name, since="1h")),
        spark(attempts, f"Attempts to {name} in the last hour"),
        tag("a", total(failed), href=visit.link("attempts", destination=name, failed="1", since="1h")),
        f"{slow[-1]:,.0f} ms" if slow else NONE,
        count_link(visit, name, "pending", each["pending"]),
        held(visit, each),
    )


def _ledger(visit: Visit, problems: Sequence[Item], destinations: Sequence[Item]) -> Content:
    """Return the proof that no delivery is lost, as the ledger's check found it."""
    if not destinations:
        return None
    words = ("delivered", "dead", "expired", "cancelled", "pending")
    sums = {word: sum(each[word] for each in destinations) for word in ("created", *words)}
    parts = [f"{number(sums[word])} {word}" for word in words]
    unbalanced = any("ledger of" in each["what"] for each in problems)
    proof = state("dead", "unaccounted deliveries") if unbalanced else state("delivered", "0 unaccounted")
    books = f"{number(sums['created'])} deliveries created = {' + '.join(parts)}: "
    return tag("p", books, proof, " ", tag("a", "Doctor", href=visit.link("doctor")), class_="note")
