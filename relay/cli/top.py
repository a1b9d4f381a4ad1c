"""`relay top`."""

import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any

import click

from relay.base.text import paint, wants_colour
from relay.base.units import render_duration
from relay.cli.api_client import Daemon, follow_stream
from relay.cli.endpoint import daemon_options
from relay.cli.main import INTERRUPTED, UNREACHABLE, CommandError
from relay.cli.options import json_option
from relay.cli.output import count, print_json, print_line, to_json
from relay.cli.screen import cell, clip, number, table, terminal_width, text, word

STOPPED = "the daemon stopped; waiting for it to restart (Ctrl-C to quit)"

_RATES = ("events", "attempts", "delivered", "failed")
_SOURCES = ("name", "paused", "events_per_second")
_DESTINATIONS = (
    "name", "held", "pending", "in_flight", "delivered_per_second", "failed_per_second",
    "attempts_per_second", "circuit",
)  # fmt: skip
"""The most important columns are on the left, because a narrow terminal cuts off the right ones."""

_ENTER = "\x1b[?1049h\x1b[?25l"  # alternate screen, hidden cursor
_LEAVE = "\x1b[?25h\x1b[?1049l"
_HOME, _END_OF_LINE, _BELOW = "\x1b[H", "\x1b[K", "\x1b[J"
_UNLIMITED = 10_000  # columns of a pipe
_WORDS = ("held", "circuit", "paused")


@click.command()
@click.option("--once", is_flag=True, help="Print one snapshot after a second, then exit; default in a pipe.")
@json_option
@daemon_options
@click.pass_context
def top(ctx: click.Context, daemon: Daemon, *, once: bool, as_json: bool) -> None:
    """Live dashboard, refreshed every second.

    Example: relay top

    Runs until Ctrl-C and reconnects after a restart of the daemon. --json prints one object per line.
    """
    try:
        if once or not (as_json or _has_screen()):
            snapshot = _snapshot(daemon)
            print_json(snapshot) if as_json else print_line("\n".join(lines(snapshot)))
        elif as_json:
            _print(daemon)
        else:
            with _screen() as screen:
                _Dashboard(screen).follow(daemon)
    except KeyboardInterrupt:
        ctx.exit(INTERRUPTED)


def _snapshot(daemon: Daemon) -> dict[str, Any]:
    with daemon.follow("top") as stream:
        for what, snapshot in stream:
            if what == "top":
                return dict(snapshot)
    raise CommandError("the daemon stopped", hint="start it and run the command again", code=UNREACHABLE)


def _print(daemon: Daemon) -> None:
    def report() -> None:
        click.echo(STOPPED, err=True)

    with closing(follow_stream(daemon, "top", report, lambda: None)) as items:
        for what, snapshot in items:
            if what == "top":
                click.echo(to_json(snapshot))


class _Screen:
    """A terminal screen that is redrawn in place."""

    def draw(self, lines: Callable[[int], list[str]]) -> None:
        """Draw the lines that `lines` returns for the number of rows; cut off the excess."""
        columns, rows = shutil.get_terminal_size()
        shown = [clip(line, columns) + _END_OF_LINE for line in lines(rows)[:rows]]
        click.echo(_HOME + "\n".join(shown) + _BELOW, nl=False, color=True)


class _Dashboard:
    """Shows the latest snapshot on a screen."""

    def __init__(self, screen: _Screen) -> None:
        self._screen = screen
        self._latest: dict[str, Any] = {}

    def follow(self, daemon: Daemon) -> None:
        """Draw every snapshot."""
        with closing(follow_stream(daemon, "top", self._draw_stopped, lambda: None)) as items:
            for what, snapshot in items:
                if what == "top":
                    self._latest = snapshot
                    self._screen.draw(lambda rows: lines(self._latest, rows))

    def _draw_stopped(self) -> None:
        self._screen.draw(lambda rows: [STOPPED, *(lines(self._latest, rows - 1) if self._latest else ())])


def lines(snapshot: dict[str, Any], rows: int | None = None) -> list[str]:
    """Return the lines of a snapshot for a screen with this number of rows, all lines for None."""
    colour = wants_colour(sys.stdout)
    ready = "ready" if snapshot["ready"] else f"not ready: {', '.join(snapshot['reasons'])}"
    if colour:
        ready = paint(ready, "green" if snapshot["ready"] else "red")
    workers = cell(snapshot["workers"]) or "0"
    commit = "-" if snapshot["commit_ms"] is None else f"{snapshot['commit_ms']:g} ms"
    rates = ", ".join(f"{snapshot[f'{each}_per_second']:g} {each}" for each in _RATES)
    head = [
        f"hookferry {snapshot['version']}, up {render_duration(snapshot['uptime_seconds'])}, {ready}",
        f"backlog: {count(snapshot['backlog'], 'delivery')}; per second: {rates}",
        f"workers: {workers}; commit: {commit}; loop lag: {snapshot['loop_lag_ms']:g} ms",
    ]
    sources, destinations = snapshot["sources"], snapshot["destinations"]
    room = len(sources) + len(destinations) if rows is None else max(2, rows - len(head) - 4)
    if room < len(sources) + len(destinations):
        sources = sorted(sources, key=lambda each: -each["events_per_second"])
        destinations = sorted(destinations, key=lambda each: (each["held"] is None, -each["pending"]))
    most = max(
        room - len(destinations), room // 3
    )  # sources; they also get rows that destinations do not need
    shown = min(len(sources), most)
    return [
        *head,
        *_table("source", _SOURCES, sources, shown, colour=colour),
        *_table("destination", _DESTINATIONS, destinations, room - shown, colour=colour),
    ]


def _table(
    noun: str, columns: Sequence[str], items: Sequence[dict[str, Any]], most: int, *, colour: bool
) -> list[str]:
    """Return a table after an empty line; the last line of a shortened table counts the hidden rows."""
    if not items:
        return []
    shown = items if len(items) <= most else items[: max(1, most) - 1]
    shape = [text("name", noun, least=16, long="middle")]
    for name in columns[1:]:
        heading = name.replace("_per_second", "/s").replace("_", " ")
        shape.append(word(name, heading) if name in _WORDS else number(name, heading, rank=len(shape)))
    hidden = len(items) - len(shown)
    more = [f"… and {count(hidden, noun)} more"] if hidden else []
    return [
        "",
        *table(shape, shown, width=terminal_width() if sys.stdout.isatty() else _UNLIMITED, colour=colour),
        *more,
    ]


def _has_screen() -> bool:
    """Return whether stdout is a terminal that can be redrawn."""
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


@contextmanager
def _screen() -> Iterator[_Screen]:
    """Take over the terminal, and restore it at the end of the block, also on SIGTERM."""
    before = signal.signal(signal.SIGTERM, _exit)
    try:
        click.echo(_ENTER, nl=False, color=True)
        yield _Screen()
    finally:
        click.echo(_LEAVE, nl=False, color=True)
        signal.signal(signal.SIGTERM, before)


def _exit(number: int, _frame: object) -> None:
    raise SystemExit(128 + number)  # the code that shells use
