"""Templates over the envelope of an event: texts of messages, and request bodies written in config.toml.

Placeholders are paths into the envelope, as in `where`: `{type}`, `{data.order.id}`. A missing value is empty
in text and null in JSON. A filter that does not fit a value leaves it unchanged, because an odd event must be
delivered, too.
"""

import html
import json
import re
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import quote_plus

import msgspec

from relay.base.clock import rfc3339
from relay.base.json_text import decode, encode
from relay.base.template import Placeholder, Template, parse, text_of
from relay.config.problems import SettingError, kind_of
from relay.model import StoredEvent
from relay.routing.envelope import Path

MOST_BYTES = 16 * 2**20
"""The largest request body that a template may make. It may contain a placeholder many times."""

Value = str | msgspec.Raw | None
"""A JSON value: a string as text, null and a missing value as None, any other as the sender wrote it."""

_object = msgspec.json.Decoder(dict[str, msgspec.Raw])
_array = msgspec.json.Decoder(list[msgspec.Raw])
_string = msgspec.json.Decoder(str)
_CONTENT_TYPE = re.compile(r"[!-~]+/[!-~]+( *;[ -~]*)?")
_COLUMN = re.compile(r"column (\d+): ")
_NULL = msgspec.Raw(b"null")


_TEXTS: Mapping[str, Callable[[StoredEvent], str | None]] = {
    "id": lambda event: event.public_id,
    "type": lambda event: event.type,
    "timestamp": lambda event: rfc3339(event.received_at),
    "source": lambda event: event.source,
    "subject": lambda event: event.subject,
}


class EventValues:
    """The values of one event. Each object on the way to a value is read at most once."""

    __slots__ = ("_objects", "_room", "event")

    def __init__(self, event: StoredEvent, *, room: int | None = None) -> None:
        self.event = event
        self._room = room  # bytes of the values that may still be found; None: any number
        self._objects: dict[tuple[str, ...], Mapping[str, msgspec.Raw] | list[msgspec.Raw]] = {}

    def find(self, path: Path) -> Value:
        """Return the value at a path.

        Raises:
            ValueError: there is no room for the value.
        """
        value = self._find(path)
        if value is not None and self._room is not None:
            self._room -= len(value) if isinstance(value, str) else len(bytes(value))
            if self._room < 0:
                raise ValueError(f"the values of the template have more than {MOST_BYTES} bytes")
        return value

    def _find(self, path: Path) -> Value:
        if path.head in _TEXTS:
            return _TEXTS[path.head](self.event)
        raw = (self.event.data if path.head == "data" else self.event.context).strip()
        way: tuple[str, ...] = (path.head,)
        try:
            for key, index in path.steps:
                inner = self._object(way, raw)
                raw = bytes(inner[index if isinstance(inner, list) else key])  # type: ignore[index]  # an index of a list, a key of an object
                way = (*way, key)
            return value_of(raw)
        except (LookupError, TypeError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return None  # the path does not exist, or the data is not JSON

    def scalars(self) -> list[tuple[str, str]]:
        """Return the top-level values of the data that are strings, numbers or booleans, as text."""
        try:
            items = self._object(("data",), self.event.data.strip())
            if isinstance(items, list):
                return []
            found = [(key, value_of(bytes(raw))) for key, raw in items.items()]
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return []
        return [(key, as_text(value)) for key, value in found if value is not None and not is_tree(value)]

    def _object(self, way: tuple[str, ...], raw: bytes) -> Mapping[str, msgspec.Raw] | list[msgspec.Raw]:
        if way not in self._objects:
            if raw[:1] == b"[":
                self._objects[way] = decode(_array, raw)
            else:
                self._objects[way] = decode(_object, raw) if raw[:1] == b"{" else {}
        return self._objects[way]


def value_of(raw: bytes) -> Value:
    """Return a JSON text as a value."""
    if raw[:1] == b'"':
        return decode(_string, raw)
    return None if raw == b"null" else msgspec.Raw(raw)


def is_tree(value: Value) -> bool:
    """Return whether a value is a list or an object."""
    return isinstance(value, msgspec.Raw) and bytes(value)[:1] in (b"{", b"[")


def as_text(value: Any) -> str:
    """Return a value as text; a list or an object as its JSON."""
    if isinstance(value, msgspec.Raw) and is_tree(value):
        return bytes(value).decode("utf-8", "replace")
    return text_of(value)


Render = Callable[[EventValues], str]


def compile_text(text: str, escape: Callable[[str], str] = str) -> Render:
    """Return a function that renders a template as text; `escape` is applied to each value.

    Raises:
        ValueError: names the place in the template, and the correction.
    """
    parts = [part if isinstance(part, str) else _getter(part) for part in parsed(text).parts]

    def render(values: EventValues) -> str:
        return "".join([part if isinstance(part, str) else escape(as_text(part(values))) for part in parts])

    return render


def parsed(text: str) -> Template:
    """Parse a template over the envelope.

    Raises:
        ValueError: as `compile_text`.
    """
    try:
        template = parse(text)
        for each in template.placeholders:
            path_of(each)
    except ValueError as error:
        raise ValueError(_with_line(text, str(error))) from None
    return template


def path_of(placeholder: Placeholder) -> Path:
    """Return the path that a placeholder names; `{data:order.id}` is the same as `{data.order.id}`.

    Raises:
        ValueError: the envelope does not have this path.
    """
    text = placeholder.kind + (f".{placeholder.argument}" if placeholder.argument else "")
    if text[0] in "\"'":
        raise ValueError(
            f"column {placeholder.column}: write {{{{ and }}}} for the braces of JSON, or a table"
        )
    try:
        return Path.parse(text)
    except ValueError as error:
        raise ValueError(f"column {placeholder.column}: {error}") from None


def _with_line(text: str, problem: str) -> str:
    """Return a problem whose column counts from the beginning of a line of the template."""
    found = _COLUMN.match(problem)
    if found is None or "\n" not in text:
        return problem
    before = text[: int(found[1]) - 1]
    place = f"line {before.count(chr(10)) + 1}, column {len(before) - before.rfind(chr(10))}"
    return f"{place} of the template: {problem[found.end() :]}"


def _getter(placeholder: Placeholder) -> Callable[[EventValues], Value]:
    """Return a function that finds a placeholder's value and applies its filters."""
    path = path_of(placeholder)
    if not placeholder.filters:
        return lambda values: values.find(path)

    def get(values: EventValues) -> Value:
        value: Any = values.find(path)
        for each in placeholder.filters:
            try:
                value = each.apply(value)
            except ValueError:  # such as a date filter on a value that is not a date
                continue
        if value is None or isinstance(value, str | msgspec.Raw):
            return value
        return msgspec.Raw(encode(value))

    return get


class Body(msgspec.Struct, frozen=True):
    """A compiled request body."""

    content_type: str
    render: Callable[[StoredEvent], bytes]


def compile_body(template: Any, content_type: str | None) -> Body:
    """Compile `template` and `content_type` of a destination.

    A table or a list is JSON; each text in it is a template, and a lone placeholder yields the value with
    its type. In text, values are escaped for the content type, so that they cannot end the string or element
    around them.

    Raises:
        SettingError: names the key and the correction.
    """
    if content_type is not None and not _CONTENT_TYPE.fullmatch(content_type):
        raise SettingError('expected a content type such as "application/json"', "content_type")
    if isinstance(template, dict | list):
        if content_type is not None and not _is_json(content_type):
            raise SettingError("a table is sent as JSON; write other bodies as text", "content_type")
        fill = _compile_json(template, ("template",))
        return Body(content_type or "application/json", _bounded(lambda values: encode(fill(values))))
    if not isinstance(template, str):
        raise SettingError(f"expected text, a table or a list, got {kind_of(template)}", "template")
    if content_type is None:
        is_json = template.lstrip()[:1] == "[" or template.lstrip()[:2] == "{{"
        content_type = "application/json" if is_json else "text/plain; charset=utf-8"
    try:
        if _is_json(content_type):
            render = _compile_json_text(template)
        else:
            render = compile_text(template, _escape_of(content_type))
    except ValueError as error:
        raise SettingError(str(error), "template") from None
    return Body(content_type, _bounded(lambda values: render(values).encode("utf-8", "replace")))


def _bounded(render: Callable[[EventValues], bytes]) -> Callable[[StoredEvent], bytes]:
    def bounded(event: StoredEvent) -> bytes:
        body = render(EventValues(event, room=MOST_BYTES))
        if len(body) > MOST_BYTES:
            raise ValueError(f"the template makes a body of {len(body)} bytes; the limit is {MOST_BYTES}")
        return body

    return bounded


def _bare(content_type: str) -> str:
    return content_type.partition(";")[0].strip().lower()


def _is_json(content_type: str) -> bool:
    bare = _bare(content_type)
    return bare.endswith(("/json", "+json"))


def _escape_of(content_type: str) -> Callable[[str], str]:
    """Return how a value is escaped in a text of this type."""
    bare = _bare(content_type)
    if bare == "application/x-www-form-urlencoded":
        return lambda text: quote_plus(text, errors="replace")
    if bare == "text/html" or bare.endswith(("/xml", "+xml")):
        return _escape_markup
    return str


def _escape_markup(text: str) -> str:
    """Escape for XML and HTML; control characters, which XML cannot have, become spaces."""
    return html.escape("".join(each if each >= " " or each in "\t\r\n" else " " for each in text))


def _compile_json(value: Any, key: tuple[str | int, ...]) -> Callable[[EventValues], Any]:
    """Return a function that fills the templates in a value of config.toml."""
    if isinstance(value, str):
        try:
            template = parsed(value)
        except ValueError as error:
            raise SettingError(str(error), *key) from None
        if template.lone is None:
            return compile_text(value)
        get, is_json = _getter(template.lone), _ends_with_json(template.lone)
        return lambda values: _json_value(get(values), is_json=is_json)
    if isinstance(value, dict):
        table = {name: _compile_json(inner, (*key, name)) for name, inner in value.items()}
        return lambda values: {name: fill(values) for name, fill in table.items()}
    if isinstance(value, list):
        items = [_compile_json(inner, (*key, index)) for index, inner in enumerate(value)]
        return lambda values: [fill(values) for fill in items]
    return lambda _: value


def _ends_with_json(placeholder: Placeholder) -> bool:
    return bool(placeholder.filters) and placeholder.filters[-1].name == "json"


def _json_value(value: Value, *, is_json: bool) -> Any:
    """Return a value for a JSON encoder; `is_json`: its text is JSON already."""
    if value is None:
        return _NULL
    return msgspec.Raw(value.encode()) if is_json and isinstance(value, str) else value


def _compile_json_text(text: str) -> Render:
    """Return a function that renders a JSON text.

    Inside a string of the JSON, a placeholder is escaped text; elsewhere it is a JSON value.

    Raises:
        ValueError: the text is not a template, or not JSON.
    """
    parts: list[Render] = []
    sample, in_string = "", False
    for part in parsed(text).parts:
        if isinstance(part, str):
            in_string = _ends_in_string(part, in_string)
            sample += part
            parts.append(_literal(part))
        elif in_string:
            sample += "x"
            parts.append(_inside_string(_getter(part)))
        else:
            sample += "null"
            parts.append(_as_json(_getter(part), is_json=_ends_with_json(part)))
    try:
        json.loads(sample)
    except json.JSONDecodeError as error:
        why = f"{error.msg[:1].lower()}{error.msg[1:]}"
        raise ValueError(
            f"line {error.lineno} of the template is not JSON: {why}; braces of the JSON are {{{{ and }}}}"
        ) from None
    return lambda values: "".join([part(values) for part in parts])


def _literal(text: str) -> Render:
    return lambda _: text


def _inside_string(get: Callable[[EventValues], Value]) -> Render:
    return lambda values: encode(as_text(get(values))).decode()[1:-1]


def _as_json(get: Callable[[EventValues], Value], *, is_json: bool) -> Render:
    return lambda values: encode(_json_value(get(values), is_json=is_json)).decode()


def _ends_in_string(literal: str, in_string: bool) -> bool:  # noqa: FBT001 - a state, not an option
    """Return whether a JSON text is inside a string after a literal; no escape spans two literals."""
    escaped = False
    for character in literal:
        if escaped:
            escaped = False
        elif character == "\\":
            escaped = in_string
        elif character == '"':
            in_string = not in_string
    if escaped:
        raise ValueError("a placeholder follows a backslash; write \\\\ for a backslash")
    return in_string
