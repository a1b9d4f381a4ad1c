"""Templates of a generic source, compiled into functions of a request."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import msgspec

from relay.source import Invalid, Placeholder, Template, parse_template, read_json, text_of

from .reading import Reader, Reading, Value

Get = Callable[[Reading], Value]
Render = Callable[[Reading], str]
_CLOSING = {"(": ")", "[": "]", "{": "}", "<": ">"}
_OPENING, _CLOSINGS = "".join(_CLOSING), "".join(_CLOSING.values())
_encode = msgspec.json.Encoder().encode
_NULL = msgspec.Raw(b"null")


def place_of(placeholder: Placeholder) -> str:
    """Return how an error for the sender names a placeholder: `header X-Topic`, `order.id`."""
    kind, name = placeholder.kind, placeholder.argument
    if kind in ("body", "item"):
        return name or kind
    return f"{kind} {name}".rstrip()


def value_of(reader: Reader, placeholder: Placeholder) -> Get:
    """Return the function that finds a placeholder's value and applies its filters.

    The function raises Invalid if a filter does not accept the value.
    """
    get = reader.getter(placeholder)
    if not placeholder.filters:
        return get
    place = place_of(placeholder)

    def filtered(reading: Reading) -> Value:
        try:
            value = placeholder.filtered(_plain(get(reading)))
        except ValueError as error:
            raise Invalid(field=place, issue=str(error)) from None
        return value if value is None or isinstance(value, str | msgspec.Raw) else msgspec.Raw(_encode(value))

    return filtered


def text_getter(reader: Reader, placeholder: Placeholder) -> Callable[[Reading], str]:
    """Return the function that finds a placeholder's value as text, `""` if it is missing, null or empty.

    The function raises Invalid if the value is a list or an object.
    """
    get, place = value_of(reader, placeholder), place_of(placeholder)

    def render(reading: Reading) -> str:
        value = get(reading)
        if value is None:
            return ""
        return value if type(value) is str else text(value, place)

    return render


def text(value: Value, place: str) -> str:
    """Return a value as text, `""` for a missing one.

    Raises:
        Invalid: it is a list or an object; names `place`.
    """
    if type(value) is str:
        return value
    if value is None:
        return ""
    raw = bytes(value)  # type: ignore[arg-type]  # mypy keeps `str` here, which the first line excludes
    if raw[:1] == b'"' and b"\\" not in raw:
        return raw[1:-1].decode()
    try:
        return text_of(value)
    except ValueError as error:
        raise Invalid(field=place, issue=str(error)) from None


def _plain(value: Value) -> Any:
    """Return a value for filters: strings, booleans and null parsed, numbers and trees as sent."""
    if isinstance(value, msgspec.Raw) and bytes(value)[:1] in b'"ntf':
        return read_json(bytes(value))
    return value


def compile_text(reader: Reader, template: Template, *, complete: bool = False) -> Render:
    """Return the function that renders a template as text, `""` if all of its parts are missing.

    A missing part also removes its adjoining separator; with `complete`, it makes the whole text `""`.
    """
    parts = [part if isinstance(part, str) else text_getter(reader, part) for part in template.parts]
    if not template.placeholders:
        literal = "".join(map(str, template.parts))
        return lambda _: literal
    if len(parts) == 1 and not isinstance(parts[0], str):
        return parts[0]

    def render(reading: Reading) -> str:
        texts = [part if isinstance(part, str) else part(reading) for part in parts]
        if all(texts):
            return "".join(texts)
        if complete:
            return ""
        return without_missing(texts, [isinstance(part, str) for part in parts])

    return render


def without_missing(texts: list[str], literal: list[bool]) -> str:
    """Join the parts of a text; an empty part also removes its separator.

    A separator is the text in a literal between letters, digits and brackets. The separator before the empty
    part is removed; if no text is left before it, the separator after it is removed. Values stay whole.

    >>> without_missing(["push", ".", ""], [False, True, False])
    'push'
    >>> without_missing(["", ".", "opened"], [False, True, False])
    'opened'
    """
    kept: list[str] = []
    after_literal, takes_next, closing = False, False, ""
    for part, is_literal in zip(texts, literal, strict=True):
        if is_literal:
            text = part[1:] if closing and part.startswith(closing) else part
            if takes_next:
                text = text[_separator(text, _OPENING) :]
            kept.append(text)
            takes_next = takes_next and not text
        elif part:
            kept.append(part)
            takes_next = False
        else:
            if after_literal:
                last = kept[-1]
                closing = _CLOSING.get(last[-1:], "")
                kept[-1] = last[: len(last) - _separator(reversed(last), _CLOSINGS)]
            takes_next = not any(kept)
        if is_literal or part:
            closing = ""
        after_literal = is_literal or (after_literal and not part)
    return "".join(kept)


def _separator(characters: Iterable[str], stop: str) -> int:
    """Return the number of characters before the first letter, digit or character of `stop`."""
    number = 0
    for character in characters:
        if character.isalnum() or character in stop:
            break
        number += 1
    return number


def compile_value(reader: Reader, template: Template) -> Get:
    """Return the function that finds a JSON value, None if missing.

    A lone placeholder yields its value as sent; other templates yield text.
    """
    if (lone := template.lone) is not None:
        return value_of(reader, lone)
    render = compile_text(reader, template)
    return lambda reading: render(reading) or None


def compile_json(
    reader: Reader, value: Any, filters: Mapping[str, Callable[[Any], Any]]
) -> Callable[[Reading], Any]:
    """Return the function that fills the templates in a JSON value; a missing lone placeholder is null."""
    if isinstance(value, str):
        template = parse_template(value, filters)
        if template.lone is None:
            return compile_text(reader, template)
        get = value_of(reader, template.lone)
        return lambda reading: _NULL if (found := get(reading)) is None else found
    if isinstance(value, Mapping):
        inner = {key: compile_json(reader, item, filters) for key, item in value.items()}
        return lambda reading: {key: fill(reading) for key, fill in inner.items()}
    if isinstance(value, list | tuple):
        items = [compile_json(reader, item, filters) for item in value]
        return lambda reading: [fill(reading) for fill in items]
    return lambda _: value


def templates_in(value: Any) -> Iterator[str]:
    """Yield every text in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from templates_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from templates_in(item)
