"""Operations on many events or deliveries: select them, count, confirm, and follow the progress."""

import json
import sys
import time
from collections.abc import Mapping
from typing import Any, Literal, Protocol

import click

from relay.cli.api_client import Daemon
from relay.cli.destinations import print_holds
from relay.cli.main import BATCH, FAILED, INTERRUPTED, NOTHING, CommandError
from relay.cli.output import count, pace, print_json, show_progress

Kind = Literal["events", "deliveries", "attempts", "refused", "audit"]

NOUNS: Mapping[Kind, str] = {
    "events": "event", "deliveries": "delivery", "attempts": "attempt", "refused": "refused request",
    "audit": "change",
}  # fmt: skip
POLL_EVERY = 0.2
"""Seconds between two requests for a replay's progress."""

dry_run_option = click.option("--dry-run", is_flag=True, help="Only print the count.")
yes_option = click.option("-y", "--yes", is_flag=True, help="Do not ask for confirmation.")


class Lists(Protocol):
    """A source of list pages: the running daemon or a database file."""

    def get(self, kind: str, /, **query: Any) -> Any:
        """Return a page."""
        ...


def as_query(filters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the filters that are set, as query parameters; conditions become JSON."""
    given = {name: value for name, value in filters.items() if value is not None}
    return given | ({"where": json.dumps(given["where"])} if "where" in given else {})


def gather(lists: Lists, kind: Kind, *, limit: int, cursor: str | None, **query: Any) -> dict[str, Any]:
    """Return `limit` rows of a list. Follows short pages, which a search for rare rows returns.

    Raises:
        CommandError: the operator interrupted the search.
    """
    given = as_query(query)
    items: list[Any] = []
    digits = 0
    try:
        while True:
            page = lists.get(kind, limit=limit - len(items), cursor=cursor, **given)
            items += page["items"]
            cursor = page["next_cursor"]
            digits = max(digits, page.get("id_digits", 0))
            if cursor is None or len(items) >= limit:
                more = {"id_digits": digits} if "id_digits" in page else {}
                return {"items": items, "next_cursor": cursor, **more}
            show_progress(f"{len(items)} found, still searching at {cursor}")
    except KeyboardInterrupt:
        hint = "" if cursor is None else f"to continue, add --cursor {cursor}"
        raise CommandError(
            f"interrupted after {count(len(items), NOUNS[kind])}", hint=hint, code=INTERRUPTED
        ) from None
    finally:
        show_progress("")


def selected(
    kind: Kind, ids: tuple[str, ...], filters: Mapping[str, Any], *, key: str, example: str
) -> dict[str, Any]:
    """Return a request body that selects by ids (under `key`) or by a filter.

    Raises:
        UsageError: neither or both are given; `example` shows a filter.
    """
    chosen = {name: value for name, value in filters.items() if value is not None}
    if bool(ids) == bool(chosen):
        raise click.UsageError(f"select {kind} either by id or by a filter such as {example}")
    return {key: ids} if ids else {"filter": chosen}


def count_selected(
    daemon: Daemon,
    *path: str,
    body: Mapping[str, Any],
    kind: Kind,
    nothing: str,
    dry_run: bool,
    as_json: bool,
) -> int:
    """Return the number of selected items; with `dry_run`, print it and return 0.

    Raises:
        CommandError: nothing is selected; `nothing` is the message.
    """
    number: int = daemon.post(*path, body={**body, "dry_run": True})["count"]
    if dry_run:
        print_json({"count": number}) if as_json else click.echo(count(number, NOUNS[kind]))
        return 0
    if number == 0:
        raise CommandError(nothing, hint=f"`relay {kind} list` lists {kind}", code=NOTHING)
    return number


def confirm(question: str, *, yes: bool) -> None:
    """Ask for confirmation, unless `yes` is given.

    Raises:
        UsageError: standard input is not a terminal.
        CommandError: the operator declines.
    """
    if yes:
        return
    if not sys.stdin.isatty():
        raise click.UsageError(f"{question} Add --yes to confirm: standard input is not a terminal.")
    if not click.confirm(question):
        raise CommandError("cancelled; nothing was changed")


def follow_replay(daemon: Daemon, replay: Mapping[str, Any], *, as_json: bool, to: str | None = None) -> None:
    """Wait for the end of a replay and print its result. Ctrl-C cancels the replay.

    `to` is the only destination of the replay, if it has only one.

    Raises:
        CommandError: the replay failed, skipped events, or was cancelled.
    """
    try:
        while replay["ended_at"] is None:
            show_progress(f"{progress_of(replay)}, {pace(replay['per_second'], replay['eta_seconds'])}")
            time.sleep(POLL_EVERY)
            replay = daemon.get("replays", replay["id"])
    except KeyboardInterrupt:
        replay = daemon.delete("replays", replay["id"])
        raise CommandError(
            f"cancelled after {progress_of(replay)}", hint=continuation(replay), code=INTERRUPTED
        ) from None
    finally:
        show_progress("")
    if as_json:
        print_json(replay)
    else:
        click.echo(f"{progress_of(replay)}: {count(replay['created'], 'delivery')}")
        if replay["created"]:
            print_holds(daemon, to)
    if replay["error"] is not None or replay["state"] == "cancelled":
        why = replay["error"] or "cancelled"
        hint = continuation(replay) or "start the replay again"
        raise CommandError(f"the replay stopped early: {why}", hint=hint, code=FAILED)
    if replay["skipped"]:
        skipped = count(replay["skipped"], "event")
        hint = "they match no destination, or their delivery is already pending"
        raise CommandError(f"skipped {skipped}", hint=hint, code=BATCH)


def continuation(replay: Mapping[str, Any]) -> str:
    """Return how to continue a replay that stopped early, `""` if it created nothing."""
    reached = replay["reached"]
    return f"to continue, run the same command with --since {reached}" if reached else ""


def progress_of(replay: Mapping[str, Any]) -> str:
    """Return how many of a replay's events are done."""
    return f"{replay['done']:,} of {count(replay['count'], 'event')}".replace(",", " ")
