"""Bodies of events, as received and as a destination gets them. JSON is a tree or text."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import urlencode

from relay.api.words import curl_of
from relay.errors import RelayError
from relay.ui.markup import Content, tag
from relay.ui.outline import LONGEST, NotReadableError, Outline, Value, outline, plain
from relay.ui.page import Visit
from relay.ui.parts import command, copy, size, when

MOST_TEXT = 16 * 1024
"""Maximum number of characters of a text on one page."""

MOST_TABS = 10
"""Maximum number of destinations with a tab. For others, the page of the delivery shows the request."""

MOST_CURL = 8 * 1024
"""Maximum number of characters of a curl command on a page."""

OPEN_LEVELS = 2
"""Levels of a large tree that are open at first."""

OPEN_VALUES = 40
"""A tree with at most this number of values is fully open at first."""

_PLACE = ("view", "at", "skip", "find")  # parameters of a page that choose a part of a body
_BRACKETS = {"{": "{}", "[": "[]"}
_BEGINNING = re.compile(rf'"(?:[^"\\]|\\(?:u[0-9a-fA-F]{{4}}|.)){{0,{LONGEST}}}')
_MOST_DIGITS = 9


async def event_body(visit: Visit, event: Mapping[str, Any]) -> Content:
    """Return the body of an event, or the request of the delivery that the page's query names."""
    chosen = next((each for each in event["owed"] if each["id"] == visit.query.get("as")), None)
    tabs = [_tab(visit, None, "As received", is_current=chosen is None)]
    latest = [each for each in reversed(event["owed"]) if not each["replayed_by"]][:MOST_TABS]
    tabs += [
        _tab(visit, each["id"], f"As {each['destination']} gets it", is_current=each is chosen)
        for each in (latest if chosen is None or chosen in latest else [*latest, chosen])
    ]
    return [
        tag("nav", tag("ul", tabs), class_="tabs", aria_label="Versions of the body"),
        await received(visit, event) if chosen is None else await sent(visit, chosen),
    ]


def _tab(visit: Visit, id_: str | None, text: str, *, is_current: bool) -> Content:
    kept = {name: visit.query[name] for name in ("view",) if name in visit.query}
    link = f"?{urlencode({**({} if id_ is None else {'as': id_}), **kept})}#body"
    return tag("li", tag("a", text, href=link, aria_current="true" if is_current else None))


async def received(visit: Visit, event: Mapping[str, Any]) -> Content:
    """Return the body of an event as its sender sent it."""
    whole = command("events", "body", event["id"])
    note = tag("p", "Print all bytes: ", whole, class_="note")
    text = event["payload"]
    if not text:
        return tag("p", "The body is empty.", class_="empty")
    if not event["payload_truncated"]:
        return [await body_of(visit, text, "Body"), note]
    first = f"The first {size(len(text.encode()))} of {size(event['size'])}."
    return [as_text(visit, text, "Body"), tag("p", first, class_="note"), note]


async def sent(visit: Visit, delivery: Mapping[str, Any]) -> Content:
    """Return the request of a delivery as an attempt would send it, and the receiver's responses."""
    whole = await visit.ask("showDelivery", {"id": delivery["id"]})
    return [await request_of(visit, delivery), *answers(visit, whole["tries"])]


async def request_of(visit: Visit, delivery: Mapping[str, Any]) -> Content:
    """Return the request of a delivery: its headers, its body, and a curl command."""
    id_ = delivery["id"]
    try:
        made = await visit.ask("showRequest", {"id": id_})
    except RelayError as error:
        return tag("p", error.message, class_="empty")
    head = "\n".join((f"{made['method']} {made['url']}", *(f"{k}: {v}" for k, v in made["headers"].items())))
    body = made["body"]
    return [
        tag(
            "p",
            "The request that an attempt would send now; secrets and signatures are masked.",
            class_="note",
        ),
        tag("h3", "Headers sent"),
        tag("pre", "\n", head, tabindex=0, aria_label="Headers sent"),
        tag("h3", "Body sent"),
        await body_of(visit, body, "Body sent")
        if body is not None
        else as_text(visit, f"(not text; Base64)\n{made['body_base64']}", "Body sent"),
        _curl(id_, made),
    ]


def _curl(id_: str, made: Mapping[str, Any]) -> Content:
    """Return a curl command to copy; if it is long, the `relay` command that prints it."""
    line = command("deliveries", "request", id_, "--curl")
    text = curl_of(made)
    if len(text) > MOST_CURL:
        return tag("p", line)
    pre = tag("pre", "\n", text, tabindex=0, aria_label="curl command", id="curl")
    return [
        tag("details", tag("summary", "curl command"), pre, tag("p", line)),
        tag("p", copy("curl command", source="curl"), class_="actions"),
    ]


def answers(visit: Visit, attempts: Sequence[Mapping[str, Any]]) -> Iterator[Content]:
    """Yield the three latest distinct response bodies as text; `attempts` begin with the latest."""
    latest: dict[str, Mapping[str, Any]] = {}
    for each in attempts:
        if each["answer"].strip():
            latest.setdefault(each["answer"], each)
    for text, each in list(latest.items())[:3]:
        cut = ", cut off" if each["truncated"] else ""
        summary = tag("summary", f"Response {each['status']}{cut}, ", when(visit, each["started_at"]))
        pre = tag("pre", "\n", text, tabindex=0, aria_label="Response")
        yield tag("details", summary, pre, open=each is attempts[0] and each["result"] != "ok")


async def body_of(visit: Visit, text: str, label: str) -> Content:
    """Return a whole text: JSON as a tree with a search, or as text if the page's query asks for it."""
    query = visit.query
    if query.get("view") == "text":
        return [_switch(visit, "tree"), as_text(visit, text, label)]
    find = query.get("find", "")
    try:
        found = await outline(
            text, visit.turns, at=_number(query.get("at"), -1), skip=_number(query.get("skip"), 0), find=find
        )
    except NotReadableError as error:
        note = (
            tag("p", f"Shown as text: {error}.", class_="note") if text.lstrip()[:1] in ("{", "[") else None
        )
        return [note, as_text(visit, text, label)]
    if found.root.place < 0:
        return as_text(visit, text, label)
    many = _count(found.root)
    tree = tag(
        "ul", _item(visit, found.root, None, OPEN_LEVELS if many > OPEN_VALUES else many), class_="tree"
    )
    part = None
    if found.path:
        part = tag("p", "Part ", tag("code", found.path), ". ", tag("a", "Whole body", href=_link(visit)))
    return [
        tag("div", _search(visit, find), _switch(visit, "text"), class_="find"),
        _results(visit, found, find) if find else None,
        part,
        tag("div", tree, role="region", tabindex=0, aria_label=label, class_="json"),
    ]


def as_text(visit: Visit, text: str, label: str) -> Content:
    """Return a part of a text, from the position that the page's query names."""
    at = min(_number(visit.query.get("skip"), 0), max(0, len(text) - 1)) if "view" in visit.query else 0
    pre = tag("pre", "\n", text[at : at + MOST_TEXT], tabindex=0, aria_label=label)
    if len(text) <= MOST_TEXT:
        return pre
    end = min(at + MOST_TEXT, len(text))
    links = [
        tag("a", "Start", href=_link(visit, view="text")) if at else None,
        tag("a", "Next part", href=_link(visit, view="text", skip=str(end))) if end < len(text) else None,
    ]
    note = tag("p", f"Characters {at + 1:,} to {end:,} of {len(text):,}.", class_="note")
    return [pre, note, tag("nav", links, class_="pages", aria_label="Parts of the text")]


def _link(visit: Visit, **changes: str | None) -> str:
    """Return the address of another part of the same body."""
    kept = {name: value for name, value in visit.query.items() if name not in _PLACE}
    query = kept | {name: value for name, value in changes.items() if value is not None}
    return f"?{urlencode(query, errors='replace')}#body"


def _switch(visit: Visit, view: str) -> Content:
    """Return the link to the other view of JSON."""
    words = {"text": "Show the exact text", "tree": "Show as a tree"}
    return tag("p", tag("a", words[view], href=_link(visit, view="text" if view == "text" else None)))


def _search(visit: Visit, find: str) -> Content:
    """Return the search form; the script turns its fields into an address."""
    words = "Find in the body"
    field = tag("input", type="search", name="find", value=find, aria_label=words, placeholder=words)
    chosen = visit.query.get("as")
    hidden = tag("input", type="hidden", name="as", value=chosen) if chosen else None
    return tag("form", field, hidden, tag("button", "Find"), data_filter="#body", class_="scripted")


def _results(visit: Visit, found: Outline, find: str) -> Content:
    """Return the matches of a search, each with a link to the object or array around it."""
    rows = [
        tag("li", tag("a", each.path, href=_link(visit, at=str(each.place), find=find)), " ",
            _marked(_short(each.text), find))
        for each in found.found
    ]  # fmt: skip
    what = f'{found.matches:,} {"match" if found.matches == 1 else "matches"} for "{find}"'
    more = f"; the first {len(rows)}" if found.matches > len(rows) else ""
    clear = tag("a", "Clear", href=_link(visit, at=visit.query.get("at")))
    return [
        tag("p", f"{what}{more}. ", clear, role="status"),
        tag("ol", rows, class_="found") if rows else None,
    ]


def _marked(text: str, find: str) -> Content:
    at = text.lower().find(find.lower())
    if at < 0 or len(text.lower()) != len(text):
        return text
    end = at + len(find)
    return [text[:at], tag("mark", text[at:end]), text[end:]]


def _item(visit: Visit, value: Value, index: int | None, opened: int) -> Content:
    """Return the line of a value, and below it the lines of its children; `opened` levels are open."""
    name = None
    if value.key is not None:
        name = [tag("b", _cut(plain(value.key))), ": "]
    elif index is not None:
        name = [tag("i", index), ": "]
    if value.place < 0:
        return tag("li", name, _short(value.text))
    if not value.count:
        return tag("li", name, _BRACKETS[value.text])
    noun = ("key" if value.text == "{" else "item") + ("" if value.count == 1 else "s")
    label = f"{value.count:,} {noun}".join(_BRACKETS[value.text])
    if not value.children:
        return tag("li", name, tag("a", label, href=_link(visit, at=str(value.place))))
    is_array = value.text == "["
    lines = [
        _item(visit, each, value.first + number if is_array else None, opened - 1)
        for number, each in enumerate(value.children)
    ]
    shown_ = value.first + len(value.children)
    if shown_ < value.count:
        link = _link(visit, at=str(value.place), skip=str(shown_))
        lines.append(tag("li", tag("a", f"{value.count - shown_:,} more", href=link)))
    return tag(
        "li", tag("details", tag("summary", name, tag("small", label)), tag("ul", lines), open=opened > 0)
    )


def _count(value: Value) -> int:
    """Return the number of values that are shown."""
    return 1 + sum(map(_count, value.children))


def _short(written: str) -> str:
    """Return a value for the tree: decode the escapes of strings, keep the digits of numbers."""
    if written in _BRACKETS:
        return _BRACKETS[written]
    if not written.startswith('"'):
        return _cut(written)
    beginning = _BEGINNING.match(written)
    if beginning is None or beginning.end() >= len(written) - 1:
        return json.dumps(plain(written), ensure_ascii=False)
    text = json.dumps(plain(beginning[0] + '"'), ensure_ascii=False)
    return f"{text}… ({len(written) - 2:,} characters)"


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}… ({len(text):,} characters)"


def _number(text: str | None, otherwise: int) -> int:
    """Return a number from the page's query; `otherwise` if the text is not a number."""
    if text is None or not (text.isascii() and text.isdigit() and len(text) <= _MOST_DIGITS):
        return otherwise
    return int(text)
