"""`--where`: conditions on what an event holds, as one types them, into the table that the API takes."""

import json
import re
from collections.abc import Sequence
from typing import Any

import click

from relay.routing.conditions import compile_where

_CONDITION = re.compile(
    r"""(?P<path>(?:"[^"]*"|'[^']*'|[^"'=!<>~])+)(?:(?P<operator>!=|>=|<=|[=<>~])(?P<value>.*))?""", re.DOTALL
)
_ORDERS = {">=": "gte", ">": "gt", "<=": "lte", "<": "lt"}


def conditions(texts: Sequence[str]) -> dict[str, Any] | None:
    """Return a table of conditions that must all hold; None: there are none.

    Raises:
        BadParameter: one of them is none, contradicts another, or looks where nothing can be.

    >>> conditions(["data.sale_made=true", "data.total>=100", "data.total<500", "subject~s-*", "data.note"])
    ... # doctest: +NORMALIZE_WHITESPACE
    {'data.sale_made': {'in': [True]}, 'data.total': {'gte': 100, 'lt': 500},
     'subject': {'glob': 's-*'}, 'data.note': {'exists': True}}
    >>> conditions(["type!=adorn.a", "type!=adorn.b", "data.gone=null"])
    {'type': {'not': {'in': ['adorn.a', 'adorn.b']}}, 'data.gone': {'exists': False}}
    """
    table: dict[str, Any] = {}
    for text in texts:
        match = _CONDITION.fullmatch(text)
        if match is None:
            raise _wrong(f'"{text}" is no condition')
        tests = table.setdefault(match["path"].strip(), {})
        name, operand = _test(match["operator"], (match["value"] or "").strip())
        if name == "not" and name in tests:
            tests[name]["in"] += operand["in"]
        elif name in tests:
            raise _wrong(f'"{text}" contradicts another condition, or says it again')
        else:
            tests[name] = operand
    if not table:
        return None
    try:
        compile_where(table)
    except ValueError as error:
        raise _wrong(str(error)) from None
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


def _wrong(why: str) -> click.BadParameter:
    examples = "data.sale_made=true, data.total>=100, type!=adorn.a, subject~s-*, or data.note alone"
    return click.BadParameter(f"{why}; for example {examples}", param_hint="--where")
