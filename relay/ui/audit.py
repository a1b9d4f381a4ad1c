"""The audit trail: the changes by operators."""

from collections.abc import Mapping
from typing import Any

from aiohttp import web

from relay.ui.markup import Content, tag
from relay.ui.page import Visit
from relay.ui.parts import NONE, Narrow, command_of_list, filter_form, nothing, pages, state, table, when

SECTION = "audit"
_BAD = 400  # the first status of a failed request


async def list_(visit: Visit) -> web.Response:
    """List changes, newest first."""
    page = await visit.ask("listAudit", query=visit.query)
    return visit.page(
        "Changes by operators",
        filter_form(visit, "audit", page["items"]),
        await table(
            visit,
            "Newest first",
            ("Operator", "Time", "Access", "Request", "Body", "Result"),
            (_row(visit, each) for each in page["items"]),
            narrow=Narrow("Time", ("Request", "Result"), ("Access", "Body")),
            empty=nothing(visit, "change", page["next_cursor"], "No change by an operator yet."),
        ),
        pages(visit, page["next_cursor"], len(page["items"])),
        tag("p", command_of_list("audit", "audit", query=visit.query)),
        section=SECTION,
    )


def _row(visit: Visit, entry: Mapping[str, Any]) -> tuple[Content, ...]:
    status = entry["status"]
    is_done = status is not None and status < _BAD
    return (
        tag("a", entry["operator"], href=visit.link(SECTION, operator=entry["operator"])),
        when(visit, entry["at"]),
        f"{entry['access']} {entry['remote']}".strip(),
        f"{entry['method']} {entry['path']}",
        tag("code", entry["body"]) if entry["body"] else NONE,
        state("delivered" if is_done else "dead", "client disconnected" if status is None else str(status)),
    )
