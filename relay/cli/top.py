"""`relay top`."""

import os
import queue
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing, suppress
from datetime import datetime
from functools import partial
from typing import Any

import click

from relay.api.words import held_text
from relay.base.text import Colour, paint, wants_colour
from relay.base.units import render_duration
from relay.cli import screen
from relay.cli.api_client import Daemon, follow_stream
from relay.cli.endpoint import daemon_options
from relay.cli.full_screen import FullScreen
from relay.cli.main import INTERRUPTED, UNREACHABLE, CommandError
from relay.cli.options import json_option
from relay.cli.output import count, print_json, print_line, to_json
from relay.cli.screen import Column

STOPPED = "the daemon stopped; waiting for it to restart (Ctrl-C to quit)"

_RATES = ("events", "attempts", "delivered", "failed")
_PIPED_SOURCES = ("name", "paused", "events_per_second")
_PIPED_DESTINATIONS = (
    "name", "held", "pending", "in_flight", "delivered_per_second", "failed_per_second",
    "attempts_per_second", "circuit",
)  # fmt: skip
_UNLIMITED = 10_000  # columns of a pipe

_FIGURES = (
    ("Events", "events_per_second", "/s"), ("Delivered", "delivered_per_second", "/s"),
    ("Failed", "failed_per_second", "/s"), ("Backlog", "backlog", ""),
)  # fmt: skip
"""Labels, names and units of the figures that have a history on the screen."""

_OF_HISTORY = (
    ("sources", "events", "events_per_second", "/s"),
    ("destinations", "succeeded", "delivered_per_second", "/s"),
    ("destinations", "failed", "failed_per_second", "/s"), ("destinations", "pending", "backlog", ""),
)  # fmt: skip
"""Lists of `GET /api/history`, their figures, the same figures on the screen, and their units."""

_ROWS = {"events_per_second": "source", "delivered_per_second": "destination"}
"""Figures whose history is in the rows of the tables."""

_BARS = "▁▂▃▄▅▆▇█"
_GAP = "·"  # the daemon did not run
_STEPS = (1, 2, 5, 10)  # seconds of one bar
_REACH = 10  # seconds before a sample that its figures describe
_MOST_BARS = 60
_MINUTES = _STEPS[-1] * _MOST_BARS // 60
_MOST_SAMPLES = _STEPS[-1] * _MOST_BARS
_OF_ROW = 12  # bars in the row of a source or a destination
_BESIDE_BARS = 44  # columns of the texts beside the history
_LEAST_ROWS = 16  # a lower screen has no history


@click.command()
@click.option("--once", is_flag=True, help="Print one snapshot after a second, then exit; default in a pipe.")
@screen.utc_option
@json_option
@daemon_options
@click.pass_context
def top(ctx: click.Context, daemon: Daemon, *, once: bool, as_json: bool) -> None:
    """Live dashboard, refreshed every second.

    Example: relay top

    Keys: q quits, p pauses and continues, / filters sources and destinations by name, Up and Down scroll.
    Runs until q or Ctrl-C and reconnects after a restart of the daemon. --json prints one object per line.
    """
    try:
        if once or not (as_json or _has_screen()):
            _print_once(_snapshot(daemon), as_json=as_json)
        elif as_json:
            _print(daemon)
        else:
            _Dashboard().follow(daemon)
    except KeyboardInterrupt:
        ctx.exit(INTERRUPTED)


def _print_once(snapshot: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(snapshot)
    elif sys.stdout.isatty():
        view = View()
        view.add(snapshot)
        print_line("\n".join(frame(view, screen.terminal_width(), None)))
    else:
        print_line("\n".join(lines(snapshot)))


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


def _has_screen() -> bool:
    """Return whether stdout is a terminal that can be redrawn."""
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


class History:
    """Figures of the last minutes, by name."""

    def __init__(self) -> None:
        self._samples: dict[str, deque[tuple[float, float]]] = {}

    def add(self, name: str, at: float, value: float) -> None:
        """Add a figure; `at` is seconds since the epoch."""
        self._samples.setdefault(name, deque(maxlen=_MOST_SAMPLES)).append((at, value))

    def keep(self, names: Iterable[str]) -> None:
        """Drop all other names."""
        self._samples = {name: self._samples[name] for name in names if name in self._samples}

    def bars(self, name: str, width: int) -> tuple[str, float, int]:
        """Return a sparkline that ends now, its maximum, and the seconds that it covers.

        A bar is the mean of its seconds; "·" has no sample. The lowest bar is 0.
        """
        samples = self._samples.get(name)
        if not samples or width < 1:
            return "", 0.0, 0
        began, ended = samples[0][0], samples[-1][0]
        step = next((step for step in _STEPS if ended - began < step * (width - 1)), _STEPS[-1])
        sums: dict[int, tuple[float, int]] = {}
        for at, value in samples:
            total, number = sums.get(int(at // step), (0.0, 0))
            sums[int(at // step)] = (total + value, number + 1)
        last, first = int(ended // step), int(began // step)
        means: list[float | None] = []
        later = last
        for at in range(last, max(last - width + 1, first) - 1, -1):
            later = at if at in sums else later
            total, number = sums[later]
            means.append(total / number if (later - at) * step < _REACH else None)
        means.reverse()
        most = max((mean for mean in means if mean is not None), default=0.0)
        bars = "".join(_bar(mean, most) for mean in means).rjust(width)
        return bars, most, step * width


def _bar(value: float | None, most: float) -> str:
    """Return the bar of a value; a value above 0 is never as low as 0."""
    if value is None:
        return _GAP
    return _BARS[0] if value <= 0 or most <= 0 else _BARS[max(1, round(value / most * (len(_BARS) - 1)))]


class View:
    """The content of the screen: the latest snapshot, the history, and the operator's input."""

    def __init__(self) -> None:
        self.snapshot: dict[str, Any] = {}
        self.history = History()
        self.filter = ""
        self.is_typing = False  # the filter
        self.is_paused = False
        self.is_stopped = False  # the daemon
        self.has_keys = False
        self.offset = 0  # rows of the table of destinations above the screen
        self._waiting: deque[dict[str, Any]] = deque(maxlen=_MOST_SAMPLES)  # snapshots during a pause

    def add(self, snapshot: dict[str, Any]) -> None:
        """Take a snapshot; while paused, keep it for later."""
        self.is_stopped = False
        self._waiting.append(snapshot)
        if not self.is_paused:
            self._apply()

    def add_history(self, answer: Mapping[str, Any]) -> None:
        """Take the minutes before the first snapshot, an answer of `GET /api/history`."""
        step, until = answer["step_seconds"], datetime.fromisoformat(answer["until"]).timestamp()
        for kind, figure, total, unit in _OF_HISTORY:
            seconds = step if unit else 1.0
            rows = {item["name"]: item[figure] for item in answer[kind]}
            if total in _ROWS:
                for name, values in rows.items():
                    self._add_series(f"{_ROWS[total]} {name}", values, seconds, until, step)
            sums = [
                None if all(each is None for each in values) else sum(each or 0 for each in values)
                for values in zip(*rows.values(), strict=True)
            ]
            self._add_series(total, sums, seconds, until, step)

    def _add_series(
        self, name: str, values: Sequence[float | None], seconds: float, until: float, step: float
    ) -> None:
        for at, value in enumerate(values, 1 - len(values)):
            if value is not None:
                self.history.add(name, until + at * step, value / seconds)

    def _apply(self) -> None:
        while self._waiting:
            self.snapshot = self._waiting.popleft()
            at = datetime.fromisoformat(self.snapshot["at"]).timestamp()
            figures = {name: self.snapshot[name] for _, name, _ in _FIGURES}
            for name, noun in _ROWS.items():
                figures |= {f"{noun} {each['name']}": each[name] for each in self.snapshot[f"{noun}s"]}
            self.history.keep(figures)
            for name, value in figures.items():
                self.history.add(name, at, value)

    def press(self, key: str) -> bool:
        """React to a key; return False if it quits."""
        if self.is_typing:
            self._type(key)
        elif key == "q":
            return False
        elif key == "p":
            self.is_paused = not self.is_paused
            self._apply()
        elif key == "/":
            self.is_typing = True
        elif key == "\x1b":
            self.filter, self.offset = "", 0
        elif key in _MOVES:
            self.offset = max(0, self.offset + _MOVES[key])
        return True

    def _type(self, key: str) -> None:
        if key in ("\r", "\n"):
            self.is_typing = False
        elif key == "\x1b":
            self.filter, self.is_typing = "", False
        elif key in ("\x7f", "\b"):
            self.filter = self.filter[:-1]
        elif key == "\x15":  # Ctrl-U
            self.filter = ""
        elif len(key) == 1 and key.isprintable():
            self.filter += key
        self.offset = 0

    def matching(self, items: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Return the items whose names contain the filter."""
        return [each for each in items if self.filter.lower() in each["name"].lower()]


_MOVES = {"up": -1, "down": 1, "page up": -10, "page down": 10}


class _Dashboard:
    """Draws the view after each snapshot and each key. A thread reads the stream."""

    def __init__(self) -> None:
        self._view = View()
        self._news: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()

    def follow(self, daemon: Daemon) -> None:
        """Draw until the operator quits; raise the error that ends the stream."""
        with FullScreen() as full_screen:
            self._view.has_keys = full_screen.has_keys
            read = partial(self._read, daemon, full_screen.wake)
            threading.Thread(target=read, daemon=True).start()
            while True:
                for key in full_screen.wait():
                    if not self._view.press(key):
                        return
                self._take_news()
                full_screen.draw(partial(frame, self._view))

    def _take_news(self) -> None:
        while not self._news.empty():
            what, news = self._news.get()
            match what:
                case "top":
                    self._view.add(news)
                case "history":
                    self._view.add_history(news)
                case "stopped":
                    self._view.is_stopped = True
                case "failed":
                    raise news

    def _read(self, daemon: Daemon, wake: Callable[[], None]) -> None:
        """Read the stream, in a thread."""

        def tell(what: str, news: Any = None) -> None:
            self._news.put((what, news))
            wake()

        try:
            with suppress(CommandError):  # an older daemon; if it does not answer, the stream reports it
                tell("history", daemon.get("history", minutes=_MINUTES, periods=_MOST_BARS))
            with closing(follow_stream(daemon, "top", partial(tell, "stopped"), lambda: None)) as items:
                for what, item in items:
                    tell(what, item)
        except BaseException as error:  # noqa: BLE001 - the main thread raises it
            tell("failed", error)


# --- the content of the screen --------------------------------------------------------------------------


def frame(view: View, columns: int, rows: int | None) -> list[str]:
    """Return the lines of the screen; `rows` is None for all lines, without the line of keys."""
    colour = wants_colour(sys.stdout)
    stopped = [paint(STOPPED, "red" if colour else None)] if view.is_stopped else []
    if not view.snapshot:
        return stopped or ["connecting…"]
    head = [*stopped, *_head(view, columns, colour=colour, graphs=rows is None or rows >= _LEAST_ROWS)]
    sources = _rows(view, "source", view.snapshot["sources"])
    destinations = _rows(view, "destination", view.snapshot["destinations"])
    room = None if rows is None else max(4, rows - len(head) - 1 - (4 if sources and destinations else 2))
    if room is None:
        of_sources, offset = len(sources), 0
    else:
        if len(sources) + len(destinations) > room:  # trouble comes first; the order is stable otherwise
            destinations.sort(key=lambda each: each["held"] is None and not each["failed_per_second"])
        # Sources get a third of the rows, and those that destinations do not use.
        of_sources = min(len(sources), max(room - len(destinations), room // 3, 2))
        offset = min(view.offset, max(0, len(destinations) - (room - of_sources) + 1))
        view.offset = offset
    left = None if room is None else room - of_sources
    body = [
        *_table("source", _SOURCES, sources, columns, most=of_sources, colour=colour),
        *_table("destination", _DESTINATIONS, destinations, columns, most=left, offset=offset, colour=colour),
    ]
    if view.filter and not sources and not destinations:
        body = ["", f'no source or destination contains "{screen.one_line(view.filter)}"']
    if rows is None:
        return [*head, *body, *_errors(body, destinations, columns, colour=colour)]
    body = body[: rows - len(head) - 1]
    errors = _errors(body, destinations, columns, colour=colour)
    body += errors if len(errors) <= rows - len(head) - len(body) - 1 else []
    blank = [""] * (rows - len(head) - len(body) - 1)
    return [*head, *body, *blank, _keys(view, columns, colour=colour)]


def _head(view: View, columns: int, *, colour: bool, graphs: bool) -> list[str]:
    snapshot = view.snapshot
    ready = "ready" if snapshot["ready"] else f"not ready: {', '.join(snapshot['reasons'])}"
    state = paint(ready, ("green" if snapshot["ready"] else "red") if colour else None)
    [clock] = screen.clock_times([snapshot["at"]])
    title = f"hookferry {snapshot['version']}  up {screen.rough(snapshot['uptime_seconds'])}  "
    gap = columns - screen.width_of(title + ready + clock)
    lines_ = [f"{title}{state}{' ' * gap}{clock}" if gap > 1 else title + state]
    if not graphs:
        figures = [f"{label} {_figure(snapshot[name])}{unit}" for label, name, unit in _FIGURES]
        lines_.append("   ".join(figures))
    for label, name, unit in _FIGURES if graphs else ():
        value = snapshot[name]
        painted: Colour | None = "red" if name == "failed_per_second" and value and colour else None
        line = f"{label:<10}{_figure(value) + unit:>10}"
        bars, most, seconds = view.history.bars(name, _bars_for(columns))
        if bars:
            line += f"  {bars}  max {_figure(most if unit else round(most))} in {render_duration(seconds)}"
        lines_.append(paint(line, painted))
    commit = "-" if snapshot["commit_ms"] is None else f"{snapshot['commit_ms']:g} ms"
    workers = screen.cell(snapshot["workers"]) or "0"
    last = f"Workers {workers}   Commit {commit}   Loop lag {snapshot['loop_lag_ms']:g} ms"
    return [*lines_, last, *_nodes(snapshot, colour=colour)]


def _nodes(snapshot: Mapping[str, Any], *, colour: bool) -> list[str]:
    """Return lines about the other nodes of a cluster: their number, and a line for each problem."""
    nodes = snapshot.get("nodes", ())  # an older daemon has no nodes
    if not nodes:
        return []
    problems = []
    for node in nodes:
        name = screen.one_line(node["name"])
        if node.get("unable"):
            problems.append(f"{name} runs another version, so its figures are missing")
        elif not node["answers"]:
            problems.append(f"{name} does not answer, so its figures are missing")
        elif not node["ready"]:
            problems.append(f"{name} is not ready: {screen.one_line(', '.join(node['reasons']))}")
    text = f"Nodes {len(nodes) + 1}"
    first, *others = [paint(problem, "red" if colour else None) for problem in problems] or [""]
    return [f"{text}   {first}".rstrip(), *(f"{' ' * len(text)}   {other}" for other in others)]


def _bars_for(columns: int) -> int:
    """Return the number of bars for a terminal of this width, a multiple of 6: then 6 bars are a minute."""
    return min(_MOST_BARS, max(0, columns - _BESIDE_BARS) // 6 * 6)


def _rows(view: View, noun: str, items: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the matching sources or destinations with their history."""
    return [
        {**each, "history": view.history.bars(f"{noun} {each['name']}", _OF_ROW)[0]}
        for each in view.matching(items)
    ]


def _figure(value: float) -> str:
    rounded = round(value, 1)
    return screen.number_text(rounded if rounded % 1 else int(rounded))


def _rate(name: str, heading: str, *, rank: int = 0) -> Column:
    return Column(name, heading, screen.each(_figure), right=True, rank=rank)


def _last_error(destination: Mapping[str, Any]) -> str:
    if destination["last_error"] is None:
        return ""
    error = destination["last_error"].removeprefix("HTTP ")
    return f"{screen.ago(destination['last_error_at'])}: {error}"


def _state(destination: Mapping[str, Any]) -> str:
    """Return the state of a destination; an open circuit also shows while the relay probes."""
    is_open = destination["held"] is None and destination["circuit"] == "open"
    return "circuit open" if is_open else held_text(destination["held"])


_HISTORY = Column("history", "history", screen.each(str), right=True, rank=4)
_SOURCES = (
    screen.text("name", "source", least=20, long="middle"),
    Column("held", "state", screen.each(str), of=lambda each: "paused" if each["paused"] else "accepting"),
    _rate("events_per_second", "events/s"), _HISTORY._replace(rank=1),
)  # fmt: skip
_LAST_ERROR = Column("last_error", "last error", screen.each(str), least=16, wish=44, rank=1, of=_last_error)
_DESTINATIONS = (
    screen.text("name", "destination", least=20, wish=32, long="middle"),
    Column("held", "state", screen.each(str), of=_state), screen.number("pending"),
    _rate("delivered_per_second", "ok/s"), _rate("failed_per_second", "failed/s"),
    _LAST_ERROR,
    screen.number("in_flight", "in flight", rank=2), _HISTORY,
    _rate("attempts_per_second", "attempts/s", rank=3),
)  # fmt: skip


_ERRORS = (_DESTINATIONS[0], _LAST_ERROR._replace(rank=0))


def _errors(
    body: Sequence[str], destinations: Sequence[Mapping[str, Any]], columns: int, *, colour: bool
) -> list[str]:
    """Return a table of the latest errors, if the table of destinations is too narrow for them."""
    failed = [each for each in destinations if each["last_error"] is not None]
    if not failed or any(_LAST_ERROR.heading.upper() in line for line in body):
        return []
    return ["", *screen.table(_ERRORS, failed, width=columns, colour=colour)]


def _table(
    noun: str,
    shape: Sequence[Column],
    items: Sequence[Mapping[str, Any]],
    columns: int,
    *,
    most: int | None,
    offset: int = 0,
    colour: bool,
) -> list[str]:
    """Return a table after an empty line; the last line of a shortened table counts the hidden rows."""
    if not items:
        return []
    shown = items
    if most is not None and len(items) > most:
        shown = items[offset : offset + max(1, most - 1)]
    hidden = len(items) - len(shown)
    more = [f"… {count(hidden, noun)} more"] if hidden else []
    return ["", *screen.table(shape, shown, width=columns, colour=colour), *more]


def _keys(view: View, columns: int, *, colour: bool) -> str:
    """Return the last line of the screen; on a narrow screen, without the keys that do not fit."""
    if view.is_typing:
        return f"/{screen.one_line(view.filter)}█  Enter keeps the filter, Esc clears it"
    if not view.has_keys:
        return paint("Ctrl-C quits", "dim" if colour else None)
    notes = ["PAUSED"] if view.is_paused else []
    notes += [f"filter: {screen.one_line(view.filter)} (Esc clears it)"] if view.filter else []
    keys = ["q quit", "p continue" if view.is_paused else "p pause", "/ filter", "↑↓ scroll"]
    while len(keys) > 1 and screen.width_of("   ".join([*notes, *keys])) > columns:
        keys.pop()
    painted = [*(paint(note, "yellow" if colour else None) for note in notes)]
    return "   ".join([*painted, paint("   ".join(keys), "dim" if colour else None)])


# --- in a pipe ------------------------------------------------------------------------------------------


def lines(snapshot: dict[str, Any]) -> list[str]:
    """Return the lines of a snapshot for a pipe."""
    colour = wants_colour(sys.stdout)
    ready = "ready" if snapshot["ready"] else f"not ready: {', '.join(snapshot['reasons'])}"
    if colour:
        ready = paint(ready, "green" if snapshot["ready"] else "red")
    workers = screen.cell(snapshot["workers"]) or "0"
    commit = "-" if snapshot["commit_ms"] is None else f"{snapshot['commit_ms']:g} ms"
    rates = ", ".join(f"{snapshot[f'{each}_per_second']:g} {each}" for each in _RATES)
    return [
        f"hookferry {snapshot['version']}, up {render_duration(snapshot['uptime_seconds'])}, {ready}",
        f"backlog: {count(snapshot['backlog'], 'delivery')}; per second: {rates}",
        f"workers: {workers}; commit: {commit}; loop lag: {snapshot['loop_lag_ms']:g} ms",
        *_nodes(snapshot, colour=colour),
        *_piped("source", _PIPED_SOURCES, snapshot["sources"], colour=colour),
        *_piped("destination", _PIPED_DESTINATIONS, snapshot["destinations"], colour=colour),
    ]


def _piped(noun: str, names: Sequence[str], items: Sequence[Mapping[str, Any]], *, colour: bool) -> list[str]:
    if not items:
        return []
    shape = [Column(names[0], noun, screen.each(str))]
    for name in names[1:]:
        heading = name.replace("_per_second", "/s").replace("_", " ")
        shape.append(Column(name, heading, screen.each(_piped_cell)))
    return ["", *screen.table(shape, items, width=_UNLIMITED, colour=colour)]


def _piped_cell(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else screen.cell(value)
