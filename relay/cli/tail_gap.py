"""What a command that follows did not hear while the relay was away."""

import time
from fnmatch import fnmatchcase
from typing import Any

import click

from relay.base.clock import SECOND, rfc3339
from relay.base.units import render_duration
from relay.cli.api_client import Daemon
from relay.cli.exit_codes import CommandError
from relay.cli.output import count

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
