"""`relay tail`."""

import sys
import time
from contextlib import closing
from fnmatch import fnmatchcase
from typing import Any

import click

from relay.base.clock import SECOND, rfc3339
from relay.base.text import Colour, paint, printable, wants_colour
from relay.base.units import render_duration
from relay.cli import screen
from relay.cli.api_client import Daemon, follow_stream
from relay.cli.endpoint import daemon_options
from relay.cli.main import INTERRUPTED, CommandError, Number
from relay.cli.options import filter_options, json_option
from relay.cli.output import count, print_line, to_json
from relay.cli.screen import utc_option

COLUMNS = (
    "what", "type", "source", "subject", "size", "destination", "attempt", "result", "status", "duration_ms",
    "state", "next_attempt_at", "error", "event_id", "delivery_id",
)  # fmt: skip
"""Columns of a piped line after the time. A column that an item does not have is empty."""

WIDE = 120
"""On a terminal of at least this width, times have milliseconds."""

_LEAST_NAME, _MOST_NAME = 22, 48  # columns of the type or the destination

MOST_IDS = 10_000
"""Latest ids from which a further id must differ."""

MOST_LINES = 40
"""Lines of a payload on a terminal."""

MAX_COUNTED = 500
"""Maximum number of missed events that one list request can count."""


@click.command()
@filter_options("tail")
@click.option("--failed", is_flag=True, help="Only failed attempts.")
@click.option("--payload", is_flag=True, help="Print the payloads of events, up to 16 KiB each.")
@click.option("--limit", type=Number(min=1), help="Stop after this many items.")
@utc_option
@json_option
@daemon_options
@click.pass_context
def tail(
    ctx: click.Context,
    /,
    daemon: Daemon,
    *,
    failed: bool,
    payload: bool,
    limit: int | None,
    as_json: bool,
    **filters: str | None,
) -> None:
    """Follow events and attempts as they happen.

    Example: relay tail --source adorn --failed --since 1h

    --since prints stored events and attempts first, then new ones, without a gap.

    Runs until Ctrl-C. After a restart of the daemon, it reconnects and prints the number of missed events
    on stderr. In a pipe, the output is tab-separated lines; --json prints one object per line.
    """
    only_attempts = failed or filters["destination"] is not None
    gap = Gap(daemon, source=filters["source"], pattern=filters["type"], events=not only_attempts)
    query: dict[str, Any] = {**filters, "failed": 1 if failed else None, "payload": 1 if payload else None}
    left, ids = limit, ShortIds()
    try:
        with closing(follow_stream(daemon, "tail", gap.start, gap.end, **query)) as items:
            for what, item in items:
                _show(what, item, ids, as_json=as_json)
                if what == "event":
                    gap.latest = item["received_at"]
                if left is not None and what in ("event", "attempt"):
                    left -= 1
                    if not left:
                        break
    except KeyboardInterrupt:
        ctx.exit(INTERRUPTED)


class ShortIds:
    """Shortens ids so that they differ from the latest others."""

    def __init__(self) -> None:
        self._known: dict[str, str] = {}  # the whole ids by their short ones, oldest first

    def of(self, id_: str) -> str:
        """Return an id shortened to 16 hex digits, or to more if a different id is shown in this way."""
        short = id_
        for length in range(screen.UNIQUE_DIGITS, len(id_)):
            [short] = screen.short_ids([id_], length)
            if self._known.setdefault(short, id_) == id_:
                break
        if len(self._known) > MOST_IDS:
            del self._known[next(iter(self._known))]
        return short


def _show(what: str, item: dict[str, Any], ids: ShortIds, *, as_json: bool) -> None:
    if as_json:
        click.echo(to_json({"what": what, **item}))
        return
    if what == "lost":
        click.echo(f"dropped {count(item['count'], 'item')}: the output is slower than the events", err=True)
        return
    if what == "silent":
        reasons = ((item["nodes"], "no answer from"), (item.get("unable", ()), "another version runs on"))
        causes = [f"{why} {', '.join(map(screen.one_line, names))}" for names, why in reasons if names]
        missing = f"{'; '.join(causes)}: their events and attempts are missing"
        click.echo(missing if causes else "all nodes answer again", err=True)
        return
    if sys.stdout.isatty():
        print_line(line_for_people(what, item, screen.terminal_width(), ids))
        for line in screen.payload_lines(item.get("payload", ""), MOST_LINES):
            print_line(f"  {line}")
        return
    colour = _colour(what, item) if wants_colour(sys.stdout) else None
    print_line(paint(_for_programs(what, item), colour))


def _for_programs(what: str, item: dict[str, Any]) -> str:
    values = {**item, "what": what}
    if what == "event":
        values["event_id"] = item["id"]
    time_ = item["received_at" if what == "event" else "started_at"]
    columns = COLUMNS if "payload" not in item else (*COLUMNS, "payload")
    cells = [time_, *(screen.cell(values.get(name)) for name in columns)]
    return "\t".join(printable(" ".join(text.split())) for text in cells)


def line_for_people(what: str, item: dict[str, Any], width: int, ids: ShortIds) -> str:
    """Return the line of an event or an attempt for a terminal: time, event, and what happened.

    An event and its attempts show the same id, so that readers can match them.
    """
    began, id_ = (
        (item["received_at"], item["id"])
        if what == "event"
        else (item["started_at"], item["event_id"] or item["delivery_id"])
    )
    [clock] = screen.clock_times([began], fraction=width >= WIDE)
    head = f"{clock}  {ids.of(id_)}  "
    room = max(width - screen.width_of(head), 0)
    name_room = min(max(room * 9 // 20, _LEAST_NAME), _MOST_NAME)
    if what == "event":
        subject, size = screen.one_line(item["subject"] or ""), screen.size_text(item["size"])
        name = screen.one_line(item["type"])
        detail = f"{screen.cut(subject, room - name_room - 4 - len(size))}, {size}" if subject else size
    else:
        name = f"→ {screen.one_line(item['destination'])}"
        detail = screen.one_line(_outcome(item))
    name = screen.cut(name, name_room, "middle")
    padded = name + " " * (name_room - screen.width_of(name))
    detail = screen.cut(detail, room - name_room - 2)
    return head + padded + "  " + (paint(detail, _colour(what, item)) if wants_colour(sys.stdout) else detail)


def _outcome(attempt: dict[str, Any]) -> str:
    """Return the result of an attempt and its consequence for the delivery."""
    result = screen.result_text(attempt["status"], attempt["error"]) or attempt["result"]
    took, number = screen.milliseconds(attempt["duration_ms"]), attempt["attempt"]
    nth = "" if number in (1, None) else f", attempt {number}"
    if attempt["state"] == "delivered":
        return f"{result} in {took}{nth}"
    if attempt["next_attempt_at"] is not None:
        return f"retry {screen.due(attempt['next_attempt_at'])}: {result}, {took}{nth}"
    return f"{attempt['state'] or 'failed'}: {result}, {took}{nth}"


def _colour(what: str, item: dict[str, Any]) -> Colour | None:
    """Return the colour of an attempt: yellow if it is retried, else the colour of the delivery's state."""
    if what == "event":
        return None
    if item["state"] is None:  # of a stored attempt that failed
        return "yellow"
    return "yellow" if item["state"] == "pending" else screen.colour_of("state", item["state"])


class Gap:
    """Reports on stderr when the daemon stops and returns, and how many events it received in between."""

    def __init__(self, daemon: Daemon, *, source: str | None, pattern: str | None, events: bool) -> None:
        """Take the filters of the followed events; `events` is False if only attempts are followed."""
        self.latest = ""  # `received_at` of the latest event that was shown
        self._daemon = daemon
        self._source = source
        self._pattern = pattern
        self._events = events
        self._since = 0

    def start(self) -> None:
        """Report that the daemon stopped."""
        self._since = time.time_ns() // 1000
        click.echo("the daemon stopped; waiting for it to restart (Ctrl-C to quit)", err=True)

    def end(self) -> None:
        """Report that the daemon is back, and the missed events."""
        seconds = (time.time_ns() // 1000 - self._since) / SECOND
        away = render_duration(max(1, round(seconds)))
        click.echo(f"reconnected after {away}; {self._missed()}", err=True)

    def _missed(self) -> str:
        since = rfc3339(self._since)
        if not self._events:
            return f"attempts since {since} were missed: relay deliveries list"
        command = f"relay events list --since {since}" + (f" --source {self._source}" if self._source else "")
        try:
            number = self._count(since)
        except CommandError:  # the daemon stopped again
            return f"list the missed events: {command}"
        if not number:
            return "no event was missed"
        missed = f"{MAX_COUNTED} or more events" if number == MAX_COUNTED else count(number, "event")
        return f"missed {missed}: {command}"

    def _count(self, since: str) -> int:
        page: dict[str, Any] = self._daemon.get("events", source=self._source, since=since, limit=MAX_COUNTED)
        return sum(
            each["received_at"] > self.latest
            and (self._pattern is None or fnmatchcase(each["type"], self._pattern))
            for each in page["items"]
        )
