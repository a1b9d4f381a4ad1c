"""Output of commands: tables on a terminal, tab-separated rows in a pipe, JSON; progress on stderr."""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import click

from relay.base.text import paint, printable, wants_colour
from relay.base.units import render_duration
from relay.cli.screen import (
    Column,
    Field,
    cell,
    colour_of,
    field_lines,
    full_time,
    set_digits,
    table,
    terminal_width,
    text,
    wrap,
)


def print_line(text: str) -> None:
    """Print a line that may contain colour; without `color=True`, click removes it in a pipe."""
    click.echo(text, color=True)


def print_table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print aligned columns with headings on a terminal; in a pipe, only the rows, tab-separated."""
    items = [dict(zip(headings, row, strict=True)) for row in rows]
    *others, last = headings
    shape = [text(name, least=16, long="middle") for name in others]
    print_items(headings, items, [*shape, text(last, long="wrap")])


def print_items(columns: Sequence[str], items: Sequence[Mapping[str, Any]], shape: Sequence[Column]) -> None:
    """Print items as rows: on a terminal as a table of this shape; in a pipe the columns, tab-separated."""
    colour = wants_colour(sys.stdout)
    if sys.stdout.isatty():
        for line in table(shape, items, width=terminal_width(), colour=colour):
            print_line(line)
        return
    for item in items:
        cells = [printable(" ".join(cell(item[name]).split())) for name in columns]
        painted = [
            paint(each, colour_of(name, each)) if each else ""
            for name, each in zip(columns, cells, strict=True)
        ]
        print_line("\t".join(painted if colour else cells))


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

    >>> count(1, "source"), count(1204, "event"), count(2, "delivery"), count(2, "day")
    ('1 source', '1 204 events', '2 deliveries', '2 days')
    """
    many = f"{noun[:-1]}ies" if noun.endswith("y") and noun[-2] not in "aeiou" else f"{noun}s"
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


def print_note(text: str) -> None:
    """Print a sentence on stderr; on a terminal, in lines that fit."""
    lines = wrap(text, terminal_width()) if sys.stderr.isatty() else [text]
    click.echo("\n".join(lines), err=True)


def print_page(
    answer: Mapping[str, Any],
    columns: Sequence[str],
    shape: Sequence[Column],
    *,
    quiet: bool,
    as_json: bool = False,
    key: str = "id",
) -> None:
    """Print a page of a list; on a terminal, also the option that shows the next page.

    `columns` are the cells of a piped row; `shape` is the table on a terminal.
    """
    items = answer["items"]
    if as_json:
        print_json(answer)
    elif quiet:
        for item in items:
            click.echo(item[key])
    elif items or not sys.stdout.isatty():
        set_digits(answer.get("id_digits"))
        print_items(columns, items, shape)
    else:
        click.echo(f"no {_plural()}", err=True)
    if answer["next_cursor"] is not None and not as_json and sys.stderr.isatty():
        click.echo(f"more rows: add --cursor {answer['next_cursor']}", err=True)


def _plural() -> str:
    """Return the plural of the listed items: "events" for `relay events list`."""
    context = click.get_current_context()
    return (context.parent and context.info_name == "list" and context.parent.info_name) or "rows"


def time_text(moment: str) -> str:
    """Return a time of the API: on a terminal in the zone of the reader, with its distance from now."""
    return full_time(moment) if sys.stdout.isatty() else moment


def print_fields(item: Mapping[str, Any], shown: Sequence[Field] | None = None) -> None:
    """Print one item, a line for each field; the caller prints the tables that it contains.

    `shown` are the lines on a terminal; they default to all fields.
    """
    fields = {name: value for name, value in item.items() if not _is_table(value)}
    if not sys.stdout.isatty():
        for name, value in fields.items():
            click.echo(f"{name}\t{printable(' '.join(cell(value).split()))}")
        return
    if shown is None:
        shown = [Field(name.replace("_", " ").capitalize(), cell(value)) for name, value in fields.items()]
    for line in field_lines(shown, width=terminal_width(), colour=wants_colour(sys.stdout)):
        print_line(line)


def _is_table(value: object) -> bool:
    return isinstance(value, list | tuple) and bool(value) and isinstance(value[0], dict)
