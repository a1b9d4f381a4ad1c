"""Options that several commands have."""

import difflib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from relay.api.query_params import STATES
from relay.base.clock import SystemClock, moment
from relay.base.units import parse_rate
from relay.routing.conditions import compile_conditions
from relay.routing.subscription import Patterns

FILE = click.Path(path_type=Path, readable=False)
"""A path; click's own check would answer one that may not be read as a wrong use, in its own words."""

config_option = click.option(
    "-c",
    "--config",
    type=FILE,
    help="The configuration; else $RELAY_CONFIG, ./config.toml or /etc/relay/config.toml.",
)

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def understood(reader: Callable[[str], object]) -> Callable[..., str | None]:
    """Return a callback that has an option's text read beforehand, and gives it on as it is.

    The relay reads it again; but what nobody understands is a wrong use, whether one runs or not.
    """

    def check(_context: click.Context, _option: click.Parameter, text: str | None) -> str | None:
        if text is not None:
            try:
                reader(text)
            except ValueError as error:
                raise click.BadParameter(str(error)) from None
        return text

    return check


rate_option = click.option(
    "--rate", callback=understood(parse_rate), help='Events at most, such as "20/s".  [default: 100/s]'
)


class OneOf(click.Choice[str]):
    """One of some words; says which one a misspelt one may mean."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """See `click.Choice.convert`."""
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter as error:
            folded = {str(word).casefold(): str(word) for word in self.choices}
            near = difflib.get_close_matches(str(value).casefold(), folded, n=1)
            meant = f' Did you mean "{folded[near[0]]}"?' if near else ""
            raise click.BadParameter(f"{error.message}{meant}", ctx, param) from None


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
        compile_conditions(table)
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


_FILTERS: Mapping[str, tuple[Any, str]] = {
    "source": (str, "Of this source."),
    "type": (str, 'Of this full type, or of such as match a pattern: "adorn.*".'),
    "subject": (str, "About this subject."),
    "destination": (str, "Of deliveries to this destination."),
    "state": (OneOf(STATES), "Of deliveries in this state."),
    "since": (str, 'Received since then: "2h" ago, or RFC 3339.'),
    "until": (str, "Received before then, likewise."),
    "status": (OneOf(("ONLINE", "OFFLINE", "MAINTENANCE")), "Of this status."),
    "version": (str, "Of this version."),
    "environment": (str, "Of this environment."),
    "event": (str, "Of this event; its id may be shortened while unique."),
}
_READERS: Mapping[str, Callable[[str], object]] = {
    "type": lambda text: Patterns((text,)),
    "since": lambda text: moment(text, SystemClock().wall()),
    "until": lambda text: moment(text, SystemClock().wall()),
}
SELECTION = ("source", "type", "subject", "since", "until", "destination", "state", "where")
"""What chooses events, or deliveries by what their events are."""

_WHERE = (
    'Holding this: "data.sale_made=true", also != < <= > >=, ~ for patterns, or a path alone; repeatable.'
)

quiet_option = click.option("-q", "--quiet", is_flag=True, help="Print ids only.")


def filter_options(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command filters, which mean the same everywhere."""

    def give(command: Callable[..., Any]) -> Callable[..., Any]:
        for name in reversed(names):
            if name == "where":
                command = click.option("--where", multiple=True, callback=_where, help=_WHERE)(command)
                continue
            type_, text = _FILTERS[name]
            reader = understood(_READERS[name]) if name in _READERS else None
            command = click.option(f"--{name}", type=type_, callback=reader, help=text)(command)
        return command

    return give


def _where(_context: click.Context, _option: click.Parameter, texts: Sequence[str]) -> dict[str, Any] | None:
    return conditions(texts)


def page_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a list what every list has."""
    command = quiet_option(json_option(command))
    command = click.option("--cursor", help="Go on where the page before ended.")(command)
    return click.option(
        "--limit", type=click.IntRange(1, 500), default=50, show_default=True, help="Rows at most."
    )(command)
