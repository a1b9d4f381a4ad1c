"""Deliveries and attempts: find those that need a change, change all that match, or look at one."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from aiohttp import web

from relay.api.words import END_REASONS
from relay.jobs.replay import DEFAULT_RATE
from relay.ui.body import answers, request_of
from relay.ui.markup import Content, tag
from relay.ui.page import Visit
from relay.ui.parts import (
    NONE,
    Narrow,
    action,
    api_query,
    attempt_result,
    checkbox,
    command,
    command_of_list,
    copy,
    exact,
    fields,
    filter_form,
    nothing,
    of_selected,
    options_of,
    pages,
    query_link,
    state,
    table,
    when,
)
from relay.ui.timeline import changes_of, created, steps_of

SECTION = "deliveries"

MOST_STEPS = 50
"""Maximum number of attempts on the page of a delivery; the latest ones are shown."""


async def list_(visit: Visit) -> web.Response:
    """List deliveries; changes apply to all that match the filter, on every page."""
    page = await visit.ask("listDeliveries", query=api_query(visit))
    return visit.page(
        "Deliveries",
        filter_form(visit, "deliveries", page["items"]),
        _running(visit, (await visit.ask("listReplays"))["items"]),
        tag("p", *_changes(visit), class_="actions"),
        _sent_again(visit, page["items"]),
        await table(
            visit,
            "Newest first",
            ("Event", "Destination", "State", "Attempts", "Last result", "Created", "Due"),
            (_row(visit, each) for each in page["items"]),
            numbers=("Attempts",),
            narrow=Narrow("State", ("Destination", "Last result", "Due"), ("Attempts", "Created")),
            empty=nothing(
                visit,
                "delivery",
                page["next_cursor"],
                "No delivery yet. To see where an event goes: ",
                command("explain", "--help"),
            ),
        ),
        _changes_of_selected(visit) if page["items"] else None,
        pages(visit, page["next_cursor"], len(page["items"])),
        tag("p", command_of_list("deliveries", "deliveries", "list", query=visit.query)),
        tag(
            "p",
            "See also: ",
            tag("a", "attempts", href=visit.link("attempts")),
            ", ",
            tag("a", "replays", href=visit.link("replays")),
            class_="note",
        ),
        section=SECTION,
    )


def _running(visit: Visit, replays: Sequence[Mapping[str, Any]]) -> Iterator[Content]:
    """Yield the progress of each running replay: its operator may have left its page."""
    for each in replays:
        if each["state"] in ("running", "cancelling"):
            link = tag("a", "Stop or follow it", href=visit.link("replays", each["id"]))
            what = f"a replay is {each['state']}: {each['done']:,} of {each['count']:,} events"
            yield tag("p", state("pending", what), ". ", link)


def _row(visit: Visit, each: Mapping[str, Any]) -> tuple[Content, ...]:
    return (
        [
            checkbox(visit, each["id"], each["type"]),
            tag("a", each["type"], href=visit.link(SECTION, each["id"])),
        ],
        tag("a", each["destination"], href=visit.link("destinations", each["destination"])),
        _state(visit, each),
        each["attempts"],
        _last(each),
        when(visit, each["created_at"]),
        when(visit, each["next_attempt_at"]),
    )


def _changes_of_selected(visit: Visit) -> Content:
    """Return the buttons that change the selected rows."""
    can_cancel = visit.query.get("state") in (None, "", "pending")
    return of_selected(
        visit,
        action(
            visit, "Retry", "deliveries", "retry", call="POST deliveries/retry", body={"ids": []},
            counts=True, selected=True,
        ),
        action(
            visit, "Cancel", "deliveries", "cancel", call="POST deliveries/cancel", body={"ids": []},
            counts=True, selected=True, danger=True,
        ) if can_cancel else None,
    )  # fmt: skip


def _state(visit: Visit, each: Mapping[str, Any]) -> Content:
    """Return a delivery's state, and a link to the later one that sends its event again."""
    later = each["replayed_by"]
    if later is None:
        return state(each["state"])
    return tag("a", state("", f"{each['state']}, sent again"), href=visit.link(SECTION, later))


def _sent_again(visit: Visit, items: Sequence[Mapping[str, Any]]) -> Content:
    """Return a note about the deliveries that a change of all matches leaves out."""
    count = sum(each["replayed_by"] is not None for each in items)
    if not count or visit.query.get("replayed"):
        return None
    others = query_link(visit.query, {"replayed": "no", "cursor": None})
    return tag(
        "p",
        f"{count:,} of the deliveries on this page {'was' if count == 1 else 'were'} sent again later; "
        "sending all again leaves them out. ",
        tag("a", "Show only the others", href=others),
        class_="note",
    )


def _last(delivery: Mapping[str, Any]) -> str:
    if delivery["last_error"]:
        return str(delivery["last_error"])
    return NONE if delivery["last_status"] is None else f"HTTP {delivery['last_status']}"


def _changes(visit: Visit) -> Iterator[Content]:
    """Yield the changes of all deliveries that match the page's filter.

    A dry run with the same filter counts them before the confirmation. The API selects by the fields of
    `selection`, so there are none for a list of one event.
    """
    query = {name: value for name, value in visit.query.items() if name not in ("cursor", "limit") and value}
    chosen, replayed = query.get("state"), query.pop("replayed", "no")
    if "id" in query or "event_id" in query or replayed != "no":
        return
    if not set(query) - {"state"}:
        if chosen is not None and visit.may("operate"):
            what = "To change all entries at once, add a filter, such as a destination."
            yield tag("span", what, class_="note scripted")
        return
    selected = {**api_query(visit, "selection"), **({"state": chosen} if chosen else {})}
    words = options_of("selection", query)
    if chosen is not None:
        label = "Retry all now" if chosen == "pending" else "Send all again"
        again = "deliveries that have already been sent again are left out" if chosen != "pending" else None
        yield action(
            visit, label, "deliveries", "retry", *words,
            call="POST deliveries/retry", body={"filter": selected}, counts=True, count=again,
            rate=None if chosen == "pending" else DEFAULT_RATE.count,
        )  # fmt: skip
    if chosen in (None, "pending"):
        yield action(
            visit, "Cancel all pending", "deliveries", "cancel", *words,
            call="POST deliveries/cancel", body={"filter": selected}, counts=True, danger=True,
        )  # fmt: skip


async def show(visit: Visit) -> web.Response:
    """Show a delivery: its attempts with their responses, and the request that it sends."""
    id_ = visit.path["id"]
    shown = await visit.ask("showDelivery", {"id": id_})
    ended = END_REASONS.get(shown["reason"] or "", shown["reason"])
    tries = shown["tries"]
    return visit.page(
        f"{shown['type']} to {shown['destination']}",
        tag(
            "p",
            tag("code", shown["id"], data_copy=shown["id"]),
            copy("id", shown["id"]),
            copy("command", f"relay deliveries show {shown['id']}"),
            *changes_of(visit, shown),
            class_="actions",
        ),
        tag(
            "div",
            fields(
                ("Event", tag("a", shown["event_id"], href=visit.link("events", shown["event_id"]))),
                (
                    "Destination",
                    tag("a", shown["destination"], href=visit.link("destinations", shown["destination"])),
                ),
                ("Created", exact(visit, shown["created_at"])),
                *([("Ended", exact(visit, shown["finished_at"]))] if shown["finished_at"] else []),
                *([("Due", exact(visit, shown["next_attempt_at"]))] if shown["next_attempt_at"] else []),
                *([("Repeats", _delivery_link(visit, shown["replay_of"]))] if shown["replay_of"] else []),
                *(
                    [("Sent again", _delivery_link(visit, shown["replayed_by"]))]
                    if shown["replayed_by"]
                    else []
                ),
                *([("Group", shown["group_key"])] if shown["group_key"] is not None else []),
            ),
            class_="facts",
        ),
        tag("h2", "Attempts"),
        tag(
            "ol",
            created(shown),
            _earlier(visit, shown),
            steps_of(visit, shown, tries[:MOST_STEPS][::-1], shown["created_at"]),
            class_="line",
            role="list",
        ),
        *answers(visit, tries),
        tag("h2", "Request", id="body"),
        await request_of(visit, shown),
        tag("p", command("deliveries", "show", shown["id"])),
        section=SECTION,
        heading=[
            f"{shown['type']} to {shown['destination']}: ",
            state(shown["state"], f"{shown['state']}, {ended}" if ended else None),
        ],
    )


def _earlier(visit: Visit, delivery: Mapping[str, Any]) -> Content:
    """Return a link to all attempts, unless the page shows all."""
    count = len(delivery["tries"]) - MOST_STEPS
    link = visit.link("attempts", delivery_id=delivery["id"])
    return tag("li", tag("a", f"{count:,} earlier attempts", href=link)) if count > 0 else None


def _delivery_link(visit: Visit, id_: str) -> Content:
    return tag("a", id_, href=visit.link(SECTION, id_))


async def attempts(visit: Visit) -> web.Response:
    """List attempts, newest first."""
    page = await visit.ask("listAttempts", query=api_query(visit))
    return visit.page(
        "Attempts",
        filter_form(visit, "attempts", page["items"]),
        await table(
            visit,
            "Newest first",
            ("Event", "Destination", "Result", "Took", "Started"),
            (
                (
                    tag("a", each["type"], href=visit.link(SECTION, each["delivery_id"])),
                    tag("a", each["destination"], href=visit.link("destinations", each["destination"])),
                    attempt_result(each),
                    f"{each['duration_ms']:,.1f} ms",
                    when(visit, each["started_at"]),
                )
                for each in page["items"]
            ),
            numbers=("Took",),
            narrow=Narrow("Result", ("Destination", "Started")),
            empty=nothing(
                visit,
                "attempt",
                page["next_cursor"],
                "No attempt yet. To test a destination: ",
                command("destinations", "test", "NAME"),
            ),
        ),
        pages(visit, page["next_cursor"], len(page["items"])),
        tag("p", command_of_list("attempts", "attempts", "list", query=visit.query)),
        section=SECTION,
    )
