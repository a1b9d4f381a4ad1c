"""Following the relay over its restarts."""

import time
from collections.abc import Callable, Generator
from typing import Any

from relay.cli.api_client import Daemon
from relay.cli.exit_codes import FAILED, UNREACHABLE, CommandError
from relay.cli.stream import Stream

AGAIN = 0.5
"""Seconds between tries to reach a relay that was there before."""


def live(
    daemon: Daemon, what: str, away: Callable[[], None], back: Callable[[], None], **query: object
) -> Generator[tuple[str, Any], None, None]:
    """Yield what a stream says; `away` is called whenever it has ended, `back` when it goes on.

    Raises:
        CommandError: the relay was not there to begin with, or does not allow it.
    """
    stream = daemon.follow(what, **query)
    while True:
        with stream:
            yield from stream
        away()
        stream = _again(daemon, what, query)
        back()


def _again(daemon: Daemon, what: str, query: dict[str, object]) -> Stream:
    while True:
        try:
            return daemon.follow(what, **query)
        except CommandError as error:
            # One that starts or stops, or has no room for the moment, will have it later.
            if error.code not in (UNREACHABLE, FAILED):
                raise
        time.sleep(AGAIN)
