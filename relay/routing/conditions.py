"""Conditions over the envelope, as in a destination's `where`: compiled once, able to explain a mismatch.

A table matches if all its conditions hold; a list of tables matches if one of its tables does. A condition is
a path (`relay.routing.envelope.Path`) and either a literal or a table of operators that must all hold:

    "data.sale_made" = true
    "data.total" = { gte = 100, lt = 500 }
    "subject" = { not = { prefix = "test-" } }

Values compare as JSON values: 1 equals 1.0, `true` does not equal 1, "1" is not a number, null is absent. An
absent value matches only `exists = false` and `not`.
"""

import json
import math
import operator
import re
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from fnmatch import translate
from typing import Any

import msgspec

from relay.routing.envelope import ABSENT, EnvelopeView, Path

Test = Callable[[Any], bool]

_SHOWN = 120  # characters of a value in an explanation


class Condition(msgspec.Struct, frozen=True):
    """One condition on one value."""

    path: Path
    expected: str  # as text, for explanations
    test: Test


class Mismatch(msgspec.Struct, frozen=True, kw_only=True):
    """One condition that does not hold, with the value."""

    path: str
    expected: str
    found: str  # shortened JSON; for lists and objects their length; or "absent"

    def __str__(self) -> str:
        return f"{self.path} is {self.found}, expected {self.expected}"


class Conditions(msgspec.Struct, frozen=True):
    """Alternatives, one of which must match; an alternative matches if all its conditions hold."""

    alternatives: tuple[tuple[Condition, ...], ...]

    def matches(self, view: EnvelopeView) -> bool:
        """Return whether the conditions match an event."""
        return any(
            all(condition.test(view.find(condition.path)) for condition in conditions)
            for conditions in self.alternatives
        )

    def misses(self, view: EnvelopeView) -> tuple[tuple[Mismatch, ...], ...]:
        """Return the conditions of each alternative that do not hold."""
        return tuple(
            tuple(
                Mismatch(path=condition.path.text, expected=condition.expected, found=_show(value))
                for condition in conditions
                if not condition.test(value := view.find(condition.path))
            )
            for conditions in self.alternatives
        )


def compile_conditions(value: Any) -> Conditions:
    """Compile conditions as TOML gives them: a table, or a list of tables.

    Raises:
        ValueError: the first mistake, with the condition's path.
    """
    tables = value if isinstance(value, list) else [value]
    if not tables or not all(isinstance(table, dict) for table in tables):
        raise ValueError("expected a table of conditions, or a list of such tables")
    if not all(tables):
        raise ValueError("a table without conditions matches every event; remove it")
    return Conditions(tuple(tuple(_conditions(table)) for table in tables))


def _conditions(table: Mapping[str, Any]) -> list[Condition]:
    conditions: list[Condition] = []
    for key, value in table.items():
        path = Path.parse(key)
        try:
            conditions.extend(Condition(path, expected, test) for expected, test in _tests(value))
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from None
    return conditions


def _tests(value: Any) -> list[tuple[str, Test]]:
    if not isinstance(value, dict):
        return [(_literal(value), _equals(value))]
    if not value:
        raise ValueError(f"expected a value or a table of {', '.join(_OPERATORS)}")
    return [_operation(name, operand) for name, operand in value.items()]


def _operation(name: str, operand: Any) -> tuple[str, Test]:
    if name not in _OPERATORS:
        known = f'use {", ".join(_OPERATORS)}; for a nested field quote the whole path, as in "data.total"'
        near = get_close_matches(name, _OPERATORS, 1)
        hint = f'did you mean "{near[0]}"?' if near else known
        raise ValueError(f'unknown operator "{name}"; {hint}')
    try:
        return _OPERATORS[name](operand)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _literal(value: Any) -> str:
    """Return a literal as JSON; raise ValueError if JSON cannot express it."""
    if isinstance(value, list):
        return f"[{', '.join(map(_literal, value))}]"
    if not isinstance(value, bool | int | float | str) or _is_nan(value):
        raise ValueError("expected text, a number, true, false or a list of these")
    return json.dumps(value, ensure_ascii=False)


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _equals(literal: Any) -> Test:
    if isinstance(literal, bool):
        return lambda value: value is literal
    if isinstance(literal, list):
        items = [_equals(item) for item in literal]
        return lambda value: (
            type(value) is list
            and len(value) == len(items)
            and all(test(item) for test, item in zip(items, value, strict=True))
        )
    return lambda value: type(value) is not bool and bool(value == literal)


def _in(operand: Any) -> tuple[str, Test]:
    if not isinstance(operand, list) or not operand:
        raise ValueError("expected a list of values")
    expected = f"one of {', '.join(map(_literal, operand))}"
    tests = [_equals(item) for item in operand]
    return expected, lambda value: any(test(value) for test in tests)


def _text(words: str, make: Callable[[str], Callable[[str], Any]]) -> Callable[[Any], tuple[str, Test]]:
    def compile_(operand: Any) -> tuple[str, Test]:
        if not isinstance(operand, str):
            raise ValueError("expected text")  # noqa: TRY004 - a mistake in config.toml, not in a call
        fits = make(operand)
        return f"{words} {_literal(operand)}", lambda value: type(value) is str and bool(fits(value))

    return compile_


def _order(symbol: str, compare: Callable[[Any, Any], bool]) -> Callable[[Any], tuple[str, Test]]:
    def compile_(operand: Any) -> tuple[str, Test]:
        if isinstance(operand, bool) or not isinstance(operand, int | float | str) or _is_nan(operand):
            raise ValueError("expected a number or text")
        types = (str,) if isinstance(operand, str) else (int, float)
        return f"{symbol} {_literal(operand)}", lambda value: type(value) in types and compare(value, operand)

    return compile_


def _exists(operand: Any) -> tuple[str, Test]:
    if not isinstance(operand, bool):
        raise ValueError("expected true or false")  # noqa: TRY004 - a mistake in config.toml, not in a call
    return ("any value" if operand else "absent"), lambda value: (value is not ABSENT) is operand


def _not(operand: Any) -> tuple[str, Test]:
    inner = _tests(operand)
    expected = " and ".join(words for words, _ in inner)
    return f"not ({expected})", lambda value: not all(test(value) for _, test in inner)


_OPERATORS: Mapping[str, Callable[[Any], tuple[str, Test]]] = {
    "in": _in,
    "prefix": _text("text that starts with", lambda operand: lambda value: value.startswith(operand)),
    "suffix": _text("text that ends with", lambda operand: lambda value: value.endswith(operand)),
    "glob": _text("text like", lambda operand: re.compile(translate(operand)).match),
    "gte": _order(">=", operator.ge),
    "gt": _order(">", operator.gt),
    "lte": _order("<=", operator.le),
    "lt": _order("<", operator.lt),
    "exists": _exists,
    "not": _not,
}


def _show(value: Any) -> str:
    if value is ABSENT:
        return "absent"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return f"an object of {len(value)}"
    text = json.dumps(value, ensure_ascii=False).encode(errors="backslashreplace").decode()
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"
