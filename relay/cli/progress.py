"""How far long work is: one line on a terminal, written over again and again, and gone at the end."""

import sys
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from typing import Any

import click

from relay.base.units import render_duration
from relay.cli.api_client import Daemon
from relay.cli.exit_codes import FAILED, INTERRUPTED, CommandError
from relay.cli.output import count


def show(text: str) -> None:
    """Write over the line of progress; "" clears it for what is said next."""
    if sys.stderr.isatty():
        click.echo(f"\r{text}\033[K", err=True, nl=False)


def pace(per_second: float, seconds_left: float | None) -> str:
    """Say how fast it goes, and how long it still takes.

    >>> pace(20.0, 3.2), pace(7.25, None)
    ('20/s, 3s left', '7.25/s')
    """
    eta = "" if seconds_left is None else f", {render_duration(round(seconds_left))} left"
    return f"{per_second:g}/s{eta}"


class Meter:
    """Tells the pace of something that was counted beforehand."""

    def __init__(self, total: int, noun: str) -> None:
        self._total = total
        self._noun = noun
        self._began = time.monotonic()

    def text(self, done: int) -> str:
        """Say how far it is, how fast, and how long it still takes."""
        seconds = time.monotonic() - self._began
        rate = done / seconds if seconds > 0 else 0.0
        left = max(0, self._total - done) / rate if rate else None
        so_far = f"{done:,} of {count(self._total, self._noun)}".replace(",", " ")
        return f"{so_far}, {pace(round(rate, 1), left)}"


def work(
    daemon: Daemon,
    *path: str,
    method: str = "POST",
    body: object = None,
    tell: Callable[[Mapping[str, Any]], str],
    stopped: str,
) -> Any:
    """Have the relay do long work, show how far it is, and return what came of it.

    Ctrl-C hangs up, which ends the work; `stopped` says what that means.

    Raises:
        CommandError: it failed, was interrupted, or the relay went away.
    """
    try:
        with closing(daemon.lines(method, *path, body=body)) as lines:
            for line in lines:
                if "result" in line:
                    return line["result"]
                if "error" in line:
                    raise CommandError(line["error"]["message"], hint=line["error"]["hint"], code=FAILED)
                show(tell(line["progress"]))
    except KeyboardInterrupt:
        raise CommandError(f"interrupted: {stopped}", code=INTERRUPTED) from None
    finally:
        show("")
    raise CommandError("the relay ended before it was through", hint="see its log; run the command again")
