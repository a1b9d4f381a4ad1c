"""Events: the list with its filters, and one event with the result of each of its deliveries."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import urlencode

from aiohttp import web

from relay.base.clock import SECOND, moment, rfc3339
from relay.ui.deliveries import changes_of
from relay.ui.destinations import NO_DESTINATIONS
from relay.ui.markup import Content, tag
from relay.ui.page import Visit
from relay.ui.parts import (
    NONE,
    Narrow,
    action,
    api_query,
    body_text,
    command,
    command_of_list,
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
        pages(visit, page["next_cursor"]),
        tag("p", command_of_list("events", "events", "list", query=visit.query)),
        section=SECTION,
    )


def _new(visit: Visit, items: Sequence[Mapping[str, Any]], *, is_last: bool) -> Content:
    """Return where the script counts events that arrive after the page; None if the tail lacks a filter.

    The tail begins with the events that are stored, a little before the newest row, because events are
    stored a little later than they arrive. The script leaves out those that the page has already. Of later
    events, the tail only sends the number.
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
    """Show an event: where it went, where it did not go and why, and its body."""
    given = {"id": visit.path["id"]}
    event = await visit.ask("showEvent", given)
    explanation = await visit.ask("explainEvent", given)
    ids = [each["id"] for each in event["owed"] if each["state"] != "pending" and not each["replayed_by"]]
    counts = Counter(each["state"] for each in event["owed"] if not each["replayed_by"])
    return visit.page(
        event["type"],
        fields(
            ("Event", tag("code", event["id"], data_copy=event["id"])),
            ("Subject", event["subject"] or NONE),
            ("Source", tag("a", event["source"], href=visit.link(SECTION, source=event["source"]))),
            ("Received", exact(visit, event["received_at"])),
            ("Body", f"{size(event['size'])}, {event['content_type'] or 'no content type'}"),
            *(
                [("Repeated", "by its sender; the relay answered with this event's id")]
                if event["duplicate"]
                else []
            ),
        ),
        tag("h2", "Destinations"),
        await table(
            visit,
            "Each destination of this event",
            ("Destination", "State", "Details", "Change"),
            _fates(visit, event["owed"], explanation["destinations"]),
            empty=NO_DESTINATIONS,
        ),
        action(
            visit, "Send all again", "deliveries", "retry", *ids,
            call="POST deliveries/retry", body={"ids": ids}, counts=True,
        ) if len(ids) > 1 else None,
        tag("h2", "Body"),
        body_text(event["payload"], "Body"),
        tag("p", f"The first 16 KiB of {size(event['size'])}.") if event["payload_truncated"] else None,
        tag("p", command("events", "show", event["id"])),
        section=SECTION,
        heading=[event["type"], ": ", _states(counts) or "sent nowhere"],
    )  # fmt: skip


def _fates(
    visit: Visit, deliveries: list[dict[str, Any]], matches: list[dict[str, Any]]
) -> Iterator[tuple[Content, ...]]:
    """Yield a row for each delivery, and for each destination that does not get the event."""
    for each in deliveries:
        yield (
            tag("a", each["destination"], href=visit.link("destinations", each["destination"])),
            tag("a", state(each["state"]), href=visit.link("deliveries", each["id"])),
            _details(visit, each),
            _actions(visit, each),
        )
    sent = {each["destination"] for each in deliveries}
    for match in matches:
        if match["name"] not in sent:
            word = "not sent" if match["matches"] else "no match"
            name = tag("a", match["name"], href=visit.link("destinations", match["name"]))
            lines = [tag("div", line.removeprefix("no: ")) for line in match["lines"]]
            yield name, state("", word), lines, None


def _details(visit: Visit, delivery: Mapping[str, Any]) -> Content:
    tries = delivery["attempts"]
    parts: list[Content] = [f"{tries} {'attempt' if tries == 1 else 'attempts'}"]
    if delivery["last_error"] or delivery["last_status"]:
        parts.append(delivery["last_error"] or f"HTTP {delivery['last_status']}")
    if delivery["reason"]:
        parts.append(delivery["reason"])
    if delivery["replayed_by"]:
        parts.append(tag("a", "sent again", href=visit.link("deliveries", delivery["replayed_by"])))
    if delivery["next_attempt_at"]:
        parts.append(["due ", when(visit, delivery["next_attempt_at"])])
    elif delivery["finished_at"]:
        parts.append(["ended ", when(visit, delivery["finished_at"])])
    return [[part, " · " if part is not parts[-1] else None] for part in parts]


def _actions(visit: Visit, delivery: Mapping[str, Any]) -> Content:
    return [[each, " "] for each in changes_of(visit, delivery)]
