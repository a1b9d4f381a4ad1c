"""Completion of names and ids in the shell: the daemon knows them. Without a daemon, nothing is completed."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import click
from click.shell_completion import CompletionItem

TIMEOUT = 1.0
"""Seconds that a press of TAB may take."""

Completer = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def complete(kind: str) -> Completer:
    """Return a `shell_complete` for a kind of `GET /api/names`, such as "destination"."""

    def names(context: click.Context, _parameter: click.Parameter, typed: str) -> list[CompletionItem]:
        # Imported here, because only a press of TAB needs it. A message would destroy the command line.
        from relay.cli.api_client import daemon_at  # noqa: PLC0415 - see above

        given: dict[str, Any] = context.params
        with suppress(Exception):
            where = (given.get(name) for name in ("config", "socket_file", "url", "token_file"))
            daemon = daemon_at(*where, timeout=TIMEOUT)
            source = given.get("source") if kind == "worker" else None
            found = daemon.get("names", kind=kind, prefix=typed, source=source)["items"]
            return [CompletionItem(each["name"], help=each["about"] or None) for each in found]
        return []

    return names


def completer_of(route: str, placeholder: str) -> Completer:
    """Return the completer of a placeholder in a route such as "POST destinations/{name}/pause"."""
    if placeholder != "name":
        return complete(placeholder)
    noun = route.partition(" ")[2].partition("/")[0]
    return complete(noun.removesuffix("s"))
