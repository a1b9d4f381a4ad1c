"""Sources: the list, and one with its last hour, its tokens and its settings."""

from collections.abc import Callable, Mapping
from typing import Any

from aiohttp import web

from relay.config.effective import as_toml
from relay.ui.markup import Content, tag
from relay.ui.page import Visit
from relay.ui.parts import (
    Narrow,
    action,
    charts,
    command,
    exact,
    fields,
    in_order,
    number,
    sorting,
    span_of,
    spans,
    spark,
    state,
    table,
    total,
    when,
)

SECTION = "sources"
NO_SOURCES: Content = ["config.toml has no sources. Add one: ", command("sources", "add", "--help")]


HEADS = ("Source", "State", "Last event", "Plugin", "Path")
_ORDERS: Mapping[str, Callable[[Mapping[str, Any]], Any]] = {
    "source": lambda each: each["name"],
    "state": lambda each: (not each["paused"], not each["silent"]),
    "last event": lambda each: each["last_event"] or "",
    "plugin": lambda each: each["plugin"],
    "path": lambda each: each["prefix"],
}
"""The columns that sort the list; see `relay.ui.parts.in_order`."""


async def list_(visit: Visit) -> web.Response:
    """List sources."""
    page = await visit.ask("listSources")
    return visit.page(
        "Sources",
        sorting(visit, HEADS) if len(page["items"]) > 1 else None,
        await table(
            visit,
            "Sources of config.toml",
            HEADS,
            [
                (
                    tag("a", each["name"], href=visit.link(SECTION, each["name"])),
                    state_of(each),
                    when(visit, each["last_event"]),
                    each["plugin"],
                    each["prefix"] or "/",
                )
                for each in in_order(visit, page["items"], _ORDERS)
            ],
            sorts=_ORDERS,
            narrow=Narrow("State", ("Path",), ("Plugin",)),
            empty=NO_SOURCES,
        ),
        tag("p", command("sources", "list")),
        section=SECTION,
    )


def state_of(source: Mapping[str, Any]) -> Content:
    """Return whether a source accepts events, and whether it is silent."""
    if source["paused"]:
        return state("expired", "paused")
    return state("expired", "silent") if source["silent"] else state("online", "accepting")


async def show(visit: Visit) -> web.Response:
    """Show a source."""
    name = visit.path["name"]
    shown = await visit.ask("showSource", {"name": name})
    span = span_of(visit)
    history = (await visit.ask("history", query=span.query(source=name)))["sources"]
    past: Mapping[str, Any] = history[0] if history else {}
    latest = shown["latest"]
    if shown["paused"]:
        change = action(
            visit, "Resume", "sources", "resume", name, call=f"POST sources/{name}/resume",
            count="the source accepts events again",
        )  # fmt: skip
    else:
        change = action(
            visit, "Pause", "sources", "pause", name, call=f"POST sources/{name}/pause", danger=True,
            count="its senders get 503 until you resume it",
        )  # fmt: skip
    return visit.page(
        name,
        tag("p", change, class_="actions"),
        fields(
            ("Plugin", shown["plugin"]),
            ("Path", shown["prefix"] or "/"),
            (
                "Latest event",
                [
                    tag("a", latest["type"], href=visit.link("events", latest["id"])),
                    " ",
                    exact(visit, shown["last_event"]),
                ]
                if latest
                else ["none yet; send a sample: ", command("send", name)],
            ),
            ("Events", tag("a", "all of this source", href=visit.link("events", source=name))),
            ("Refused", tag("a", "kept requests", href=visit.link("refused", source=name))),
        ),
        tag("h2", "Requests"),
        spans(visit),
        charts(
            span,
            *(
                (
                    label,
                    tag("a", total(past.get(key, ())), href=visit.link(key, source=name, since=span.since)),
                    spark(past.get(key, ()), label),
                )
                for key, label in (("events", "Stored events"), ("refused", "Refused requests"))
            ),
        ),
        tag("h2", "Tokens and secrets"),
        await table(
            visit,
            "Since the daemon started, or a reload added the name",
            ("Name", "Key", "Uses", "Last used"),
            [
                (each["name"], each["key"], number(each["uses"]), when(visit, each["last_used"]))
                for each in shown["tokens"]
            ],
            numbers=("Uses",),
            empty="No tokens: the source is open to everyone who can reach it.",
        ),
        tag(
            "p",
            state(
                "offline",
                f"No answer from {', '.join(shown['missing'])}: the counts do not include their uses.",
            ),
        )
        if shown["missing"]
        else None,
        tag(
            "details",
            tag("summary", "Settings, including defaults"),
            tag("pre", "\n", "\n".join(as_toml({"sources": {name: shown["settings"]}})).strip()),
        ),
        tag("p", command("sources", "show", name)),
        section=SECTION,
        heading=[name, ": ", state_of(shown)],
    )
