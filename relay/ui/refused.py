"""Refused requests: the list with counts, and one request with its headers and body."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from aiohttp import web

from relay.ui.body import body_of
from relay.ui.markup import Content, tag
from relay.ui.page import Visit
from relay.ui.parts import (
    NONE,
    Narrow,
    action,
    api_query,
    checkbox,
    command,
    command_of_list,
    exact,
    fields,
    filter_form,
    nothing,
    number,
    of_selected,
    pages,
    prose,
    size,
    state,
    table,
    when,
)

SECTION = "refused"
NO_SOURCE = "no source owns this path"


async def list_(visit: Visit) -> web.Response:
    """List refused requests, with the counts of the last hour above."""
    page = await visit.ask("listRefused", query=api_query(visit))
    history = await visit.ask("history", query={"periods": "1", "running": "1"})
    sources = (await visit.ask("listSources"))["items"]
    last = {each["name"]: each["last_event"] for each in sources}
    return visit.page(
        "Refused requests",
        await table(
            visit,
            "Sources with refused requests in the last hour",
            ("Source", "Refused", "Kept (this page)", "Last stored event"),
            _sources(visit, history["sources"], page["items"], last),
            numbers=("Refused",),
            empty="No request to a source was refused in the last hour.",
        ),
        filter_form(visit, "refused", page["items"]),
        await table(
            visit,
            "Kept requests, newest first",
            ("Problem", "Source", "Time", "Status", "Request", "Retried"),
            (_row(visit, each) for each in page["items"]),
            narrow=Narrow("Time", ("Source", "Status", "Request")),
            empty=nothing(
                visit,
                "request",
                page["next_cursor"],
                "No request was refused. If a sender misses events, check its secret: ",
                command("verify", "--help"),
            ),
        ),
        of_selected(
            visit,
            action(
                visit,
                "Handle",
                "refused",
                "retry",
                call="POST refused/retry",
                body={"ids": []},
                counts=True,
                nouns="request requests",
                selected=True,
            ),
        )
        if any(map(_may_be_kept, page["items"]))
        else None,
        pages(visit, page["next_cursor"], len(page["items"])),
        tag(
            "p",
            "Requests that were refused with 429 or 503 are not kept, because their senders repeat them.",
            class_="note",
        ),
        tag("p", command_of_list("refused", "refused", "list", query=visit.query)),
        section=SECTION,
    )


def _sources(
    visit: Visit,
    history: Sequence[Mapping[str, Any]],
    items: Sequence[Mapping[str, Any]],
    last: Mapping[str, str | None],
) -> Iterator[tuple[Content, ...]]:
    kept: dict[str, Counter[str]] = {}
    for each in items:
        kept.setdefault(each["source"] or "", Counter())[each["reason"]] += 1
    for source in history:
        count = sum(value or 0 for value in source["refused"])
        if count or source["name"] in kept:
            reasons = kept.get(source["name"], Counter()).most_common()
            yield (
                tag("a", source["name"], href=visit.link("sources", source["name"])),
                tag("a", number(round(count)), href=visit.link(SECTION, source=source["name"], since="1h")),
                _reasons(visit, source["name"], reasons) or NONE,
                _last(visit, source["name"], last.get(source["name"])),
            )


def _reasons(visit: Visit, name: str, reasons: Sequence[tuple[str, int]]) -> list[Content]:
    """Return the reasons of kept requests, each with the number of requests as a link to them."""
    return [
        [", " if at else None, f"{reason} ",
         tag("a", number(times), href=visit.link(SECTION, source=name, reason=reason))]
        for at, (reason, times) in enumerate(reasons)
    ]  # fmt: skip


def _last(visit: Visit, name: str, time: str | None) -> Content:
    """Return when the source last stored an event, as a link to its events."""
    return "never" if time is None else tag("a", when(visit, time), href=visit.link("events", source=name))


def _row(visit: Visit, each: Mapping[str, Any]) -> tuple[Content, ...]:
    return (
        [
            checkbox(visit, each["id"], _problem(each)) if _may_be_kept(each) else None,
            tag("a", _problem(each), href=visit.link(SECTION, each["id"])),
            [
                tag("div", f"{finding['where']}: {finding['what']}", class_="note")
                for finding in each["findings"]
            ],
        ],
        each["source"] or NONE,
        when(visit, each["at"]),
        f"{each['status']} {each['reason']}",
        [
            tag("code", f"{each['method']} {each['target']}"),
            tag("div", f"from {each['remote']}", class_="note"),
        ],
        _retried(visit, each),
    )


def _may_be_kept(each: Mapping[str, Any]) -> bool:
    """Return whether a request may have been kept with its body. The dry run of a retry counts exactly."""
    return each["source"] is not None and each["reason"] != "auth" and each["event_id"] is None


def _brief(finding: Mapping[str, str]) -> str:
    return f"{finding['where']}: {finding['what']}"


def _problem(each: Mapping[str, Any]) -> str:
    text: str = each["problem"] or each["reason"]
    return text[:1].upper() + text[1:]


def _retried(visit: Visit, each: Mapping[str, Any]) -> Content:
    if each["retried_at"] is None:
        return NONE
    if each["event_id"] is None:
        return ["refused again ", when(visit, each["retried_at"])]
    return tag("a", state("delivered", "stored"), href=visit.link("events", each["event_id"]))


async def show(visit: Visit) -> web.Response:
    """Show a refused request, the next step, and its headers and body with masked tokens."""
    id_ = visit.path["id"]
    shown = await visit.ask("showRefused", {"id": id_})
    head = [f"{shown['method']} {shown['target']}", *(f"{name}: {value}" for name, value in shown["headers"])]
    retry = action(
        visit, "Handle again", "refused", "retry", shown["id"],
        call=f"POST refused/{shown['id']}/retry",
        count="1 request; if the source accepts it now, it becomes an event and is delivered",
    )  # fmt: skip
    return visit.page(
        _problem(shown),
        tag("p", state("dead", f"{shown['status']} {shown['reason']}"), class_="summary"),
        tag("p", retry, class_="actions") if shown["can_retry"] and shown["event_id"] is None else None,
        fields(
            ("Request", tag("code", shown["id"], data_copy=shown["id"])),
            ("Source", _source(visit, shown["source"])),
            *([("Field", shown["field"])] if shown["field"] else []),
            ("Sender", shown["remote"]),
            ("Received", exact(visit, shown["at"])),
            ("Body", size(shown["size"]) + ("" if shown["can_retry"] else ", not kept")),
            *([("Retried", _retried(visit, shown))] if shown["retried_at"] else []),
        ),
        _diagnosis(shown["findings"]),
        tag("h2", "What to do"),
        tag("p", *_advice(shown)),
        tag("h2", "Request"),
        tag("pre", "\n", "\n".join(head), tabindex=0, aria_label="Head"),
        await _body(visit, shown["body"]),
        tag("p", command("refused", "show", shown["id"])),
        section=SECTION,
    )


def _source(visit: Visit, name: str | None) -> Content:
    return NO_SOURCE if name is None else tag("a", name, href=visit.link("sources", name))


def _diagnosis(findings: Sequence[Mapping[str, str]]) -> Content:
    """Return the diagnosis that the relay made when the request arrived."""
    if not findings:
        return None
    items = [
        tag(
            "li",
            tag("b", each["where"]),
            ": ",
            each["what"],
            tag("div", prose(f"{each['do'][:1].upper()}{each['do'][1:]}."), class_="note"),
        )
        for each in findings
    ]
    return [tag("h2", "Diagnosis"), tag("ul", items, class_="problems")]


def _advice(shown: Mapping[str, Any]) -> Iterator[Content]:
    source = shown["source"]
    if source is None:
        yield "Compare the sender's address with the paths of the sources: "
        yield command("sources", "list")
    elif shown["reason"] in ("auth", "forbidden"):
        yield "Compare the sender's secret with the one in config.toml. To diagnose a captured request: "
        yield command("verify", "--source", source, "--request", "captured.http")
    elif shown["can_retry"]:
        yield "Correct the configuration or the plugin, then handle the request again: "
        yield command("refused", "retry", shown["id"])
    else:
        yield "Correct the sender, or the source's settings: "
        yield command("sources", "show", source)


async def _body(visit: Visit, body: str | None) -> Content:
    return None if body is None else [tag("h2", "Body", id="body"), await body_of(visit, body, "Body")]
