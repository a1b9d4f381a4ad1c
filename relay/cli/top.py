"""`relay top`."""

import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any

import click

from relay.base.text import paint, printable, wants_colour
from relay.base.units import render_duration
from relay.cli.api_client import Daemon, daemon_options, live
from relay.cli.exit_codes import INTERRUPTED, UNREACHABLE, CommandError
from relay.cli.options import json_option
from relay.cli.output import cell, count, print_json, say, table_lines, to_json

_ENTER = "\x1b[?1049h\x1b[?25l"  # a screen of our own, without a cursor
_LEAVE = "\x1b[?25h\x1b[?1049l"
_HOME, _END_OF_LINE, _BELOW = "\x1b[H", "\x1b[K", "\x1b[J"
_PIECES = re.compile(r"\x1b\[[0-9;]*m|.")


class Screen:
    """Shows lines, as many and as much of them as there is room for."""

    def draw(self, lines: Callable[[int], list[str]]) -> None:
        """Draw what `lines` makes for a number of rows."""
        columns, rows = shutil.get_terminal_size()
        shown = [clip(line, columns) + _END_OF_LINE for line in lines(rows)[:rows]]
        click.echo(_HOME + "\n".join(shown) + _BELOW, nl=False, color=True)


def is_there() -> bool:
    """Say whether there is a terminal that can be drawn on."""
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


@contextmanager
def screen() -> Iterator[Screen]:
    """Take the terminal over, until the block ends however it does."""
    before = signal.signal(signal.SIGTERM, _end)
    try:
        click.echo(_ENTER, nl=False, color=True)
        yield Screen()
    finally:
        click.echo(_LEAVE, nl=False, color=True)
        signal.signal(signal.SIGTERM, before)


def _end(number: int, _frame: object) -> None:
    raise SystemExit(128 + number)  # as shells have it


def clip(line: str, width: int) -> str:
    r"""Cut a line that may be painted; what paints it takes no room.

    >>> clip("\x1b[31mdead\x1b[0m, and more", 6)
    '\x1b[31mdead\x1b[0m, '
    """
    kept, room = [], width
    for piece in _PIECES.findall(line):
        if not piece.startswith("\x1b"):
            room -= 1
        elif room < 0:
            kept.append(piece)
            continue
        if room >= 0:
            kept.append(piece)
    return "".join(kept)


GONE = "the relay has gone; waiting for it to come back, Ctrl-C ends"

_RATES = ("events", "attempts", "delivered", "failed")
_SOURCES = ("name", "paused", "events_per_second")
_DESTINATIONS = (
    "name", "held", "pending", "in_flight", "delivered_per_second", "failed_per_second",
    "attempts_per_second", "circuit",
)  # fmt: skip
"""The less a column matters, the further right it is: that is what a narrow terminal cuts off."""


@click.command()
@click.option("--once", is_flag=True, help="One look, which takes a second, then end; as when piped.")
@json_option
@daemon_options
@click.pass_context
def top(ctx: click.Context, daemon: Daemon, *, once: bool, as_json: bool) -> None:
    """Show on one screen how it goes, anew every second.

    Example: relay top

    Goes on until Ctrl-C, and over restarts of the relay. With --json, one object a line.
    """
    try:
        if once or not (as_json or is_there()):
            told = _look(daemon)
            print_json(told) if as_json else say("\n".join(lines(told)))
        elif as_json:
            _print(daemon)
        else:
            with screen() as drawn:
                _View(drawn).follow(daemon)
    except KeyboardInterrupt:
        ctx.exit(INTERRUPTED)


def _look(daemon: Daemon) -> dict[str, Any]:
    with daemon.follow("top") as stream:
        for what, told in stream:
            if what == "top":
                return dict(told)
    raise CommandError("the relay has gone", hint="start it, and look again", code=UNREACHABLE)


def _print(daemon: Daemon) -> None:
    def say_that_it_has_gone() -> None:
        click.echo(GONE, err=True)

    with closing(live(daemon, "top", say_that_it_has_gone, lambda: None)) as looks:
        for what, told in looks:
            if what == "top":
                click.echo(to_json(told))


class _View:
    """The latest look on a screen."""

    def __init__(self, drawn: Screen) -> None:
        self._drawn = drawn
        self._latest: dict[str, Any] = {}

    def follow(self, daemon: Daemon) -> None:
        """Draw every look."""
        with closing(live(daemon, "top", self._say_that_it_has_gone, lambda: None)) as looks:
            for what, told in looks:
                if what == "top":
                    self._latest = told
                    self._drawn.draw(lambda rows: lines(self._latest, rows))

    def _say_that_it_has_gone(self) -> None:
        self._drawn.draw(lambda rows: [GONE, *(lines(self._latest, rows - 1) if self._latest else ())])


def lines(told: dict[str, Any], rows: int | None = None) -> list[str]:
    """Return what one look says, for a screen of so many rows; None: as many as it takes."""
    colour = wants_colour(sys.stdout)
    ready = "ready" if told["ready"] else f"not ready: {', '.join(told['reasons'])}"
    if colour:
        ready = paint(ready, "green" if told["ready"] else "red")
    commit = "none" if told["commit_ms"] is None else f"{told['commit_ms']:g} ms"
    rates = ", ".join(f"{told[f'{each}_per_second']:g} {each}" for each in _RATES)
    head = [
        f"hookferry {told['version']}, up {render_duration(told['uptime_seconds'])}, {ready}",
        f"backlog: {count(told['backlog'], 'delivery')}; per second: {rates}",
        f"workers: {cell(told['workers']) or 'none'}; commit: {commit}; loop lag: {told['loop_lag_ms']:g} ms",
    ]
    sources, destinations = told["sources"], told["destinations"]
    room = len(sources) + len(destinations) if rows is None else max(2, rows - len(head) - 4)
    if room < len(sources) + len(destinations):
        sources = sorted(sources, key=lambda each: -each["events_per_second"])
        destinations = sorted(destinations, key=lambda each: (each["held"] is None, -each["pending"]))
    most = max(room - len(destinations), room // 3)  # of sources; the others' room is theirs where it is free
    shown = min(len(sources), most)
    return [
        *head,
        *_table("source", _SOURCES, sources, shown, colour=colour),
        *_table("destination", _DESTINATIONS, destinations, room - shown, colour=colour),
    ]


def _table(
    noun: str, columns: Sequence[str], items: Sequence[dict[str, Any]], most: int, *, colour: bool
) -> list[str]:
    """Return a table after an empty line; where it is cut, its last line says how much is missing."""
    if not items:
        return []
    shown = items if len(items) <= most else items[: max(1, most) - 1]
    rows = [[printable(_cell(each[name])) for name in columns] for each in shown]
    headings = [noun, *(name.replace("_per_second", "/s").replace("_", " ") for name in columns[1:])]
    missing = len(items) - len(shown)
    more = [f"… and {count(missing, noun)} more"] if missing else []
    return ["", *table_lines(headings, rows, colour=colour), *more]


def _cell(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else cell(value)
