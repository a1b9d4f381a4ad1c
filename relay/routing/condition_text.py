"""Conditions on an event as a person writes them: `data.total>=100`."""

import json
import re
from collections.abc import Sequence
from typing import Any

from relay.routing.conditions import compile_conditions

_CONDITION = re.compile(
    r"""(?P<path>(?:"[^"]*"|'[^']*'|[^"'=!<>~])+)(?:(?P<operator>!=|>=|<=|[=<>~])(?P<value>.*))?""", re.DOTALL
)
_ORDERS = {">=": "gte", ">": "gt", "<=": "lte", "<": "lt"}


def read_conditions(texts: Sequence[str]) -> dict[str, Any] | None:
    """Return the API's table for these conditions, which must all hold; None without a condition.

    Raises:
        ValueError: a condition is malformed, contradicts another one, or has an unknown path.

    >>> read_conditions(["data.sale=true", "data.total>=100", "data.total<500", "subject~s-*", "data.note"])
    ... # doctest: +NORMALIZE_WHITESPACE
    {'data.sale': {'in': [True]}, 'data.total': {'gte': 100, 'lt': 500},
     'subject': {'glob': 's-*'}, 'data.note': {'exists': True}}
    >>> read_conditions(["type!=adorn.a", "type!=adorn.b", "data.gone=null"])
    {'type': {'not': {'in': ['adorn.a', 'adorn.b']}}, 'data.gone': {'exists': False}}
    """
    table: dict[str, Any] = {}
    for text in texts:
        match = _CONDITION.fullmatch(text)
        if match is None:
            raise ValueError(f'invalid condition "{text}"')
        tests = table.setdefault(match["path"].strip(), {})
        name, operand = _test(match["operator"], (match["value"] or "").strip())
        if name == "not" and name in tests:
            tests[name]["in"] += operand["in"]
        elif name in tests:
            raise ValueError(f'"{text}" contradicts or repeats another condition')
        else:
            tests[name] = operand
    if not table:
        return None
    compile_conditions(table)
    return table


def _test(operator: str | None, text: str) -> tuple[str, Any]:
    value = _value(text)
    if operator is None:
        return "exists", True
    if operator in ("=", "!=") and value is None:
        return "exists", operator == "!="
    if operator == "=":
        return "in", [value]
    if operator == "!=":
        return "not", {"in": [value]}
    return ("glob", text) if operator == "~" else (_ORDERS[operator], value)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
