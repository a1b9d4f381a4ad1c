"""Workers: the list, and one with its sessions, its latest heartbeats and its commands."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import quote

import msgspec
from aiohttp import web

from relay.api.words import heard_bars
from relay.ui.markup import Content, Markup, tag
from relay.ui.page import Visit
from relay.ui.parts import (
    NONE,
    Narrow,
    action,
    api_query,
    command,
    command_of_list,
    duration,
    exact,
    fields,
    filter_form,
    nothing,
    number,
    pages,
    query_link,
    state,
    table,
    when,
)

SECTION = "workers"


async def list_(visit: Visit) -> web.Response:
    """List workers by source and id."""
    page = await visit.ask("listWorkers", query=api_query(visit))
    workers = page["items"]
    return visit.page(
        "Workers",
        filter_form(visit, "workers", workers),
        tag("p", _spread(visit, workers), class_="summary") if workers else None,
        await table(
            visit,
            "By source and id",
            (
                "Worker",
                "Source",
                "Status",
                "Last heartbeat",
                "Last 60 min",
                "Sessions",
                "Queued",
                "Version",
                "Restarts",
            ),
            (_row(visit, each) for each in workers),
            numbers=("Sessions", "Queued", "Restarts"),
            narrow=Narrow(
                "Status", ("Source", "Last heartbeat"), ("Last 60 min", "Queued", "Version", "Restarts")
            ),
            empty=nothing(
                visit,
                "worker",
                page["next_cursor"],
                "No worker has registered. Sources with workers have the plugin ",
                tag("code", "whatsapp"),
                ".",
            ),
        ),
        pages(visit, page["next_cursor"], len(page["items"])),
        tag("p", command_of_list("workers", "workers", "list", query=visit.query)),
        section=SECTION,
    )


def _spread(visit: Visit, workers: Sequence[Mapping[str, Any]]) -> Content:
    """Return the numbers of workers on this page by status and by version, as links."""
    statuses = Counter(each["status"] for each in workers)
    versions = Counter(each["version"] for each in workers)
    counted = [
        [", " if at else None, _counted(visit, count, status=name), f" {name}"]
        for at, (name, count) in enumerate(statuses.most_common())
    ]
    spread = [
        [", " if at else None, f"{name or 'none'}: ", _counted(visit, count, version=name)]
        for at, (name, count) in enumerate(versions.most_common(5))
    ]
    return ["On this page: ", counted, " · versions: ", spread]


def _counted(visit: Visit, count: int, **filters: str | None) -> Content:
    """Return a number of workers, as a link to them if the filter has a value."""
    [value] = filters.values()
    link = query_link(visit.query, {**filters, "cursor": None})
    return tag("a", number(count), href=link) if value else number(count)


def _row(visit: Visit, each: Mapping[str, Any]) -> tuple[Content, ...]:
    most = each["max_sessions"]
    return (
        tag("a", each["id"], href=visit.link(SECTION, each["source"], each["id"])),
        tag("a", each["source"], href=visit.link("sources", each["source"])),
        status_of(visit, each),
        when(visit, each["last_heartbeat"]),
        beats(each),
        number(each["session_count"]) + ("" if most is None else f" of {most:,}"),
        number(each["queued_commands"]) if each["queued_commands"] else NONE,
        each["version"] or NONE,
        each["restarts"],
    )


def status_of(visit: Visit, worker: Mapping[str, Any]) -> Content:
    """Return a worker's status, and until when it is in maintenance."""
    status = state("offline" if worker["status"] == "OFFLINE" else "online", worker["status"].lower())
    if not worker["maintenance"]:
        return status
    until = worker["maintenance_until"]
    return [status, ", in maintenance", [", ends ", when(visit, until)] if until else None]


async def show(visit: Visit) -> web.Response:
    """Show a worker."""
    source, id_ = visit.path["source"], visit.path["id"]
    shown = await visit.ask("showWorker", {"source": source, "id": id_})
    return visit.page(
        id_,
        tag("p", *_actions(visit, shown), class_="actions"),
        fields(
            ("Source", tag("a", source, href=visit.link("sources", source))),
            ("Last heartbeat", exact(visit, shown["last_heartbeat"])),
            ("Registered", exact(visit, shown["registered_at"])),
            ("Endpoint", shown["endpoint"] or NONE),
            ("Version", shown["version"] or NONE),
            ("Environment", shown["environment"] or NONE),
            ("Restarts", number(shown["restarts"])),
            ("Uptime", NONE if shown["uptime"] is None else duration(shown["uptime"])),
            ("Load", _load(shown)),
            ("Events", tag("a", "of this worker", href=visit.link("events", source=source, subject=id_))),
        ),
        tag("h2", "Heartbeats of the last hour"),
        tag("p", beats(shown), " ", heard_bars(shown["heard_minutes"])[1]),
        tag("h2", "Sessions"),
        await table(
            visit,
            "As the worker reported them",
            ("Session", "Status", "Phone", "Name", "Last activity"),
            [
                (
                    each["id"],
                    each["status"],
                    each["phone"] or NONE,
                    each["name"] or NONE,
                    each["last_activity"] or NONE,
                )
                for each in shown["sessions"]
            ],
            empty="None reported.",
        ),
        tag("h2", "Commands"),
        await table(
            visit,
            "Newest first",
            ("Command", "State", "Created", "Sent", "Expires"),
            [
                (
                    tag("code", msgspec.json.encode(each["command"]).decode()),
                    state("pending" if each["state"] == "queued" else "", each["state"]),
                    when(visit, each["created_at"]),
                    when(visit, each["sent_at"]),
                    when(visit, each["expires_at"]),
                )
                for each in shown["commands"]
            ],
            empty="None.",
        ),
        tag("p", command("workers", "show", source, id_)),
        section=SECTION,
        heading=[id_, ": ", status_of(visit, shown)],
    )


def _load(worker: Mapping[str, Any]) -> str:
    figures = [f"{label} {worker[key]:g} %" for key, label in (("cpu", "CPU"), ("memory", "memory"))
               if worker[key] is not None]  # fmt: skip
    return ", ".join(figures) or NONE


def maintenance(visit: Visit, worker: Mapping[str, Any], *, of: str | None = None) -> Content:
    """Return the button that begins or ends a worker's maintenance; `of` as for `action`."""
    words = ("workers", "maintenance", worker["source"], worker["id"])
    call = f"POST {_call(worker)}/maintenance"
    if worker["maintenance"]:
        return action(
            visit, "End maintenance", *words, "off", call=call, body={"on": False},
            count="1 worker; it is reported offline again when its heartbeats stop", of=of,
        )  # fmt: skip
    return action(
        visit, "Maintenance for 2 h", *words, "on", "--for", "2h", call=call, body={"on": True, "for": "2h"},
        count="1 worker; it is not reported offline meanwhile", of=of,
    )  # fmt: skip


def _call(worker: Mapping[str, Any]) -> str:
    """Return the path of a worker's endpoints."""
    return f"workers/{quote(worker['source'], safe='')}/{quote(worker['id'], safe='')}"


def _actions(visit: Visit, worker: Mapping[str, Any]) -> Iterator[Content]:
    source, id_ = worker["source"], worker["id"]
    base = _call(worker)
    yield maintenance(visit, worker)
    yield action(
        visit, "Forget", "workers", "forget", source, id_, call=f"DELETE {base}",
        count="1 worker; its next heartbeat registers it again", danger=True,
    )  # fmt: skip


def beats(worker: Mapping[str, Any]) -> Markup:
    """Return a bar for every two minutes of the last hour, oldest first: full, half or a gap."""
    bars, words = heard_bars(worker["heard_minutes"])
    return tag("span", bars, class_="beats", role="img", aria_label=words)
