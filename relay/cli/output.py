"""Output of commands: tables on a terminal, tab-separated rows in a pipe, JSON; progress on stderr."""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import click

from relay.base.text import Colour, paint, printable, wants_colour
from relay.base.units import render_duration

_STATES: Mapping[str, Colour] = {
    "delivered": "green", "dead": "red", "expired": "red",
    "ONLINE": "green", "OFFLINE": "red", "MAINTENANCE": "yellow",
    "open": "red", "failed": "red", "done": "green",
}  # fmt: skip


def colour_of(heading: str, cell: str) -> Colour | None:
    """Return the colour of a cell that shows a state, None for any other cell.

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


def print_line(text: str) -> None:
    """Print a line that may contain colour; without `color=True`, click removes it in a pipe."""
    click.echo(text, color=True)


def print_table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print aligned columns with headings on a terminal; in a pipe, only the rows, tab-separated."""
    cells = [[printable(" ".join(str(cell).split())) for cell in row] for row in rows]
    colour = wants_colour(sys.stdout)
    if not sys.stdout.isatty():
        for row in cells:
            print_line("\t".join(_painted(headings, row, row) if colour else row))
        return
    for line in table_lines(headings, cells, colour=colour):
        print_line(line)


def table_lines(headings: Sequence[str], rows: Sequence[Sequence[str]], *, colour: bool) -> list[str]:
    """Return the lines of a table for a terminal; the headings are the first line."""
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
    """Print a value as indented JSON."""
    click.echo(to_json(value, indent=2))


def to_json(value: Any, *, indent: int | None = None) -> str:
    r"""Return a value as JSON in UTF-8; a lone surrogate stays an escape.

    >>> to_json(["é", "\ud83d"])
    '["é", "\\ud83d"]'
    """
    return json.dumps(value, indent=indent, ensure_ascii=False).encode(errors="backslashreplace").decode()


def count(number: int, noun: str) -> str:
    """Return a number with its noun, singular or plural.

    >>> count(1, "source"), count(1204, "event"), count(2, "delivery")
    ('1 source', '1 204 events', '2 deliveries')
    """
    many = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"
    return f"{number:,} {noun if number == 1 else many}".replace(",", " ")


def show_progress(text: str) -> None:
    """Replace the progress line on a terminal; "" clears it."""
    if sys.stderr.isatty():
        click.echo(f"\r{text}\033[K", err=True, nl=False)


def pace(per_second: float, seconds_left: float | None) -> str:
    """Return the rate and the remaining time.

    >>> pace(20.0, 3.2), pace(7.25, None)
    ('20/s, 3s left', '7.25/s')
    """
    eta = "" if seconds_left is None else f", {render_duration(round(seconds_left))} left"
    return f"{per_second:g}/s{eta}"


class Meter:
    """Progress of an operation whose total is known: count, rate and remaining time."""

    def __init__(self, total: int, noun: str) -> None:
        self._total = total
        self._noun = noun
        self._began = time.monotonic()

    def text(self, done: int) -> str:
        """Return the progress line after `done` of the total."""
        seconds = time.monotonic() - self._began
        rate = done / seconds if seconds > 0 else 0.0
        left = max(0, self._total - done) / rate if rate else None
        so_far = f"{done:,} of {count(self._total, self._noun)}".replace(",", " ")
        return f"{so_far}, {pace(round(rate, 1), left)}"


def print_page(
    answer: Mapping[str, Any],
    columns: Sequence[str],
    *,
    quiet: bool,
    as_json: bool = False,
    key: str = "id",
    headings: Sequence[str] = (),
) -> None:
    """Print a page of a list; on a terminal, also the option that shows the next page.

    `headings` default to the names of the columns.
    """
    items = answer["items"]
    if as_json:
        print_json(answer)
    elif quiet:
        for item in items:
            click.echo(item[key])
    else:
        print_table(
            headings or [name.replace("_", " ") for name in columns],
            [[cell(item[name]) for name in columns] for item in items],
        )
    if answer["next_cursor"] is not None and not as_json and sys.stderr.isatty():
        click.echo(f"more rows: add --cursor {answer['next_cursor']}", err=True)


def print_fields(item: Mapping[str, Any]) -> None:
    """Print the fields of one item, a line each; the caller prints the tables that it contains."""
    fields = {name: value for name, value in item.items() if not _is_table(value)}
    width = max(map(len, fields)) if sys.stdout.isatty() else 0
    for name, value in fields.items():
        text = printable(" ".join(cell(value).split()))
        click.echo(f"{name.replace('_', ' ').ljust(width)}  {text}".rstrip() if width else f"{name}\t{text}")


def cell(value: object) -> str:
    """Return a value of the API as text.

    >>> cell(None), cell(True), cell(["a", "b"]), cell({"dead": 2})
    ('', 'yes', 'a, b', '2 dead')
    """
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    if isinstance(value, dict):
        return ", ".join(f"{amount} {name}" for name, amount in value.items())
    return str(value)


def _is_table(value: object) -> bool:
    return isinstance(value, list | tuple) and bool(value) and isinstance(value[0], dict)
