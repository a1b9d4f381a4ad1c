"""Now: the problems, each with the next command."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import msgspec
from aiohttp import web

from relay.errors import StorageError
from relay.ui.destinations import NO_DESTINATIONS, count_link, held, steering
from relay.ui.markup import Content, Markup, join, tag
from relay.ui.page import Visit
from relay.ui.parts import (
    NONE,
    Narrow,
    Span,
    action,
    command,
    command_line,
    duration,
    number,
    span_of,
    spans,
    spark,
    state,
    table,
    total,
    when,
)
from relay.ui.sources import NO_SOURCES, state_of
from relay.ui.workers import maintenance

YEAR = 365
"""Days: a disk that will be full later than this is not mentioned."""

MOST_WORKERS = 5
"""Silent workers that are shown; the rest is a link."""

Item = Mapping[str, Any]


async def show(visit: Visit) -> web.Response:
    """Show the problems, then the figures of sources and destinations for the last hour or day."""
    status, span = await visit.ask("status"), span_of(visit)
    history = await visit.ask("history", query=span.query(periods=str(span.bars)))
    sources = (await visit.ask("listSources"))["items"]
    silent = await visit.ask("listWorkers", query={"status": "OFFLINE", "limit": str(MOST_WORKERS)})
    destinations: Sequence[Item] = ()
    nodes: Sequence[Item] = ()
    with suppress(StorageError):  # the other data is in memory and shows why the store cannot be read
        destinations = (await visit.ask("listDestinations"))["items"]
        nodes = (await visit.ask("listNodes"))["items"]
    past = {kind: {each["name"]: each for each in history[kind]} for kind in ("sources", "destinations")}
    sick = {each["name"] for each in status["problems"] if each["kind"] == "destination"}
    by_name = {each["name"]: each for each in destinations}
    problems = [
        *(_problem(visit, each, by_name) for each in status["problems"]),
        *_silent_workers(visit, silent),
    ]
    count = len(problems)
    words = f"{count} {'problem' if count == 1 else 'problems'}"
    verdict = state("dead", words) if problems else state("delivered", "no problems")
    return visit.page(
        "Now",
        _summary(visit, status, nodes),
        _changed(status["problems"], silent),
        _missing(history),
        tag("ul", problems, class_="problems", aria_label="Problems") if problems else None,
        _first_event(sources),
        spans(visit),
        tag("h2", "Sources"),
        await table(
            visit,
            f"Sources, last {span.name}",
            ("Source", "State", "Events/s", "Events", "Refused", span.heading),
            (_source(visit, span, each, past["sources"].get(each["name"], {})) for each in sources),
            numbers=("Events/s", "Events", "Refused"),
            narrow=Narrow("State", (), ("Events/s",)),
            empty=NO_SOURCES,
        ),
        tag("h2", "Destinations"),
        await table(
            visit,
            f"Destinations, last {span.name}",
            (
                "Destination",
                "State",
                "Pending",
                "Dead",
                "Attempts/s",
                "Attempts",
                "Failed",
                "p95",
                span.heading,
            ),
            (
                _destination(visit, span, each, past["destinations"].get(each["name"], {}))
                for each in sorted(
                    destinations, key=lambda each: (each["name"] not in sick, not each["dead"])
                )
            ),
            numbers=("Pending", "Dead", "Attempts/s", "Attempts", "Failed", "p95"),
            narrow=Narrow("State", (), ("Attempts/s", "Attempts", "Failed", "p95")),
            empty=NO_DESTINATIONS,
        ),
        _ledger(visit, status["problems"], destinations),
        section="",
        problems=count,
        heading=["Now: ", verdict],
    )


def _changed(problems: Sequence[Item], silent: Item) -> Markup:
    """Return the hidden link that the script shows when the state changes while the page is in use.

    By its digest, the script detects whether a newer page has different problems, apart from texts and times.
    """
    shown = [[each["kind"], each["name"], each.get("node"), each["next"]] for each in problems]
    workers = [[each["source"], each["id"]] for each in silent["items"]]
    digest = hashlib.sha256(msgspec.json.encode([shown, workers, silent["next_cursor"] is not None]))
    link = tag("a", "The state has changed: show", href="")
    return tag("p", link, class_="new", hidden=True, data_changed=digest.hexdigest()[:12])


def _first_event(sources: Sequence[Item]) -> Content:
    """Return the next step of an operator whose relay has not received any event yet."""
    if not sources or any(each["last_event"] for each in sources):
        return None
    return tag("p", "No event has arrived yet. Send a sample: ", command("send", sources[0]["name"]))


def _summary(visit: Visit, status: Item, nodes: Sequence[Item]) -> Markup:
    ready = state("online", "ready") if status["ready"] else state("offline", "not ready")
    disk = status["disk"]
    days = disk and disk["days_left"]
    return tag(
        "p",
        ready,
        f" · up {duration(status['uptime_seconds'])}",
        [" · ", tag("a", f"{len(nodes)} nodes", href=visit.link("nodes"))] if len(nodes) > 1 else None,
        f" · disk full in {days:,.0f} days" if days is not None and days < YEAR else None,
        class_="summary",
    )


def _missing(history: Item) -> Content:
    """Return a note about nodes whose figures are missing."""
    reasons = (("silent", "No answer from {}"), ("unable", "Another version runs on {}"))
    return [
        tag(
            "p",
            state(
                "offline", f"{why.format(', '.join(history[key]))}: the figures do not include these nodes."
            ),
        )
        for key, why in reasons
        if history[key]
    ]


def _problem(visit: Visit, problem: Item, destinations: Mapping[str, Item]) -> Markup:
    """Return a problem with its cause and the next command."""
    name, kind = problem["name"], problem["kind"]
    shown = destinations.get(name) if kind == "destination" else None
    details = list(_details(visit, shown)) if shown else []
    is_mild = kind == "source" or (shown is not None and (shown["held"] or "").startswith("paused"))
    return tag(
        "li",
        state("expired" if is_mild else "dead", problem["what"]),
        f" (node {problem['node']})" if problem.get("node") else None,
        tag("div", [[each, " · " if each is not details[-1] else None] for each in details], class_="note")
        if details
        else None,
        tag(
            "div",
            steering(visit, shown, of=name) if shown else None,
            _why(visit, name, "destinations", name) if shown else None,
            _source_action(visit, problem) if kind == "source" else None,
            command_line(problem["next"]),
            class_="actions",
        ),
        class_="mild" if is_mild else None,
    )


def _details(visit: Visit, shown: Item) -> Iterator[Content]:
    """Yield why a destination does not get its deliveries, and for how long they have waited."""
    if shown["last_error"]:
        yield join("last error: ", shown["last_error"], ", ", when(visit, shown["last_error_at"]))
    if shown["last_success"]:
        yield join("last success ", when(visit, shown["last_success"]))
    if shown["pending"] and shown["oldest_pending"]:
        yield join("oldest pending delivery ", when(visit, shown["oldest_pending"]))
    if shown["held_until"] and not shown["paused_until"]:
        yield join("next attempt ", when(visit, shown["held_until"]))


def _why(visit: Visit, of: str, *path: str) -> Markup:
    """Return the link to the page of the object with the problem; `of` as for `action`."""
    return tag("a", "Why", href=visit.link(*path), aria_label=f"Why: {of}")


def _source_action(visit: Visit, problem: Item) -> Content:
    name = problem["name"]
    resume = problem["next"] == f"relay sources resume {name}"
    return [
        action(visit, "Resume", "sources", "resume", name, call=f"POST sources/{name}/resume",
               count="the source; its senders are accepted again", of=name) if resume else None,
        _why(visit, name, "sources", name),
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
                f" · had been up {duration(each['uptime'])}" if each["uptime"] is not None else None,
                class_="note"),
            tag("div", maintenance(visit, each, of=name), _why(visit, name, "workers", source, name),
                command("workers", "show", source, name), class_="actions"),
            class_="mild",
        )  # fmt: skip
    if silent["next_cursor"] is not None:
        more = tag("a", "All silent workers", href=visit.link("workers", status="OFFLINE"))
        yield tag("li", state("expired", f"more than {MOST_WORKERS} workers are silent"), " ", more)


def _source(visit: Visit, span: Span, source: Item, past: Item) -> tuple[Content, ...]:
    name, events, refused = source["name"], past.get("events", ()), past.get("refused", ())
    return (
        tag("a", name, href=visit.link("sources", name)),
        state_of(source),
        tag("span", NONE, data_rate=f"sources {name}"),
        tag("a", total(events), href=visit.link("events", source=name, since=span.since)),
        tag("a", total(refused), href=visit.link("refused", source=name, since=span.since)),
        spark(events, f"Events in {span.bar}"),
    )


def _destination(visit: Visit, span: Span, each: Item, past: Item) -> tuple[Content, ...]:
    name, failed, good = each["name"], past.get("failed", ()), past.get("succeeded", ())
    slow = [value for value in past.get("p95_ms", ()) if value is not None]
    attempts = [None if a is None and b is None else (a or 0) + (b or 0)
                for a, b in zip(good, failed, strict=True)]  # fmt: skip
    return (
        tag("a", name, href=visit.link("destinations", name)),
        held(visit, each),
        count_link(visit, name, "pending", each["pending"]),
        count_link(visit, name, "dead", each["dead"]),
        tag("span", NONE, data_rate=f"destinations {name}"),
        tag("a", total(attempts), href=visit.link("attempts", destination=name, since=span.since)),
        tag("a", total(failed), href=visit.link("attempts", destination=name, failed="1", since=span.since)),
        f"{slow[-1]:,.0f} ms" if slow else NONE,
        spark(good, f"Attempts in {span.bar}", failed),
    )


def _ledger(visit: Visit, problems: Sequence[Item], destinations: Sequence[Item]) -> Content:
    """Return the proof that no delivery is lost, as the ledger's check found it."""
    if not destinations:
        return None
    words = ("delivered", "dead", "expired", "cancelled", "pending")
    sums = {word: sum(each[word] for each in destinations) for word in ("created", *words)}
    parts = [
        [" + " if at else None, _count(visit, sums[word], state=word), f" {word}"]
        for at, word in enumerate(words)
    ]
    unbalanced = any("ledger of" in each["what"] for each in problems)
    proof = state("dead", "unaccounted deliveries") if unbalanced else state("delivered", "0 unaccounted")
    created = _count(visit, sums["created"])
    doctor = tag("a", "Doctor", href=visit.link("doctor"))
    return tag("p", created, " deliveries created = ", parts, ": ", proof, " · ", doctor, class_="note")


def _count(visit: Visit, count: int, **filters: str) -> Markup:
    return tag("a", number(count), href=visit.link("deliveries", **filters))
