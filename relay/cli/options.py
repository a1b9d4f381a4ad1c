"""Options and filters that several commands share."""

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from relay.api.query_params import STATES
from relay.base.clock import SystemClock, moment
from relay.base.units import parse_rate
from relay.cli.main import OneOf
from relay.routing.conditions import compile_conditions
from relay.routing.subscription import Patterns

FILE = click.Path(path_type=Path, readable=False)
"""A path. Commands report an unreadable file themselves, because click would exit with 2."""

config_option = click.option(
    "-c",
    "--config",
    type=FILE,
    help="Configuration file.  [default: $RELAY_CONFIG, ./config.toml or /etc/relay/config.toml]",
)
env_file_option = click.option(
    "--env-file",
    "env_files",
    type=FILE,
    multiple=True,
    help="Read environment variables from this file.  [default: the files of the installed service]",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
quiet_option = click.option("-q", "--quiet", is_flag=True, help="Print ids only.")


def checked(reader: Callable[[str], object]) -> Callable[..., str | None]:
    """Return a callback that validates an option's text with `reader`, and returns the text unchanged.

    The daemon validates it too. This check makes an invalid value a usage error even without a daemon.
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
    "--rate", callback=checked(parse_rate), help='Maximum rate, such as "20/s".  [default: 100/s]'
)

_FILTERS: Mapping[str, tuple[Any, str]] = {
    "source": (str, "Name of the source."),
    "type": (str, 'Full event type, or a pattern such as "adorn.*".'),
    "subject": (str, "Exact subject of the event."),
    "destination": (str, "Name of the destination."),
    "state": (OneOf(STATES), "State of the delivery."),
    "since": (str, 'Received at this time or later: an age such as "2h", or RFC 3339.'),
    "until": (str, 'Received before this time: an age such as "2h", or RFC 3339.'),
    "status": (OneOf(("ONLINE", "OFFLINE", "MAINTENANCE")), "Status of the worker."),
    "version": (str, "Version of the worker."),
    "environment": (str, "Environment of the worker."),
    "event": (str, "Id of the event; any unique prefix works."),
}
_READERS: Mapping[str, Callable[[str], object]] = {
    "type": lambda text: Patterns((text,)),
    "since": lambda text: moment(text, SystemClock().wall()),
    "until": lambda text: moment(text, SystemClock().wall()),
}
SELECTION = ("source", "type", "subject", "since", "until", "destination", "state", "where")
"""Filters that select events, or deliveries by their events."""

_WHERE = (
    'Condition on the event, such as "data.sale_made=true". Operators: = != < <= > >=, ~ (pattern);'
    " a path alone tests that the value exists. Repeatable."
)


def filter_options(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator that adds filters to a command."""

    def give(command: Callable[..., Any]) -> Callable[..., Any]:
        for name in reversed(names):
            if name == "where":
                command = click.option("--where", multiple=True, callback=_where, help=_WHERE)(command)
                continue
            type_, text = _FILTERS[name]
            reader = checked(_READERS[name]) if name in _READERS else None
            command = click.option(f"--{name}", type=type_, callback=reader, help=text)(command)
        return command

    return give


def page_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of every list to a command."""
    command = quiet_option(json_option(command))
    command = click.option("--cursor", help="Show the page after this cursor.")(command)
    return click.option(
        "--limit", type=click.IntRange(1, 500), default=50, show_default=True, help="Maximum number of rows."
    )(command)


_CONDITION = re.compile(
    r"""(?P<path>(?:"[^"]*"|'[^']*'|[^"'=!<>~])+)(?:(?P<operator>!=|>=|<=|[=<>~])(?P<value>.*))?""", re.DOTALL
)
_ORDERS = {">=": "gte", ">": "gt", "<=": "lte", "<": "lt"}


def _where(_context: click.Context, _option: click.Parameter, texts: Sequence[str]) -> dict[str, Any] | None:
    return conditions(texts)


def conditions(texts: Sequence[str]) -> dict[str, Any] | None:
    """Return the API's table of conditions for `--where` options; all must hold. None without an option.

    Raises:
        BadParameter: a condition is malformed, contradicts another one, or has an unknown path.

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
            raise _invalid(f'invalid condition "{text}"')
        tests = table.setdefault(match["path"].strip(), {})
        name, operand = _test(match["operator"], (match["value"] or "").strip())
        if name == "not" and name in tests:
            tests[name]["in"] += operand["in"]
        elif name in tests:
            raise _invalid(f'"{text}" contradicts or repeats another condition')
        else:
            tests[name] = operand
    if not table:
        return None
    try:
        compile_conditions(table)
    except ValueError as error:
        raise _invalid(str(error)) from None
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


def _invalid(why: str) -> click.BadParameter:
    examples = "data.sale_made=true, data.total>=100, type!=adorn.a, subject~s-*, data.note"
    return click.BadParameter(f"{why}; examples: {examples}", param_hint="--where")


def read_data(data: str, option: str = "--data") -> bytes:
    """Return the content that an option names: `@FILE`, or `@-` or `-` for standard input.

    Raises:
        BadParameter: the value has another form, or the file cannot be read.
    """
    name = data.removeprefix("@")
    if name == "-":
        return sys.stdin.buffer.read()
    if name == data:
        file = "body.json" if set(data) & set("{[\n") else data  # the value looks like a body
        raise click.BadParameter(f"expected @FILE or -, as in {option} @{file}", param_hint=option)
    return read_file(Path(name), option)


def read_file(file: Path, option: str) -> bytes:
    """Return the content of a file that an option names.

    Raises:
        BadParameter: the file cannot be read.
    """
    try:
        return file.read_bytes()
    except OSError as error:
        raise click.BadParameter(f"cannot read {file}: {error.strerror}", param_hint=option) from None
