"""Parts that several pages share: times, states, tables, filters, commands and actions."""

import re
import shlex
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from itertools import groupby
from typing import Any
from urllib.parse import urlencode

import msgspec

from relay.api.query_params import ListFilter, filters_of, read_field
from relay.base.clock import SECOND
from relay.base.units import render_size
from relay.config.schema import Scope
from relay.routing.condition_text import read_conditions
from relay.ui.markup import Content, Markup, Value, join, maker, tag
from relay.ui.page import Visit

MOST_BUTTONS = 64
"""Buttons whose constant attributes are cached."""

ROWS = 50
"""Entries of a page of a list, unless its address has a limit."""

NONE = "\N{EN DASH}"
"""Text in place of a value that is missing."""

SHAPES: Mapping[str, tuple[str, str]] = {
    "delivered": ("✔", "good"),
    "pending": ("◔", "wait"),
    "dead": ("✖", "bad"),
    "expired": ("▲", "warn"),
    "cancelled": ("▲", "warn"),
    "online": ("✔", "good"),
    "offline": ("✖", "bad"),
}
"""Shape and class of each state: no state is shown by its colour alone."""


def when(visit: Visit, time: str | None) -> Content:
    """Return a time as its age, with the exact time in UTC on hover; the script keeps the age current."""
    if time is None:
        return NONE
    passed = visit.now / SECOND - datetime.fromisoformat(time).timestamp()
    words = f"in {duration(-passed)}" if passed <= -1 else f"{duration(max(0, passed))} ago"
    return _time(words, datetime=time, title=f"{time[:10]} {time[11:19]} UTC")


_time = maker("time")


def exact(visit: Visit, time: str | None) -> Content:
    """Return a time in full and its age; the script can show it in the browser's time zone."""
    if time is None:
        return NONE
    full = tag("time", f"{time[:-1].replace('T', ' ')} UTC", datetime=time, data_exact=True)
    return [full, " ", tag("span", when(visit, time), class_="note")]


def clock(time: str | None, since: str | None = None) -> Content:
    """Return a time of day, with its date if that differs from the date of `since`."""
    if time is None:
        return NONE
    full = f"{time[:-1].replace('T', ' ')} UTC"
    if since is not None and time[:10] != since[:10]:
        return tag("time", full, datetime=time, data_exact=True)
    return tag("time", time[11:-1], datetime=time, data_exact="clock", title=full)


def took(milliseconds: float) -> str:
    r"""Render the duration of an attempt or a reply; no line breaks before its unit.

    >>> took(0.4), took(41.25), took(1234.5)
    ('0.4\xa0ms', '41\xa0ms', '1.2\xa0s')
    """
    if milliseconds < 10:  # noqa: PLR2004 - two digits
        return f"{milliseconds:.1f}\N{NO-BREAK SPACE}ms"
    if milliseconds < 1000:  # noqa: PLR2004 - a second
        return f"{milliseconds:.0f}\N{NO-BREAK SPACE}ms"
    return f"{milliseconds / 1000:,.1f}\N{NO-BREAK SPACE}s"


def copy(what: str, text: str | None = None, *, source: str | None = None) -> Markup:
    """Return a button that copies a text, or the text of the element with the id `source`."""
    return tag(
        "button", f"Copy {what}", type="button", class_="scripted", data_copy=text, data_copy_from=source
    )


def duration(seconds: float) -> str:
    """Render a duration with its two largest units.

    >>> duration(0.2), duration(59), duration(3_700), duration(180_000)
    ('0 s', '59 s', '1 h 1 min', '2 d 2 h')
    """
    left = int(seconds)
    for unit, length, smaller, part in _UNITS:
        if left >= length:
            count, rest = divmod(left // part, length // part)
            return f"{count} {unit} {rest} {smaller}" if rest else f"{count} {unit}"
    return f"{left} s"


_UNITS = (("d", 86_400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1))
"""Units of a duration and their seconds, each with the next smaller one."""


def state(word: str, text: str | None = None) -> Markup:
    """Return a state with its shape and colour."""
    make, shape = _STATES.get(word, _OTHER)
    return make(shape, text or word)


def _maker_of(shape: str, kind: str) -> tuple[Callable[..., Markup], Markup]:
    return maker("span", class_=f"state {kind}"), join(tag("span", shape, aria_hidden="true"), " ")


_STATES = {word: _maker_of(*each) for word, each in SHAPES.items()}
_OTHER = _maker_of("•", "plain")


def number(value: float | None) -> str:
    """Render a number with separators, or a dash.

    >>> number(1204), number(0.25)
    ('1,204', '0.2')
    """
    if value is None:
        return NONE
    return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}"


def size(count: int | None) -> str:
    """Render a number of bytes."""
    return NONE if count is None else render_size(count)


class Span(msgspec.Struct, frozen=True):
    """The period until now that the figures and charts of a page cover."""

    name: str
    since: str  # value of the filter `since` of lists
    minutes: int
    heading: str  # of a column with charts
    bars: int  # number of bars of a chart
    bar: str  # time that a bar covers
    start: str

    def query(self, **more: str) -> dict[str, str]:
        """Return the query of the history."""
        return {"minutes": str(self.minutes), "running": "1", **more}


HOUR = Span("hour", "1h", 60, "Last 60 min", 30, "2 min", "60 min ago")
DAY = Span("day", "24h", 1440, "Last 24 h", 24, "1 h", "24 h ago")


def span_of(visit: Visit) -> Span:
    """Return the period that the address of a page selects."""
    return DAY if visit.query.get("last") == DAY.name else HOUR


def spans(visit: Visit) -> Markup:
    """Return the links that select the period of a page."""
    now, items = span_of(visit), list[Markup]()
    for each in (HOUR, DAY):
        address = query_link(visit.query, {"last": None if each is HOUR else each.name})
        link = tag("a", f"Last {each.name}", href=address, aria_current="true" if each is now else None)
        items.append(tag("li", link))
    return tag("nav", tag("ul", items), class_="tabs", aria_label="Period of the figures")


class Narrow(msgspec.Struct, frozen=True):
    """The layout of a table's rows on a narrow screen; with `lead`, a row has two lines."""

    lead: str = ""  # heading of the column beside the row's name, in the first line
    bare: tuple[str, ...] = ()  # columns of the second line without their headings, cut off if too long
    minor: tuple[str, ...] = ()  # not shown


BLOCKS = Narrow()
"""On a narrow screen, each value has its own line."""


async def table(
    visit: Visit,
    caption: str,
    heads: Sequence[str],
    rows: Iterable[Sequence[Content]],
    *,
    numbers: Collection[str] = (),
    sorts: Collection[str] = (),
    narrow: Narrow = BLOCKS,
    empty: Content = "No entries.",
) -> Markup:
    """Return a table, or the text `empty`. The first cell of a row names the row.

    On narrow screens, each row becomes a block of lines; each value follows its column's heading, and missing
    values are left out. Other tasks run between the rows: give them as a generator, so that each one is made
    in its turn.

    Args:
        visit: the request for the page.
        caption: of the table.
        heads: of the columns.
        rows: cells in the order of the columns.
        numbers: columns that are aligned to the right.
        sorts: headings that sort the list, see `in_order`.
        narrow: the layout on a narrow screen.
        empty: shown if there are no rows.
    """
    kinds = ["n" if head in numbers else None for head in heads]
    unnamed = (HOUR.heading, DAY.heading, narrow.lead, *narrow.bare)
    makers = [
        maker("th", scope="row"),
        *(
            maker("td", data_head=None if head in unnamed else head, class_=_class(kind, head, narrow))
            for head, kind in zip(heads[1:], kinds[1:], strict=True)
        ),
    ]
    body: list[Markup] = []
    for row in rows:
        cells = [
            _NOTHING[kind] if cell == NONE else make(cell)
            for make, kind, cell in zip(makers, kinds, row, strict=True)
        ]
        body.append(_in_row(cells))
        await visit.turns.give()
    if not body:
        return tag("p", empty, class_="empty")
    titles = [
        _heading(visit, head, kind) if head.lower() in sorts else tag("th", head, scope="col", class_=kind)
        for head, kind in zip(heads, kinds, strict=True)
    ]
    head = tag("thead", tag("tr", titles))
    lined = "lined" if narrow.lead else None
    return tag(
        "div", tag("table", tag("caption", caption), head, tag("tbody", body), class_=lined), class_="wide"
    )


def _class(kind: str | None, head: str, narrow: Narrow) -> str | None:
    places = {"lead": (narrow.lead,), "bare": narrow.bare, "minor": narrow.minor}
    names = [kind or "", *(name for name, heads in places.items() if head in heads)]
    return " ".join(filter(None, names)) or None


_in_row = maker("tr")
_NOTHING = {kind: tag("td", NONE, class_=f"{kind} none" if kind else "none") for kind in (None, "n")}
"""The cell of a value that is missing."""


def nothing(visit: Visit, noun: str, more: str | None, *first: Content) -> Content:
    """Return the text of an empty list; `noun` names an entry.

    `more` is the cursor of the next page. `first` is shown if the list has no filter, so it has no entries.
    """
    if more:
        return f"No {noun} matches on this page; there may be more."
    if any(value for name, value in visit.query.items() if name not in ("cursor", "limit")):
        return [f"No {noun} matches. ", tag("a", "Remove the filters", href="?")]
    return first


def fields(*pairs: tuple[str, Content]) -> Markup:
    """Return a list of names and values."""
    return tag("dl", [tag("div", tag("dt", name), tag("dd", value)) for name, value in pairs])


def command(*words: str) -> Markup:
    """Return a `relay` command to copy."""
    return command_line(shlex.join(("relay", *words)))


def command_line(line: str) -> Markup:
    """Return a command line to copy."""
    return tag("code", line, class_="command", data_copy=line)


def prose(text: str) -> Content:
    """Return a text of the API in which `commands` stand between backticks."""
    return [
        each if not index % 2 else command_line(each) if each.startswith("relay ") else tag("code", each)
        for index, each in enumerate(text.split("`"))
    ]


def command_of_list(kind: str, *words: str, query: Mapping[str, str]) -> Markup:
    """Return the command that shows the same list as a page with these query parameters."""
    return command(*words, *options_of(kind, query))


def options_of(kind: str, query: Mapping[str, str]) -> list[str]:
    """Return the options of a command for the filters of a list in a page's query."""
    options: list[str] = []
    for each in filters_of(kind):
        options += _FLAGS.get((each.name, query.get(each.name)), ())
        if each.option is not None and query.get(each.name):
            texts = _conditions(query[each.name]) if each.name == "where" else [query[each.name]]
            options += [word for text in texts for word in (f"--{each.option}", text)]
    return options


_FLAGS: Mapping[tuple[str, str | None], Sequence[str]] = {
    ("failed", "1"): ("--failed",),
    ("failed", "0"): ("--result", "ok"),
}
"""Options for filters that have no option with a value."""


def api_query(visit: Visit, kind: str | None = None) -> dict[str, Any]:
    """Return a page's query for the API: conditions on the event become its table of conditions.

    With `kind`, a list of `relay.api.query_params.LISTS`, return only its filters, for the body of a request.

    Raises:
        RelayError: the conditions are invalid.
    """
    query: dict[str, Any] = {name: value for name, value in visit.query.items() if value}
    if kind is not None:
        known = {each.name for each in filters_of(kind)}
        query = {name: value for name, value in query.items() if name in known}
    if "where" in query:
        table = read_field("where", read_conditions, _conditions(query["where"]), hint=_WHERE)
        query["where"] = table if kind is not None else msgspec.json.encode(table).decode()
    return query


_AND = re.compile(r"\s+and\s+")
_WHERE = "example: data.total>=100 and data.sale_made=true"


def _conditions(text: str) -> list[str]:
    return _AND.split(text.strip())


def attempt_result(attempt: Mapping[str, Any]) -> Markup:
    """Return the result of an attempt with its status or error."""
    detail = attempt["error"] or ("" if attempt["status"] is None else f"HTTP {attempt['status']}")
    result = attempt["result"]
    return state("delivered" if result == "ok" else "dead", f"{result}: {detail}" if detail else result)


def action(
    visit: Visit,
    label: str,
    *words: str,
    call: str,
    body: Mapping[str, Any] | None = None,
    count: str | None = None,
    counts: bool = False,
    nouns: str | None = None,
    rate: float | None = None,
    danger: bool = False,
    selected: bool = False,
    of: str | None = None,
    scope: Scope = "operate",
) -> Content:
    """Return a button for a change; nothing if the operator's scope does not include it.

    The script shows the command and the count, asks for a confirmation, and then sends the request.

    Args:
        visit: the request for the page.
        label: of the button.
        words: the `relay` command that does the same, without `relay`.
        call: method and path of the endpoint below `/api/`, such as "POST deliveries/retry".
        body: of the request.
        count: what the change is about, such as "1 delivery".
        counts: whether a dry run with the same body returns the count.
        nouns: singular and plural for the count, such as "request requests"; by default, deliveries.
        rate: at which the relay works through them, per second.
        danger: whether it cannot be undone.
        selected: whether it changes the rows that are selected on the page; the script adds their ids.
        of: addition to the label for screen readers, if several buttons on the page have the same label.
        scope: that the endpoint needs.
    """
    if not visit.may(scope):
        return None
    make = _button(
        class_="scripted danger" if danger else "scripted",
        data_call=call,
        data_count=count,
        data_counts=counts,
        data_nouns=nouns,
        data_pace=rate,
        data_selected=label if selected else None,
        disabled=selected,
    )
    return make(
        label,
        aria_label=f"{label}: {of}" if of else None,
        data_body=msgspec.json.encode(body or {}).decode(),
        data_command=shlex.join(("relay", *words)),
    )


@lru_cache(MOST_BUTTONS)
def _button(**constant: Value) -> Callable[..., Markup]:
    """Return the maker of a button that is in each row of a page, with the attributes that do not differ."""
    return maker("button", type="button", **constant)


def checkbox(visit: Visit, id_: str, name: str) -> Content:
    """Return the checkbox that selects a row for `of_selected`; `name` is that of the row."""
    if not visit.may("operate"):
        return None
    label = f"Select {name}"
    return tag("input", type="checkbox", name="id", value=id_, class_="scripted", aria_label=label)


def of_selected(visit: Visit, *actions: Content) -> Content:
    """Return the buttons that change the selected rows; the script adds the ids."""
    if not visit.may("operate"):
        return None
    everything = tag("button", "Select all on this page", type="button", data_select=True)
    return tag("p", everything, actions, class_="actions selected scripted")


def inquiry(
    visit: Visit, label: str, *words: str, call: str, body: Mapping[str, Any] | None = None, scope: Scope
) -> Content:
    """Return a button for a request that changes nothing; the script shows its result below the button.

    The parameters are those of `action`.
    """
    if not visit.may(scope):
        return None
    button = tag(
        "button",
        label,
        type="button",
        class_="scripted",
        title=shlex.join(("relay", *words)),
        data_ask=call,
        data_body=msgspec.json.encode(body or {}).decode(),
    )
    return [button, tag("output", class_="result")]


_LABELS: Mapping[str, str] = {
    "id": "id", "event_id": "event id", "delivery_id": "delivery id", "replayed": "sent again",
    "since": "since", "until": "before", "where": "condition on the event", "failed": "failed",
}  # fmt: skip
"""Labels of filters whose name is not a good label."""

_CHOICES: Mapping[str, Sequence[str]] = {"since": ("15m", "1h", "24h", "7d"), "failed": ("1", "0")}
"""Suggested values of filters. Other filters suggest the values on the page."""

_WORDS = {("failed", "1"): "yes", ("failed", "0"): "no"}
_IDS = ("id", "event_id", "delivery_id")
"""Filters without suggestions, because each row links to its own ids."""

MOST_SUGGESTED = 8
"""Maximum number of suggested values of a filter."""

LONGEST_SUGGESTED = 60
"""Maximum number of characters of a suggested value."""


def filter_form(visit: Visit, kind: str, items: Iterable[Mapping[str, Any]] = ()) -> Markup:
    """Return the active filters of a list, each with a link that removes it, and ways to add filters.

    The links work without JavaScript; the script turns the fields of the form into an address.

    Args:
        visit: the request for the page.
        kind: a list of `relay.api.query_params.LISTS`.
        items: the entries on the page, whose values are suggested.
    """
    known = filters_of(kind)
    given = {each.name: visit.query[each.name] for each in known if visit.query.get(each.name)}
    query = {name: value for name, value in visit.query.items() if value and name != "cursor"}
    cross = tag("span", " \N{MULTIPLICATION SIGN}", role="img", aria_label="remove")
    chips = [
        tag("li", tag("a", f"{_label(name)} ", tag("b", _WORDS.get((name, value), value)), cross,
                      href=query_link(query, {name: None})))
        for name, value in given.items()
    ]  # fmt: skip
    found = tuple(items)
    suggestions = [
        (_label(each.name), [[tag("a", text, href=query_link(query, {each.name: value})), " "]
                             for value, text in _suggested(each, found)])
        for each in known if each.name not in given
    ]  # fmt: skip
    rows = [
        tag("label", tag("span", _label(each.name)), _field(each, given.get(each.name, "")), title=each.help)
        for each in known
    ]
    form = tag("form", rows, tag("button", "Filter"), data_filter=True, class_="scripted filters")
    more = fields(*((name, links) for name, links in suggestions if links))
    add = tag("details", tag("summary", "+ Filter"), more, form)
    return tag("div", tag("ul", chips, class_="chips") if chips else None, add, class_="filterbar")


def _label(name: str) -> str:
    return _LABELS.get(name, name)


def _suggested(each: ListFilter, items: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Return suggested values for a filter and their texts: all valid values, or those on the page."""
    values = each.choices or _CHOICES.get(each.name, ())
    if not values and each.name not in _IDS:
        seen = (item.get(each.name) for item in items)
        texts = dict.fromkeys(str(value) for value in seen if value not in (None, ""))
        values = [text for text in texts if len(text) <= LONGEST_SUGGESTED][:MOST_SUGGESTED]
    return [(value, _WORDS.get((each.name, value), value)) for value in values]


def _field(each: ListFilter, value: str) -> Markup:
    choices = each.choices or (_CHOICES["failed"] if each.name == "failed" else ())
    if not choices:
        return tag("input", name=each.name, value=value, autocomplete="off", spellcheck="false")
    options = [
        tag("option", _WORDS.get((each.name, choice), choice), value=choice, selected=choice == value)
        for choice in choices
    ]
    return tag("select", tag("option", "", value=""), options, name=each.name)


def in_order(
    visit: Visit, items: Sequence[Mapping[str, Any]], orders: Mapping[str, Callable[[Mapping[str, Any]], Any]]
) -> Sequence[Mapping[str, Any]]:
    """Sort all entries of a list by the column that `sort` in the address names; a minus reverses the order.

    `orders` has a sort key for each column, by its heading in lower case.
    """
    name = visit.query.get("sort", "")
    order = orders.get(name.removeprefix("-"))
    return items if order is None else sorted(items, key=order, reverse=name.startswith("-"))


def sorting(visit: Visit, heads: Iterable[str]) -> Markup:
    """Return links that sort a list on narrow screens, where its headings are not shown."""
    links = [[" · ", _sort_link(visit, head)] for head in heads]
    first = tag("a", "default", href=query_link(visit.query, {"sort": None}))
    return tag("p", "Sort by: ", first, links, class_="note narrow")


def _sort_link(visit: Visit, head: str, arrow: str = "") -> Markup:
    name = head.lower()
    other = f"-{name}" if visit.query.get("sort") == name else name
    shape = tag("span", f" {arrow}", aria_hidden="true") if arrow else None
    return tag("a", head, shape, href=query_link(visit.query, {"sort": other}))


def _heading(visit: Visit, head: str, kind: str | None) -> Markup:
    """Return a heading that sorts its table: texts in ascending order first, numbers in descending order."""
    name, chosen = head.lower(), visit.query.get("sort", "")
    if chosen.removeprefix("-") != name:
        return tag("th", _sort_link(visit, head), scope="col", class_=kind)
    is_falling = (kind == "n") != chosen.startswith("-")
    word, arrow = ("descending", "\N{BLACK DOWN-POINTING TRIANGLE}") if is_falling else (
        "ascending", "\N{BLACK UP-POINTING TRIANGLE}")  # fmt: skip
    return tag("th", _sort_link(visit, head, arrow), scope="col", class_=kind, aria_sort=word)


def query_link(query: Mapping[str, str], changes: Mapping[str, str | None]) -> str:
    """Return the address of the same page with other query parameters; None removes one."""
    given = {name: value for name, value in {**query, **changes}.items() if value is not None}
    return f"?{urlencode(given, errors='replace')}"


def pages(visit: Visit, next_cursor: str | None, shown: int) -> Content:
    """Return the links to the first and the next page of a list.

    `shown` is the number of entries on this page. A page may end before it is full, because the relay
    searches only for a short time.
    """
    is_early = shown < int(visit.query.get("limit") or ROWS)
    next_ = "Continue the search" if is_early else "Next page"
    links = [
        tag("a", "First page", href=query_link(visit.query, {"cursor": None}))
        if "cursor" in visit.query
        else None,
        tag("a", next_, href=query_link(visit.query, {"cursor": next_cursor}), rel="next")
        if next_cursor
        else None,
    ]
    return tag("nav", links, class_="pages", aria_label="Pages of the list") if any(links) else None


def total(values: Iterable[float | None]) -> str:
    """Render the sum of the figures of a history, or a dash if it has none."""
    known = [value for value in values if value is not None]
    return number(round(sum(known))) if known else NONE


_ID = re.compile(r"\b((?:evt|dlv)_[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12})\b")


def linked(visit: Visit, text: str) -> Content:
    """Return a text in which ids of events and deliveries are links."""
    pages = {"evt": "events", "dlv": "deliveries"}
    return [
        tag("a", part, href=visit.link(pages[part[:3]], part)) if index % 2 else part
        for index, part in enumerate(_ID.split(text))
    ]


def spark(values: Sequence[float | None], title: str, failed: Sequence[float | None] = ()) -> Content:
    """Return figures as a row of bars, oldest first; a gap where there is no figure.

    Each number of `failed` is the upper part of a bar, in another colour.
    """
    known = [value for value in values if value is not None]
    if not known:
        return None
    sums: Sequence[float | None] = ()
    if any(failed):
        sums = [(good or 0) + bad if bad else good for good, bad in zip(values, failed, strict=True)]
        known = [value for value in sums if value is not None]
    most = max(known)
    return _chart(
        _bad_bars(d=_bars(sums, most)) if sums else None,
        _good_bars(d=_bars(values, most)),
        viewbox=f"0 0 {len(values)} {_HEIGHT}",
        aria_label=f"{title}, at most {most:,.0f}",
    )


_chart = maker("svg", class_="spark", preserveaspectratio="none", role="img")
_good_bars, _bad_bars = maker("path"), maker("path", class_="bad")

_HEIGHT = 20


def _bars(values: Iterable[float | None], most: float) -> str:
    """Return the outline of bars; a bar of zero is a line. Equal neighbours are one bar."""
    scale = (_HEIGHT - 1) / most if most else 0
    tops = [_HEIGHT if value is None else _HEIGHT - 1 - int(value * scale) for value in values]
    runs = [f"V{top}h{len(list(same))}" for top, same in groupby(tops)]
    return f"M0 {_HEIGHT}{''.join(runs)}V{_HEIGHT}"


def charts(span: Span, *parts: tuple[str, Content, Content]) -> Markup:
    """Return figures of a period, each with its name, value and chart."""
    axis = tag("p", tag("span", span.start), tag("span", "now"), class_="note axis")
    boxes = [
        tag("div", tag("dt", name), tag("dd", value), tag("dd", bars, axis, class_="chart") if bars else None)
        for name, value, bars in parts
    ]
    return tag("dl", boxes, class_="charts")
