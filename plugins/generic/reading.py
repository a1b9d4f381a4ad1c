"""A request, read for templates: each part at most once, and only if a template needs it."""

import base64
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Literal

import msgspec

from relay.source import (
    Incoming,
    Invalid,
    Malformed,
    Placeholder,
    as_json,
    decode_json,
    parse_path,
)

BodyForm = Literal["auto", "json", "form", "text", "raw"]
Steps = tuple[tuple[str, int | None], ...]
Value = str | msgspec.Raw | None
"""A text; a JSON value as sent; or None for a missing one."""

WITHOUT_BODY = ("GET", "HEAD", "DELETE")
"""Methods whose requests need no body."""

_FORM = "application/x-www-form-urlencoded"
_MULTIPART = "multipart/form-data"
_NONE = msgspec.Raw(b"")  # marks an absent key
_PLAIN_KEY = frozenset('"\\')
_encode = msgspec.json.Encoder().encode
MOST_ITEMS = 5000
"""Items of a list that are read: a body of a megabyte may have half a million, which takes a second."""


class Tree:
    """Places in a JSON value. All of them are read together, level by level; everything else is skipped."""

    def __init__(self) -> None:
        self._root = _Node()
        self.size = 0

    def place(self, path: str) -> int:
        """Add a path, `""` for the whole value; return its position in the result of `read`."""
        node = self._root
        for key, index in parse_path(path) if path else ():
            node = node.child(key, index)
        if node.slot < 0:
            node.slot = self.size
            self.size += 1
        return node.slot

    @property
    def top(self) -> Any:
        """The type that the whole value is decoded into if it is an object."""
        return self._root.type

    def read(self, raw: msgspec.Raw, top: Any = None) -> list[msgspec.Raw | None]:
        """Return the values at all places, None for absent values; numbers as written.

        Args:
            raw: the JSON value.
            top: the same, decoded into `top`, if that is known.
        """
        found: list[msgspec.Raw | None] = [None] * self.size
        root = self._root
        if top is None:
            root.read(raw, found)
        else:
            root.read_object(top, found)
            if root.slot >= 0:
                found[root.slot] = raw
        return found


class _Node:
    """One value in a tree, and the places below it."""

    __slots__ = ("_children", "_decoder", "_fields", "_positions", "slot", "type")

    def __init__(self) -> None:
        self.slot = -1
        self._children: dict[str, _Node] = {}
        self._fields: list[tuple[str, _Node]] = []  # by the name in `type`
        self._positions: dict[int, _Node] = {}
        self.type: Any = msgspec.Raw
        self._decoder: msgspec.json.Decoder[Any] | None = None

    def child(self, key: str, index: int | None) -> "_Node":
        node = self._children.get(key)
        if node is None:
            node = self._children[key] = _Node()
            keys = tuple(self._children)
            plain = all(each.isprintable() and not _PLAIN_KEY & set(each) for each in keys)
            self.type = _record(keys) if plain else dict[str, msgspec.Raw]
            self._decoder = msgspec.json.Decoder(self.type)
            self._fields.append((f"f{len(self._fields)}", node))
        if index is not None and index < MOST_ITEMS:  # a larger number is only a key of an object
            self._positions[index] = node
        return node

    def read(self, raw: msgspec.Raw, found: list[msgspec.Raw | None]) -> None:
        """Put the values at and below this place into `found`."""
        if self.slot >= 0:
            found[self.slot] = raw
        if self._decoder is None:
            return
        text = bytes(raw)
        if text[:1] == b"{":
            self.read_object(decode_json(self._decoder, text), found)
        elif text[:1] == b"[" and self._positions:
            items = first_items(text, max(self._positions) + 1)
            for index, node in self._positions.items():
                if index < len(items):
                    node.read(items[index], found)

    def read_object(self, value: Any, found: list[msgspec.Raw | None]) -> None:
        """Put the values below this place into `found`; `value` is an object, decoded into `type`."""
        if type(value) is dict:
            for key, node in self._children.items():
                if key in value:
                    node.read(value[key], found)
            return
        for name, node in self._fields:
            inner = getattr(value, name)
            # Reading a lone surrogate copies the default, so it is not always the same object.
            if inner is not _NONE and memoryview(inner).nbytes:
                if node._decoder is None:  # noqa: SLF001 - a leaf of the same class
                    found[node.slot] = inner
                else:
                    node.read(inner, found)


@lru_cache(maxsize=1024)  # so that a reload with the same paths makes no new types
def _record(keys: tuple[str, ...]) -> type[msgspec.Struct]:
    """Return a type with these keys; everything else in an object is skipped."""
    names = [f"f{at}" for at in range(len(keys))]
    fields = [(name, msgspec.Raw, _NONE) for name in names]
    return msgspec.defstruct("Places", fields, rename=dict(zip(names, keys, strict=True)), gc=False)


def first_items(text: bytes, most: int, *, all_of_them: bool = False) -> list[msgspec.Raw]:
    """Return the first items of a JSON list, as sent.

    Raises:
        msgspec.ValidationError: with `all_of_them`, the list has more than `most` items.
    """
    items = msgspec.structs.astuple(decode_json(_items(most, all_of_them), text))
    return [item for item in items if item is not _NONE and memoryview(item).nbytes]


@lru_cache(maxsize=256)
def _items(most: int, all_of_them: bool) -> "msgspec.json.Decoder[msgspec.Struct]":  # noqa: FBT001 - a cache key
    """Return a decoder of lists that stops after `most` items."""
    fields = [(f"f{at}", msgspec.Raw, _NONE) for at in range(most)]
    type_ = msgspec.defstruct("Items", fields, array_like=True, forbid_unknown_fields=all_of_them, gc=False)
    return msgspec.json.Decoder(type_)


class Reader:
    """How a source reads its requests: the form of its bodies, and the places that its templates use."""

    def __init__(
        self, *, body: BodyForm, form_field: str, public_url: str, first_of_list: Sequence[str]
    ) -> None:
        self.body = body
        self.form_field = form_field
        self.public_url = public_url
        self.firsts = frozenset(
            (kind, name.lower() if kind == "header" else name)
            for kind, _, name in (each.partition(":") for each in first_of_list)
        )
        self.tree = Tree()
        self.item_tree = Tree()
        self.sent_time: Callable[[Incoming], str | None] = lambda _: None

    def getter(self, placeholder: Placeholder) -> "Callable[[Reading], Value]":
        """Return the function that finds a placeholder's value in a request."""
        kind, name = placeholder.kind, placeholder.argument
        if kind in ("body", "item"):
            tree = self.tree if kind == "body" else self.item_tree
            slot = tree.place(name)
            if kind == "item":
                return lambda reading: reading.item[slot]
            return lambda reading: (reading.found or reading.read())[slot]
        if kind in _NAMED:
            first = (kind, name.lower() if kind == "header" else name) in self.firsts
            return _NAMED[kind](name, first=first)
        return _PLAIN[kind]


class Reading:
    """One request while it is read."""

    __slots__ = ("_form", "_query", "_raw", "event_id", "found", "incoming", "item", "item_raw", "reader")

    def __init__(self, reader: Reader, incoming: Incoming) -> None:
        self.reader = reader
        self.incoming = incoming
        self.item: list[msgspec.Raw | None] = []
        self.item_raw: msgspec.Raw | None = None
        self.event_id = ""
        self.found: list[msgspec.Raw | None] | None = None  # in the body, once it has been read
        self._raw: msgspec.Raw | None = None
        self._form: dict[str, list[str]] | None = None
        self._query: dict[str, list[str]] | None = None

    @property
    def raw(self) -> msgspec.Raw | None:
        """The whole body as a JSON value, None without a body; raises as `read`."""
        if self.found is None:
            self.read()
        return self._raw

    @property
    def query(self) -> dict[str, list[str]]:
        """The values of each query parameter, decoded."""
        if self._query is None:
            self._query = _grouped(self.incoming.query_fields())
        return self._query

    @property
    def form(self) -> dict[str, list[str]]:
        """The values of each field of a form, decoded; empty if the body is not a form."""
        if self._form is None:
            is_form = self.has_form
            self._form = _grouped(self.incoming.form_fields()) if is_form else {}
        return self._form

    @property
    def content_type(self) -> str:
        """The media type of the body, without parameters."""
        return self.incoming.header("Content-Type").partition(";")[0].strip().lower()

    @property
    def has_form(self) -> bool:
        """Whether the body is read as a form."""
        form = self.reader.body
        if form != "auto":
            return form == "form"
        usual = self.incoming.headers.get("Content-Type") == "application/json"
        return not usual and self.content_type in (_FORM, _MULTIPART)

    @property
    def is_urlencoded(self) -> bool:
        """Whether the body is a form whose fields are its text."""
        return self.content_type == _FORM

    @property
    def whole(self) -> Any:
        """The data of an event without a template: the item, the body, or else the query."""
        if self.item_raw is not None:
            return self.item_raw
        if self.raw is not None:
            return self.raw
        return _single(self.query)

    @property
    def url(self) -> str:
        """The URL as the sender has it."""
        incoming = self.incoming
        sample = f"{incoming.path}?{incoming.query}" if incoming.query else incoming.path
        return self.reader.public_url + (incoming.target or sample)

    def start_item(self, raw: msgspec.Raw) -> None:
        """Make `{item:…}` refer to one item of a batch."""
        self.item_raw = raw
        self.item = self.reader.item_tree.read(raw)

    def read(self) -> list[msgspec.Raw | None]:
        """Read the body, and return the values that templates use.

        Raises:
            Malformed, Invalid: the body does not have the form that the source expects.
        """
        incoming, tree, form = self.incoming, self.reader.tree, self.reader.body
        body = incoming.body
        top: Any = None
        if not body and incoming.method in WITHOUT_BODY:
            self.found = [None] * tree.size
            return self.found
        if self.has_form:
            self._raw = self._form_value()
        elif form == "text":
            self._raw = msgspec.Raw(_encode(_text(body)))
        elif form == "raw":
            content_type = incoming.header("Content-Type") or "application/octet-stream"
            content = base64.b64encode(body).decode()
            self._raw = msgspec.Raw(_encode({"content_type": content_type, "base64": content}))
        else:
            text = body if body[:1] == b"{" else body.strip()
            value = incoming.decode(tree.top if text[:1] == b"{" else msgspec.Raw)
            self._raw = msgspec.Raw(text)
            top = None if isinstance(value, msgspec.Raw) else value
        self.found = tree.read(self._raw, top)
        return self.found

    def _form_value(self) -> msgspec.Raw:
        """Return the JSON in the source's `form_field`, else the map of all fields."""
        field = self.reader.form_field
        fields = self.form
        if field and field in fields:
            if len(fields[field]) > 1:
                raise Invalid(field=field, issue="has several values")
            return as_json(fields[field][0], field)
        return msgspec.Raw(_encode(_single(fields)))


def _text(body: bytes) -> str:
    try:
        return body.decode()
    except UnicodeDecodeError:
        raise Malformed("The body is not text in UTF-8") from None


def _grouped(fields: Sequence[tuple[str, str]]) -> dict[str, list[str]]:
    grouped: dict[str, list[str]] = {}
    for name, value in fields:
        grouped.setdefault(name, []).append(value)
    return grouped


def _single(fields: dict[str, list[str]]) -> dict[str, Any]:
    """Return each field's value, a list where it has several."""
    return {name: values[0] if len(values) == 1 else values for name, values in fields.items()}


def _header(name: str, *, first: bool) -> Callable[[Reading], Value]:
    def get(reading: Reading) -> Value:
        headers = reading.incoming.headers
        if not first and len(headers.getall(name, ())) > 1:
            raise Invalid(field=f"header {name}", issue="was sent more than once")
        return reading.incoming.header(name) or None

    return get


def _query(name: str, *, first: bool) -> Callable[[Reading], Value]:
    return lambda reading: _value(reading.query, f"query {name}", name, first=first)


def _form(name: str, *, first: bool) -> Callable[[Reading], Value]:
    return lambda reading: _value(reading.form, f"form {name}", name, first=first)


def _segment(name: str, *, first: bool) -> Callable[[Reading], Value]:
    _ = first
    return lambda reading: _clean(reading.incoming.params.get(name), f"path {name}")


def _value(fields: dict[str, list[str]], place: str, name: str, *, first: bool) -> str | None:
    values = fields.get(name)
    if values is None:
        return None
    if len(values) > 1 and not first:
        raise Invalid(field=place, issue="has several values")
    return _clean(values[0], place)


def _clean(value: str | None, place: str) -> str | None:
    """Return a value that can be stored; a URL may contain bytes that are not UTF-8."""
    if value is not None and not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise Invalid(field=place, issue="expected UTF-8") from None
    return value


_NAMED = {"header": _header, "query": _query, "form": _form, "path": _segment}
"""Placeholders with a name."""

_PLAIN: dict[str, Callable[[Reading], Value]] = {
    "method": lambda reading: reading.incoming.method,
    "url": lambda reading: _clean(reading.url, "url"),
    "timestamp": lambda reading: reading.reader.sent_time(reading.incoming),
    "event_id": lambda reading: reading.event_id,
}
"""Placeholders without an argument."""
