"""Events: the list with its filters, and one event with the result of each of its deliveries."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlencode

from aiohttp import web

from relay.api.query_params import MOST_PAYLOAD
from relay.base.clock import SECOND, moment, rfc3339
from relay.ui.body import event_body
from relay.ui.markup import Content, tag
from relay.ui.page import Visit
from relay.ui.parts import (
    NONE,
    Narrow,
    action,
    api_query,
    command,
    command_of_list,
    copy,
    exact,
    fields,
    filter_form,
    nothing,
    pages,
    query_link,
    size,
    state,
    table,
    when,
)
from relay.ui.timeline import line_of, reply

SECTION = "events"

OVERLAP = SECOND
"""Microseconds before the newest row of a list from which its script counts later events."""

MOST_NEW = 10_000
"""New events after which the script stops counting; nobody needs a more exact number."""


async def list_(visit: Visit) -> web.Response:
    """List events, newest first."""
    page = await visit.ask("listEvents", query=api_query(visit))
    return visit.page(
        "Events",
        filter_form(visit, "events", page["items"]),
        _new(visit, page["items"], is_last=page["next_cursor"] is None),
        await table(
            visit,
            "Newest first",
            ("Type", "Subject", "Received", "Deliveries", "Size"),
            (_row(visit, each) for each in page["items"]),
            numbers=("Size",),
            narrow=Narrow("Received", ("Subject", "Deliveries"), ("Size",)),
            empty=nothing(
                visit,
                "event",
                page["next_cursor"],
                "No event yet. To send a sample: ",
                command("send", "SOURCE", "--list"),
            ),
        ),
        pages(visit, page["next_cursor"], len(page["items"])),
        tag("p", command_of_list("events", "events", "list", query=visit.query)),
        section=SECTION,
    )


def _new(visit: Visit, items: Sequence[Mapping[str, Any]], *, is_last: bool) -> Content:
    """Return where the script counts events that arrive after the page; None if the tail lacks a filter.

    The tail begins with stored events from a little before the newest row, because an event is stored a
    little after it arrives. The script skips events that the page already shows. For later events, the tail
    sends only their number.
    """
    filters = {name: value for name, value in visit.query.items() if value and name != "limit"}
    if filters.keys() - {"source", "type"}:
        return None
    times = [moment(each["received_at"], visit.now) for each in items]
    since = max(times, default=visit.now) - OVERLAP
    if not is_last:  # the next page has the events before the last row
        since = max(since, min(times, default=since))
    known = [each["id"] for each, at in zip(items, times, strict=True) if at >= since]
    tail = {**filters, "attempts": "0", "count": "1", "since": rfc3339(since)}
    return tag(
        "p", tag("a", "", href=query_link(visit.query, {})), class_="new", hidden=True, aria_live="polite",
        data_tail=urlencode(tail), data_known=" ".join(known), data_most=MOST_NEW,
    )  # fmt: skip


def _row(visit: Visit, event: Mapping[str, Any]) -> tuple[Content, ...]:
    return (
        tag("a", event["type"], href=visit.link("events", event["id"])),
        event["subject"] or NONE,
        when(visit, event["received_at"]),
        _states(event["deliveries"]) or "none",
        size(event["size"]),
    )


def _states(counts: Mapping[str, int]) -> list[Content]:
    return [[state(name, f"{count:,} {name}"), " "] for name, count in counts.items()]


async def show(visit: Visit) -> web.Response:
    """Show an event: its timeline from the sender to every destination, and its body."""
    given = {"id": visit.path["id"]}
    event = await visit.ask("showEvent", given, {"payload": str(MOST_PAYLOAD)})
    explanation = await visit.ask("explainEvent", given)
    attempts = await visit.ask("listAttempts", query={"event_id": event["id"], "answer": "0", "limit": "500"})
    ids = [each["id"] for each in event["owed"] if each["state"] != "pending" and not each["replayed_by"]]
    counts = Counter(each["state"] for each in event["owed"] if not each["replayed_by"])
    return visit.page(
        event["type"],
        _facts(visit, event),
        tag(
            "p",
            tag("code", event["id"], data_copy=event["id"]),
            copy("id", event["id"]),
            copy("command", f"relay events show {event['id']}"),
            action(
                visit, "Send all again", "deliveries", "retry", *ids,
                call="POST deliveries/retry", body={"ids": ids}, counts=True,
            ) if len(ids) > 1 else None,
            class_="actions",
        ),
        tag("h2", "Timeline"),
        await line_of(visit, event, explanation["destinations"], attempts["items"]),
        tag("h2", "Body", id="body"),
        await event_body(visit, event),
        tag("p", command("events", "show", event["id"])),
        section=SECTION,
        heading=[event["type"], ": ", _states(counts) or "no deliveries"],
    )  # fmt: skip


def _facts(visit: Visit, event: Mapping[str, Any]) -> Content:
    """Return the main facts: subject, receipt, body and whether it is intact, reply to the sender."""
    digest = tag("span", state("delivered", "as received"), title=f"SHA-256 {event['sha256']}")
    if not event["intact"]:
        digest = tag(
            "span", state("dead", "damaged: its SHA-256 differs; the relay does not send it"), role="alert"
        )
    first = [each for each in event["replies"] if each["received_at"] == event["received_at"]]
    known: list[tuple[str, Content]] = [("Reply", reply(first[0]))] if first else []
    return tag(
        "div",
        fields(
            ("Subject", event["subject"] or NONE),
            ("Received", exact(visit, event["received_at"])),
            ("Body", [f"{size(event['size'])}, {event['content_type'] or 'no content type'}, ", digest]),
            *known,
        ),
        class_="facts",
    )
