"""Lists and single things: the options that their commands share, and how they are printed."""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import click

from relay.api.query_params import STATES
from relay.base.clock import SystemClock, moment
from relay.base.text import printable
from relay.cli.conditions import conditions
from relay.cli.exit_codes import INTERRUPTED, CommandError
from relay.cli.options import OneOf, json_option, understood
from relay.cli.output import print_json, print_table
from relay.cli.progress import show
from relay.routing.filters import Patterns

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


def as_query(filters: Mapping[str, Any]) -> dict[str, Any]:
    """Return filters that are given, as parameters of a question: conditions are JSON there."""
    told = {name: value for name, value in filters.items() if value is not None}
    return told | ({"where": json.dumps(told["where"])} if "where" in told else {})


class Lists(Protocol):
    """What answers with pages: a relay that runs, or a file."""

    def get(self, kind: str, /, **query: Any) -> Any:
        """Return a page."""
        ...


def gather(lists: Lists, kind: str, *, limit: int, cursor: str | None, **query: Any) -> dict[str, Any]:
    """Return so many rows of a list, following its pages where what is asked for is rare.

    Raises:
        CommandError: the operator ended it.
    """
    told = as_query(query)
    items: list[Any] = []
    try:
        while True:
            page = lists.get(kind, limit=limit - len(items), cursor=cursor, **told)
            items += page["items"]
            cursor = page["next_cursor"]
            if cursor is None or len(items) >= limit:
                return {"items": items, "next_cursor": cursor}
            show(f"{len(items)} found so far, looking on from {cursor}")
    except KeyboardInterrupt:
        on = "" if cursor is None else f"; go on with the same command and --cursor {cursor}"
        raise CommandError(f"ended after {len(items)} {kind}{on}", code=INTERRUPTED) from None
    finally:
        show("")


def page_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a list what every list has."""
    command = quiet_option(json_option(command))
    command = click.option("--cursor", help="Go on where the page before ended.")(command)
    return click.option(
        "--limit", type=click.IntRange(1, 500), default=50, show_default=True, help="Rows at most."
    )(command)


def print_page(
    answer: Mapping[str, Any], columns: Sequence[str], *, as_json: bool, quiet: bool, key: str = "id"
) -> None:
    """Print a page of a list; where there is more, people are told how to see it."""
    items = answer["items"]
    if as_json:
        print_json(answer)
    elif quiet:
        for item in items:
            click.echo(item[key])
    else:
        print_table(
            [name.replace("_", " ") for name in columns], [[cell(item[c]) for c in columns] for item in items]
        )
    if answer["next_cursor"] is not None and not as_json and sys.stderr.isatty():
        click.echo(f"there is more: add --cursor {answer['next_cursor']}", err=True)


def print_fields(item: Mapping[str, Any]) -> None:
    """Print one thing, a line per field; what it contains is printed by whoever knows it."""
    fields = {name: value for name, value in item.items() if not _is_table(value)}
    width = max(map(len, fields)) if sys.stdout.isatty() else 0
    for name, value in fields.items():
        text = printable(" ".join(cell(value).split()))
        click.echo(f"{name.replace('_', ' ').ljust(width)}  {text}".rstrip() if width else f"{name}\t{text}")


def cell(value: object) -> str:
    """Write a value of the API for people.

    >>> cell(None), cell(True), cell(["a", "b"]), cell({"dead": 2})
    ('', 'yes', 'a, b', '2 dead')
    """
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, dict):
        return ", ".join(f"{amount} {name}" for name, amount in value.items())
    return str(value)


def _is_table(value: object) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)
