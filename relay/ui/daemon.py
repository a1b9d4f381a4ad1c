"""The daemon itself: jobs and backups, the configuration, the doctor's checks, and the nodes."""

from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

import msgspec
from aiohttp import web

from relay.config.effective import with_origins
from relay.ui.markup import Content, Markup, escape, join, maker, tag
from relay.ui.page import Visit
from relay.ui.parts import (
    NONE,
    Narrow,
    action,
    command,
    exact,
    fields,
    inquiry,
    number,
    size,
    state,
    table,
    when,
)


async def jobs(visit: Visit) -> web.Response:
    """Show periodic jobs, and the state and files of the backups."""
    found = (await visit.ask("listJobs"))["items"]
    database = await visit.ask("showDatabase", query={"counts": "0"})
    backups = (await visit.ask("status"))["backups"]
    return visit.page(
        "Jobs and backups",
        await table(
            visit,
            "Periodic jobs of this daemon",
            ("Job", "Result", "Every", "Last run", "Took", "Next run", "Change"),
            (_job(visit, each) for each in found),
            numbers=("Took",),
            narrow=Narrow("Result", (), ("Every", "Took", "Next run")),
        ),
        tag("h2", "Backups"),
        fields(*_backups(visit, backups)),
        tag("p", *_changes(visit, database), class_="actions"),
        await table(
            visit,
            "Files",
            ("File", "Size", "Made"),
            [
                (each["path"], size(each["bytes"]), when(visit, each["made_at"]))
                for each in database["backups"]
            ],
            empty="No backup file.",
        ),
        tag("h2", "Database"),
        fields(
            ("Database", database["path"]),
            ("Engine", database["engine"]),
            ("Size", size(database["bytes"])),
            ("Oldest event", when(visit, database["oldest"])),
            (
                "Pending",
                tag("a", number(database["pending"]), href=visit.link("deliveries", state="pending")),
            ),
        ),
        tag("p", inquiry(visit, "Count events", "db", "status", call="GET db", scope="read")),
        tag("p", command("jobs", "list"), " ", command("db", "status")),
        section="jobs",
    )


def _job(visit: Visit, job: Mapping[str, Any]) -> tuple[Content, ...]:
    name = job["name"]
    if job["running"]:
        result = state("pending", "running")
    elif job["error"]:
        result = state("dead", job["error"])
    else:
        result = state("delivered", "ok") if job["runs"] else state("", "has not run yet")
    return (
        name,
        result,
        job["every"],
        when(visit, job["started_at"]),
        NONE if job["seconds"] is None else f"{job['seconds'] * 1000:,.1f} ms",
        when(visit, job["next_run_at"]),
        action(visit, "Run now", "jobs", "run", name, call=f"POST jobs/{name}/run", count="one run", of=name),
    )


def _backups(visit: Visit, backups: Mapping[str, Any] | None) -> Iterator[tuple[str, Content]]:
    if backups is None:
        yield "Schedule", "off: [backup] every is not set"
        return
    yield "Schedule", f"every {backups['interval']}"
    yield "Last success", exact(visit, backups["last_success"])
    if backups["error"]:
        yield "Last error", state("dead", backups["error"])
    elif backups["overdue"]:
        yield "State", state("dead", "overdue")


def _changes(visit: Visit, database: Mapping[str, Any]) -> Iterator[Content]:
    """Yield the changes of an SQLite file; the tools of PostgreSQL back up and compact its databases."""
    if database["sqlite"] is not None:
        yield action(
            visit, "Back up now", "db", "backup", call="POST db/backup", scope="admin",
            count=f"a copy of {size(database['bytes'])}, which is checked",
        )  # fmt: skip
        if database["free"]:
            yield action(
                visit, "Compact", "db", "compact", call="POST db/compact", scope="admin",
                count=f"up to {size(database['free'])} go back to the disk",
            )  # fmt: skip


_LINES = 50
"""Lines of the configuration that are escaped at once, which is faster than one by one."""

_set = maker("b")
"""Makes the element of a setting that config.toml sets."""


class Settings:
    """The latest effective configuration and its lines, which take some milliseconds and rarely change."""

    def __init__(self) -> None:
        self._shown = b""  # as JSON, because 1 and true are equal in Python
        self._lines = Markup()

    async def lines(self, visit: Visit, shown: Mapping[str, Any]) -> Markup:
        """Return the lines; other tasks run between the parts."""
        config, origins = shown["config"], shown["origins"]
        if (now := msgspec.json.encode((config, origins))) != self._shown:
            lines = join(*[part async for part in _parts(visit, config, origins)])
            self._shown, self._lines = now, lines
            return lines
        return self._lines


async def _parts(
    visit: Visit, tables: Mapping[str, Any], origins: Mapping[str, str]
) -> AsyncIterator[Markup]:
    defaults: list[str] = []
    for line, place in with_origins(tables, origins):
        is_set = place not in ("", "default")
        if is_set or len(defaults) == _LINES:
            yield escape("".join(defaults))
            defaults.clear()
            await visit.turns.give()
        if is_set:
            yield _set(f"{line}  # {place}\n")
        else:
            defaults.append(f"{line}\n")
    yield escape("".join(defaults))


_settings = Settings()


async def config(visit: Visit) -> web.Response:
    """Show the effective configuration, and what a reload would change."""
    shown = await visit.ask("showConfig")
    reload = action(
        visit, "Reload", "reload", call="POST reload", scope="admin",
        count="the whole file is applied, or nothing",
    )  # fmt: skip
    compare = inquiry(
        visit, "Compare with the file", "reload", "--dry-run", call="POST reload", body={"dry_run": True},
        scope="admin",
    )  # fmt: skip
    return visit.page(
        "Configuration",
        tag(
            "p",
            "Effective settings; secrets are masked. Comments name the file and line of each setting; "
            "settings without a comment have their defaults. File: ",
            tag("code", shown["path"]),
        ),
        tag(
            "ul",
            [tag("li", state("expired", each), class_="mild") for each in shown["warnings"]],
            class_="problems",
        )
        if shown["warnings"]
        else None,
        tag("p", compare, " ", reload, class_="actions"),
        tag(
            "pre",
            "\n",
            await _settings.lines(visit, shown),
            tabindex=0,
            aria_label="Configuration",
            class_="settings",
        ),
        tag("p", command("config", "show", "--origins")),
        section="config",
    )


async def doctor(visit: Visit) -> web.Response:
    """Offer the doctor's checks; they read the whole database, so a person starts them."""
    run = inquiry(visit, "Run all checks", "doctor", call="GET doctor", scope="read")
    return visit.page(
        "Doctor",
        tag(
            "p",
            "Checks database, disk, clock, backlog, jobs and backups. A large database takes some minutes; "
            "the relay keeps running meanwhile.",
        ),
        tag("p", run, class_="actions"),
        tag("p", command("doctor")),
        section="doctor",
    )


async def nodes(visit: Visit) -> web.Response:
    """Show the nodes that share the database."""
    found = (await visit.ask("listNodes"))["items"]
    differing = len({each["config"] for each in found}) > 1
    return visit.page(
        "Nodes",
        tag("p", state("expired", "The nodes have different configurations."), class_="summary")
        if differing
        else None,
        await table(
            visit,
            "Nodes that share the database",
            ("Node", "Version", "Started", "Seen", "Destinations", "Jobs", "Configuration"),
            (_node(visit, each) for each in found),
        ),
        tag("p", command("nodes")),
        section="nodes",
    )


def _node(visit: Visit, node: Mapping[str, Any]) -> tuple[Content, ...]:
    names: list[Content] = [
        [tag("a", lane, href=visit.link("destinations", lane.partition("/")[0])), " "]
        for lane in node["lanes"]
    ]
    return (
        [node["name"], " (this node)" if node["is_self"] else None],
        node["version"],
        when(visit, node["started_at"]),
        when(visit, node["seen_at"]),
        names or NONE,
        ", ".join(node["jobs"]) or NONE,
        tag("code", node["config"]),
    )
