"""Templates: text with placeholders, such as `"{header:X-Event}.{body:action}"`.

A placeholder is `{kind}` or `{kind:argument}`, and then any number of filters: `{body:name|default:nobody}`.
`{{` and `}}` are braces. Quotation marks protect `:`, `|` and `}`: `{body:'a|b'.c}`, `{body|default:"a}b"}`.
This module parses a template and applies its filters. The callers know the placeholders and find their
values. No part of a template is evaluated as code.
"""

import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from difflib import get_close_matches
from typing import Any, Literal

import msgspec

from relay.base.json_text import encode, read

MOST_CHARACTERS = 64 * 1024
"""The longest template."""

_NAME = re.compile(r"""[^:|{}"']*""")
_KIND = re.compile(r"""(?:"[^"]*"|'[^']*'|[^:|{}"'])*""")
_ARGUMENT = re.compile(r"""(?:"[^"]*"|'[^']*'|[^|{}"'])*""")
_FILTER_ARGUMENT = re.compile(r""""[^"]*"|'[^']*'|[^|{}"'][^|{}]*|(?=[|}])""")
_DIRECTIVE = re.compile(r"%(.?)", re.DOTALL)
_DIRECTIVES = frozenset("YmdHMSfjaAbBeyZ%")  # these mean the same on every system
_MILLISECONDS = 10**11  # a larger number does not count seconds: the year is beyond 5138
NO_FILTERS: Mapping[str, Callable[[Any], Any]] = {}
_SHOWN = 40  # characters of a template in an error

Takes = Literal["nothing", "argument", "either"]
"""Whether a placeholder must have an argument."""


class Filter(msgspec.Struct, frozen=True):
    """One filter of a placeholder. `apply` takes a JSON value and may raise ValueError."""

    name: str
    argument: str  # "": none
    apply: Callable[[Any], Any]


class Placeholder(msgspec.Struct, frozen=True):
    """One placeholder of a template."""

    kind: str
    argument: str  # "": none
    filters: tuple[Filter, ...]
    column: int  # of its brace in the template, from 1

    def __str__(self) -> str:
        return f"{{{self.kind}:{self.argument}}}" if self.argument else f"{{{self.kind}}}"

    def filtered(self, value: Any) -> Any:
        """Return the value after all filters; None means an absent value or null.

        Raises:
            ValueError: a filter does not accept the value.
        """
        for each in self.filters:
            value = each.apply(value)
        return value


class Template(msgspec.Struct, frozen=True):
    """A parsed template: literal texts, which are never empty, and placeholders."""

    text: str
    parts: tuple[str | Placeholder, ...]

    @property
    def placeholders(self) -> tuple[Placeholder, ...]:
        """The placeholders, in order."""
        return tuple(part for part in self.parts if isinstance(part, Placeholder))

    @property
    def lone(self) -> Placeholder | None:
        """The placeholder, if the template consists of a single one."""
        first = self.parts[0] if len(self.parts) == 1 else None
        return first if isinstance(first, Placeholder) else None

    def check(self, known: Mapping[str, Takes], filters: frozenset[str] | None = None) -> None:
        """Check that all placeholders and filters are known.

        Args:
            known: the kinds, and whether they take an argument.
            filters: names of the permitted filters, all if None.

        Raises:
            ValueError: names the first unknown placeholder or filter, and the most similar known one.
        """
        for each in self.placeholders:
            takes = known.get(each.kind)
            if takes is None:
                listed = ", ".join(f"{{{name}}}" for name in known)
                near = get_close_matches(each.kind, known, 1)
                advice = f"did you mean {{{near[0]}}}?" if near else f"known here: {listed}; {{{{ is a brace"
                raise ValueError(f"column {each.column}: unknown placeholder {each}; {advice}")
            if takes == "nothing" and each.argument:
                raise ValueError(f"column {each.column}: {each} takes no argument; write {{{each.kind}}}")
            if takes == "argument" and not each.argument:
                raise ValueError(f"column {each.column}: {each} needs an argument: {{{each.kind}:…}}")
            for filter_ in each.filters:
                if filters is not None and filter_.name not in filters:
                    known_here = (
                        f"known here: {', '.join(sorted(filters))}" if filters else "no filter works here"
                    )
                    raise ValueError(
                        f'column {each.column}: the filter "{filter_.name}" does not work here; {known_here}'
                    )


def parse(text: str, more: Mapping[str, Callable[[Any], Any]] = NO_FILTERS) -> Template:
    """Parse a template.

    Args:
        text: the template.
        more: filters without an argument, in addition to `FILTERS`.

    Raises:
        ValueError: names the column, from 1, and the correction.

    >>> parse("v0:{timestamp}:{body:a.b}").parts[3].argument
    'a.b'
    """
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"a template has at most {MOST_CHARACTERS} characters, this one {len(text)}")
    parts: list[str | Placeholder] = []
    literal = ""
    at = 0
    while at < len(text):
        character = text[at]
        if character not in "{}":
            literal += character
            at += 1
        elif text[at : at + 2] in ("{{", "}}"):
            literal += character
            at += 2
        elif character == "}":
            raise ValueError(f"column {at + 1}: a single }}; write }}}} for a brace")
        else:
            if literal:
                parts.append(literal)
                literal = ""
            placeholder, at = _placeholder(text, at, more)
            parts.append(placeholder)
    if literal:
        parts.append(literal)
    return Template(text, tuple(parts))


def _placeholder(text: str, start: int, more: Mapping[str, Callable[[Any], Any]]) -> tuple[Placeholder, int]:
    """Read a placeholder that begins at `start`; return it and the position after it."""
    column = start + 1
    kind, at = _match(_KIND, text, start + 1)
    if not kind.strip():
        raise ValueError(f"column {column}: a placeholder needs a name; write {{{{ and }}}} for braces")
    argument = ""
    if text[at : at + 1] == ":":
        argument, at = _match(_ARGUMENT, text, at + 1)
        argument = argument.strip()
        if not argument and text[at : at + 1] in ("|", "}"):
            raise ValueError(f"column {column}: {{{kind}:}} has nothing after the colon")
    filters: list[Filter] = []
    while text[at : at + 1] == "|":
        name, at = _match(_NAME, text, at + 1)
        filter_argument = None
        if text[at : at + 1] == ":":
            filter_argument, at = _match(_FILTER_ARGUMENT, text, at + 1)
        filters.append(_filter(name.strip(), filter_argument, column, more))
    if text[at : at + 1] != "}":
        shown = text[start : start + _SHOWN]
        raise ValueError(
            f"column {column}: no }} closes the placeholder {shown!r}; write {{{{ for a brace, "
            "and quotation marks in pairs"
        )
    return Placeholder(kind.strip(), argument, tuple(filters), column), at + 1


def _match(pattern: re.Pattern[str], text: str, at: int) -> tuple[str, int]:
    match = pattern.match(text, at)
    return (match[0], match.end()) if match else ("", at)


def text_of(value: Any) -> str:
    """Return a string, number or boolean as text, as JSON writes it; `""` for None and null.

    Raises:
        ValueError: the value is a list or an object.
    """
    if isinstance(value, msgspec.Raw):
        text = bytes(value)
        if text[:1] in b"-0123456789":
            return text.decode()  # of any length, unchanged
        value = [] if text[:1] == b"[" else {} if text[:1] == b"{" else read(text)
    if type(value) is str:
        return value
    if value is None:
        return ""
    if isinstance(value, bool | int | float):
        return encode(value).decode()
    kind = "a list" if isinstance(value, list | tuple) else "an object"
    raise ValueError(f"expected text, a number, true or false, got {kind}")


def _json(value: Any) -> Any:
    return encode(value).decode()


def _changed(change: Callable[[str], str]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else change(text_of(value))


def _default(argument: str) -> Callable[[Any], Any]:
    return lambda value: argument if value is None or value == "" else value


def _truncate(argument: str) -> Callable[[Any], Any]:
    if not re.fullmatch("[1-9][0-9]{0,5}", argument, re.ASCII):
        raise ValueError("expected a number of characters, such as truncate:80")
    most = int(argument)
    return _changed(lambda text: text if len(text) <= most else text[: most - 1] + "…")


def _date(argument: str) -> Callable[[Any], Any]:
    for directive in _DIRECTIVE.findall(argument):
        if directive not in _DIRECTIVES:
            listed = " ".join(f"%{each}" for each in sorted(_DIRECTIVES))
            raise ValueError(f"%{directive} is not one of {listed}")
    return lambda value: None if value is None else _moment(value).strftime(argument)


def _moment(value: Any) -> datetime:
    """Return the time of RFC 3339 text, or of seconds or milliseconds since 1970, in UTC."""
    text = text_of(value)
    try:
        if re.fullmatch(r"-?[0-9]{1,16}(\.[0-9]{1,9})?", text, re.ASCII):
            number = float(text)
            return datetime.fromtimestamp(number / 1000 if abs(number) >= _MILLISECONDS else number, UTC)
        time = datetime.fromisoformat(text)
        return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)
    except (ValueError, OverflowError, OSError):
        raise ValueError("expected a time: RFC 3339 text, or seconds since 1970") from None


_PLAIN: Mapping[str, Callable[[Any], Any]] = {
    "json": _json,
    "upper": _changed(str.upper),
    "lower": _changed(str.lower),
}
"""Filters without an argument."""

_WITH_ARGUMENT: Mapping[str, tuple[Callable[[str], Callable[[Any], Any]], str | None]] = {
    "default": (_default, None),
    "truncate": (_truncate, None),
    "date": (_date, "%Y-%m-%dT%H:%M:%SZ"),
}
"""Filters with an argument: their compiler, and the default of the argument; None: it is required."""

FILTERS = frozenset({*_PLAIN, *_WITH_ARGUMENT})
"""The names of all filters."""


def _filter(name: str, argument: str | None, column: int, more: Mapping[str, Callable[[Any], Any]]) -> Filter:
    """Compile a filter.

    Raises:
        ValueError: it does not exist, or its argument is wrong.
    """
    plain = _PLAIN.get(name) or more.get(name)
    if plain is not None:
        if argument is not None:
            raise ValueError(f'column {column}: the filter "{name}" takes no argument')
        return Filter(name, "", plain)
    if name not in _WITH_ARGUMENT:
        known = sorted({*FILTERS, *more})
        near = get_close_matches(name, known, 1)
        advice = f'did you mean "{near[0]}"?' if near else f"known: {', '.join(known)}"
        raise ValueError(f'column {column}: unknown filter "{name}"; {advice}')
    compile_, usual = _WITH_ARGUMENT[name]
    if argument is None:
        argument = usual
    if argument is None:
        raise ValueError(f'column {column}: the filter "{name}" needs an argument: {name}:…')
    if argument[:1] in ("'", '"'):
        argument = argument[1:-1]
    try:
        return Filter(name, argument, compile_(argument))
    except ValueError as error:
        raise ValueError(f"column {column}: {name}: {error}") from None
