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
from relay.cli.api_client import Daemon, daemon_options, live
from relay.cli.exit_codes import INTERRUPTED, CommandError
from relay.cli.options import filter_options, json_option
from relay.cli.output import cell, colour_of, count, say, to_json

COLUMNS = (
    "what", "type", "source", "subject", "size", "destination", "attempt", "result", "status", "duration_ms",
    "state", "next_attempt_at", "error", "event_id", "delivery_id",
)  # fmt: skip
"""Of a piped line, after the time; what an item does not have stays empty."""


@click.command()
@filter_options("source", "destination")
@click.option("--type", help='Of this full type, or a pattern such as "adorn.image.*".')
@click.option("--failed", is_flag=True, help="Only attempts that failed.")
@click.option("--limit", type=click.IntRange(min=1), help="End after so many.")
@json_option
@daemon_options
@click.pass_context
def tail(
    ctx: click.Context,
    /,
    daemon: Daemon,
    *,
    failed: bool,
    limit: int | None,
    as_json: bool,
    **filters: str | None,
) -> None:
    """Follow events and attempts as they happen.

    Example: relay tail --source adorn --failed

    Goes on until Ctrl-C, and over restarts of the relay: then it says on stderr what it missed. When
    piped, a line is tab-separated; with --json, an object.
    """
    only_attempts = failed or filters["destination"] is not None
    missed = Missed(daemon, source=filters["source"], pattern=filters["type"], events=not only_attempts)
    query = {**filters, "failed": 1 if failed else None}
    left = limit
    try:
        with closing(live(daemon, "tail", missed.away, missed.back, **query)) as told:
            for what, item in told:
                _show(what, item, as_json=as_json)
                if what == "event":
                    missed.latest = item["received_at"]
                if left is not None and what != "lost":
                    left -= 1
                    if not left:
                        break
    except KeyboardInterrupt:
        ctx.exit(INTERRUPTED)


def _show(what: str, item: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        click.echo(to_json({"what": what, **item}))
        return
    if what == "lost":
        click.echo(f"lost {count(item['count'], 'item')}: they came faster than they were taken", err=True)
        return
    colour = _colour(what, item) if wants_colour(sys.stdout) else None
    say(paint(_for_people(what, item) if sys.stdout.isatty() else _for_programs(what, item), colour))


def _for_programs(what: str, item: dict[str, Any]) -> str:
    told = {**item, "what": what}
    if what == "event":
        told["event_id"] = item["id"]
    cells = [item["received_at" if what == "event" else "started_at"], *(cell(told.get(c)) for c in COLUMNS)]
    return "\t".join(printable(" ".join(text.split())) for text in cells)


def _for_people(what: str, item: dict[str, Any]) -> str:
    if what == "event":
        about = f" about {item['subject']}" if item["subject"] else ""
        return printable(f"{item['received_at']}  {item['type']}{about}, {item['size']} B  {item['id']}")
    result = item["result"] if item["status"] is None else f"{item['status']}"
    then = item["state"]
    if item["next_attempt_at"] is not None:
        then = f"again at {item['next_attempt_at']}"
    elif item["reason"] is not None:
        then = f"{then}: {item['reason']}"
    error = f" ({item['error']})" if item["error"] else ""
    return printable(
        f"{item['started_at']}  {item['type'] or 'an event that is gone'} to {item['destination']},"
        f" attempt {item['attempt']}: {result} after {item['duration_ms']:.0f} ms{error}, {then}"
        f"  {item['delivery_id']}"
    )


def _colour(what: str, item: dict[str, Any]) -> Colour | None:
    """Paint an attempt by what it came to: a failed one that will be made again is a warning."""
    if what == "event":
        return None
    return "yellow" if item["state"] == "pending" else colour_of("state", item["state"])


MOST = 500
"""Events that one look into the list can count."""


class Missed:
    """Says on stderr when the relay has gone, when it is back, and what came in meanwhile."""

    def __init__(self, daemon: Daemon, *, source: str | None, pattern: str | None, events: bool) -> None:
        """Take which events would have been heard; not `events`: none, as only attempts are followed."""
        self.latest = ""  # when the latest event that was heard came in, as the API says it
        self._daemon = daemon
        self._source = source
        self._pattern = pattern
        self._events = events
        self._since = 0

    def away(self) -> None:
        """Note that nothing is heard any more."""
        self._since = time.time_ns() // 1000
        click.echo("the relay has gone; waiting for it to come back, Ctrl-C ends", err=True)

    def back(self) -> None:
        """Tell what was missed."""
        seconds = (time.time_ns() // 1000 - self._since) / SECOND
        click.echo(f"it is back after {render_duration(max(1, round(seconds)))}; {self._told()}", err=True)

    def _told(self) -> str:
        since = rfc3339(self._since)
        if not self._events:
            return f"attempts made since {since} were missed: relay deliveries list"
        how = f"relay events list --since {since}" + (f" --source {self._source}" if self._source else "")
        try:
            number = self._count(since)
        except CommandError:  # it has gone again
            return f"what came in meanwhile: {how}"
        if not number:
            return "no event came in meanwhile"
        return f"missed {f'{MOST} events or more' if number == MOST else count(number, 'event')}: {how}"

    def _count(self, since: str) -> int:
        page: dict[str, Any] = self._daemon.get("events", source=self._source, since=since, limit=MOST)
        return sum(
            each["received_at"] > self.latest
            and (self._pattern is None or fnmatchcase(each["type"], self._pattern))
            for each in page["items"]
        )
