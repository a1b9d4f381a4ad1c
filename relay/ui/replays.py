"""Replays: the list, and one with its progress, which the script keeps current."""

from collections.abc import Callable, Mapping
from typing import Any

from aiohttp import web

from relay.ui.markup import Content, Markup, tag
from relay.ui.page import Visit
from relay.ui.parts import (
    NONE,
    Narrow,
    action,
    command,
    duration,
    exact,
    fields,
    in_order,
    number,
    sorting,
    state,
    table,
    when,
)

SECTION = "replays"
_STATES = {"running": "pending", "done": "delivered", "failed": "dead", "cancelled": "cancelled"}


HEADS = ("Replay", "State", "Done", "Of", "To", "Began")
_ORDERS: Mapping[str, Callable[[Mapping[str, Any]], Any]] = {
    "state": lambda each: each["state"],
    "done": lambda each: -each["done"],
    "of": lambda each: -each["count"],
    "to": lambda each: each["to"] or "",
    "began": lambda each: each["began_at"],
}
"""The columns that sort the list; see `relay.ui.parts.in_order`."""


async def list_(visit: Visit) -> web.Response:
    """List the replays since the daemon started."""
    page = await visit.ask("listReplays")
    return visit.page(
        "Replays",
        sorting(visit, HEADS[1:]) if len(page["items"]) > 1 else None,
        await table(
            visit,
            "Since the daemon started",
            HEADS,
            (_row(visit, each) for each in in_order(visit, page["items"], _ORDERS)),
            numbers=("Done", "Of"),
            sorts=_ORDERS,
            narrow=Narrow("State", ("To", "Began")),
            empty=[
                "No replay since the daemon started. To begin one: ",
                command("deliveries", "retry", "--help"),
            ],
        ),
        tag("p", command("replays", "list")),
        section="deliveries",
    )


def _row(visit: Visit, each: Mapping[str, Any]) -> tuple[Content, ...]:
    return (
        tag("a", each["id"], href=visit.link(SECTION, each["id"])),
        _state(each),
        number(each["done"]),
        number(each["count"]),
        each["to"] or "the same destinations",
        when(visit, each["began_at"]),
    )


def _state(replay: Mapping[str, Any]) -> Markup:
    return state(_STATES.get(replay["state"], ""), replay["state"])


async def show(visit: Visit) -> web.Response:
    """Show a replay and its progress."""
    id_ = visit.path["id"]
    replay = await visit.ask("showReplay", {"id": id_})
    running = replay["state"] in ("running", "cancelling")
    left = replay["eta_seconds"]
    bar = tag("progress", value=replay["done"], max=max(1, replay["count"]), aria_label="Progress")
    return visit.page(
        f"Replay {id_}",
        tag("p", replay["error"], class_="error") if replay["error"] else None,
        tag(
            "p",
            bar,
            " ",
            tag("span", f"{replay['done']:,} of {replay['count']:,}", data_progress_text=True),
            " events",
            data_progress=f"replays/{id_}" if running else None,
        ),
        action(
            visit, "Stop", "replays", "cancel", id_,
            call=f"DELETE replays/{id_}", count="the rest of this replay", danger=True,
        ) if running else None,
        fields(
            ("Created", f"{number(replay['created'])} deliveries"),
            ("Skipped", f"{number(replay['skipped'])}: already pending"),
            ("Rate", f"at most {replay['rate']}, {replay['per_second']:,.1f}/s on average"),
            *([("Left", NONE if left is None else duration(left))] if running else []),
            ("To", replay["to"] or "the same destinations"),
            ("Began", exact(visit, replay["began_at"])),
            ("Ended", exact(visit, replay["ended_at"])),
        ),
        tag("p", command("replays", "show", id_)),
        section="deliveries",
        heading=["Replay ", id_, ": ", _state(replay)],
    )  # fmt: skip
