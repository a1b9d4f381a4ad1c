"""How commands print: tables for people, tab-separated lines for pipes, JSON for programs."""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import click

from relay.base.text import Colour, paint, printable, wants_colour

_STATES: Mapping[str, Colour] = {
    "delivered": "green", "dead": "red", "expired": "red",
    "ONLINE": "green", "OFFLINE": "red", "MAINTENANCE": "yellow",
    "open": "red", "failed": "red", "done": "green",
}  # fmt: skip


def colour_of(heading: str, cell: str) -> Colour | None:
    """Return the colour of a cell that says how something is; most cells do not.

    >>> colour_of("state", "dead"), colour_of("held", "paused"), colour_of("result", "ok")
    ('red', 'yellow', 'green')
    """
    match heading:
        case "state" | "status" | "circuit":
            return _STATES.get(cell)
        case "held":
            return "red" if cell.startswith("disabled") else "yellow" if cell else None
        case "paused":
            return "yellow" if cell == "yes" else None
        case "result":
            return "green" if cell == "ok" else "red"
    return None


def say(text: str) -> None:
    """Print a line that may be painted; click would take the colour away again where it is piped."""
    click.echo(text, color=True)


def print_table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print aligned columns under headings on a terminal; when piped, the bare rows, tab-separated."""
    cells = [[printable(" ".join(str(cell).split())) for cell in row] for row in rows]
    colour = wants_colour(sys.stdout)
    if not sys.stdout.isatty():
        for row in cells:
            say("\t".join(_painted(headings, row, row) if colour else row))
        return
    for line in table_lines(headings, cells, colour=colour):
        say(line)


def table_lines(headings: Sequence[str], rows: Sequence[Sequence[str]], *, colour: bool) -> list[str]:
    """Return a table for a terminal, the headings first."""
    cells = [[heading.upper() for heading in headings], *rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for number, row in enumerate(cells):
        padded = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        padded[-1] = padded[-1].rstrip()
        lines.append("  ".join(_painted(headings, row, padded) if colour and number else padded).rstrip())
    return lines


def _painted(headings: Sequence[str], cells: Sequence[str], shown: Sequence[str]) -> list[str]:
    return [
        paint(cell, colour_of(heading, cell)) + text[len(cell) :] if cell else text
        for heading, cell, text in zip(headings, cells, shown, strict=True)
    ]


def print_json(value: Any) -> None:
    """Print a value as JSON that people can read as well."""
    click.echo(to_json(value, indent=2))


def to_json(value: Any, *, indent: int | None = None) -> str:
    r"""Write a value as JSON in UTF-8; what UTF-8 cannot hold stays an escape.

    >>> to_json(["é", "\ud83d"])
    '["é", "\\ud83d"]'
    """
    return json.dumps(value, indent=indent, ensure_ascii=False).encode(errors="backslashreplace").decode()


def count(number: int, noun: str) -> str:
    """Write a number of things.

    >>> count(1, "source"), count(1204, "event"), count(2, "delivery")
    ('1 source', '1 204 events', '2 deliveries')
    """
    many = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"
    return f"{number:,} {noun if number == 1 else many}".replace(",", " ")
