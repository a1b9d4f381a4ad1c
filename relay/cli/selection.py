"""What is done to many: by their ids or by a filter, never both, and counted beforehand."""

import json
import sys
import time
from collections.abc import Mapping
from typing import Any, Literal, Protocol

import click

from relay.cli.api_client import Daemon
from relay.cli.exit_codes import BATCH, FAILED, INTERRUPTED, NOTHING, CommandError
from relay.cli.output import count, pace, print_json, show_progress

yes_option = click.option("-y", "--yes", is_flag=True, help="Do not ask.")


def confirm(question: str, *, yes: bool) -> None:
    """Ask, unless the operator said yes beforehand.

    Raises:
        UsageError: nobody can be asked, as the input is no terminal.
        CommandError: the answer is no.
    """
    if yes:
        return
    if not sys.stdin.isatty():
        raise click.UsageError(f"{question} Add --yes to say so; the input is no terminal to ask on.")
    if not click.confirm(question):
        raise CommandError("nothing was changed")


Kind = Literal["events", "deliveries"]

NOUNS: Mapping[Kind, str] = {"events": "event", "deliveries": "delivery"}

dry_run_option = click.option("--dry-run", is_flag=True, help="Only count.")


def wish_of(
    kind: Kind, ids: tuple[str, ...], filters: Mapping[str, Any], *, key: str, example: str
) -> dict[str, Any]:
    """Return the body of a request that says which are meant; `key` is what it calls ids.

    Raises:
        UsageError: it is said in neither way, or in both; `example` is a filter.
    """
    chosen = {name: value for name, value in filters.items() if value is not None}
    if bool(ids) == bool(chosen):
        raise click.UsageError(f"name {kind} by their ids, or by a filter such as {example}")
    return {key: ids} if ids else {"filter": chosen}


def count_of(
    daemon: Daemon,
    *path: str,
    wish: Mapping[str, Any],
    kind: Kind,
    nothing: str,
    dry_run: bool,
    as_json: bool,
) -> int:
    """Return how many are meant; with `dry_run` that is printed, and 0 returned: there is nothing to do.

    Raises:
        CommandError: none is, which `nothing` says.
    """
    number: int = daemon.post(*path, body={**wish, "dry_run": True})["count"]
    if dry_run:
        print_json({"count": number}) if as_json else click.echo(count(number, NOUNS[kind]))
        return 0
    if number == 0:
        raise CommandError(nothing, hint=f"`relay {kind} list` shows what there is", code=NOTHING)
    return number


EVERY = 0.2
"""Seconds between two looks."""


def follow(daemon: Daemon, replay: Mapping[str, Any], *, as_json: bool) -> None:
    """Wait for the end of a replay, and say what came of it.

    Raises:
        CommandError: it failed, skipped something, or the operator ended it.
    """
    try:
        while replay["ended_at"] is None:
            _show(replay)
            time.sleep(EVERY)
            replay = daemon.get("replays", replay["id"])
    except KeyboardInterrupt:
        replay = daemon.delete("replays", replay["id"])
        since = f"; go on with the same command and --since {replay['reached']}" if replay["reached"] else ""
        raise CommandError(f"cancelled after {_done(replay)}{since}", code=INTERRUPTED) from None
    finally:
        _show(None)
    if as_json:
        print_json(replay)
    else:
        click.echo(f"{_done(replay)}: {count(replay['created'], 'delivery')}")
    if replay["error"] is not None or replay["state"] == "cancelled":
        why = replay["error"] or "it was cancelled"
        hint = f"go on with --since {replay['reached']}" if replay["reached"] else "begin it again"
        raise CommandError(f"the replay ended early: {why}", hint=hint, code=FAILED)
    if replay["skipped"]:
        skipped = count(replay["skipped"], "event")
        raise CommandError(f"skipped {skipped}: owed to nobody, or pending already", code=BATCH)


def _done(replay: Mapping[str, Any]) -> str:
    return f"{replay['done']:,} of {count(replay['count'], 'event')}".replace(",", " ")


def _show(replay: Mapping[str, Any] | None) -> None:
    """Tell how far it is; None: clear that for what is said next."""
    text = ""
    if replay is not None:
        text = f"{_done(replay)}, {pace(replay['per_second'], replay['eta_seconds'])}"
    show_progress(text)


def as_query(filters: Mapping[str, Any]) -> dict[str, Any]:
    """Return filters that are given, as parameters of a question: conditions are JSON there."""
    told = {name: value for name, value in filters.items() if value is not None}
    return told | ({"where": json.dumps(told["where"])} if "where" in told else {})


class Lists(Protocol):
    """What answers with pages: a relay that runs, or a file."""

    def get(self, kind: str, /, **query: Any) -> Any:
        """Return a page."""
        ...


def gather(lists: Lists, kind: str, *, limit: int, cursor: str | None, **query: Any) -> dict[str, Any]:
    """Return so many rows of a list, following its pages where what is asked for is rare.

    Raises:
        CommandError: the operator ended it.
    """
    told = as_query(query)
    items: list[Any] = []
    try:
        while True:
            page = lists.get(kind, limit=limit - len(items), cursor=cursor, **told)
            items += page["items"]
            cursor = page["next_cursor"]
            if cursor is None or len(items) >= limit:
                return {"items": items, "next_cursor": cursor}
            show_progress(f"{len(items)} found so far, looking on from {cursor}")
    except KeyboardInterrupt:
        on = "" if cursor is None else f"; go on with the same command and --cursor {cursor}"
        raise CommandError(f"ended after {len(items)} {kind}{on}", code=INTERRUPTED) from None
    finally:
        show_progress("")
