"""Lists and single things: the options that their commands share, and how they are printed."""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import click

from relay.cli.options import OneOf, json_option
from relay.cli.output import print_json, print_table

STATES = ("pending", "delivered", "dead", "expired", "cancelled")
_FILTERS: Mapping[str, tuple[Any, str]] = {
    "source": (str, "Of this source."),
    "type": (str, "Of this full type, such as adorn.image.shared."),
    "subject": (str, "About this subject."),
    "destination": (str, "Owed to this destination."),
    "state": (OneOf(STATES), "In this state."),
    "since": (str, 'Received since then: "2h" ago, or RFC 3339.'),
    "until": (str, "Received before then."),
    "status": (OneOf(("ONLINE", "OFFLINE", "MAINTENANCE")), "Of this status."),
    "version": (str, "Of this version."),
    "environment": (str, "Of this environment."),
    "event": (str, "Of this event; its id in full."),
}

quiet_option = click.option("-q", "--quiet", is_flag=True, help="Print ids only.")


def filter_options(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command filters, which mean the same everywhere."""

    def give(command: Callable[..., Any]) -> Callable[..., Any]:
        for name in reversed(names):
            type_, text = _FILTERS[name]
            command = click.option(f"--{name}", type=type_, help=text)(command)
        return command

    return give


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
        text = " ".join(cell(value).split())
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
