"""`relay events`."""

import sys
from typing import Any

import click

from relay.cli.api_client import Daemon, daemon_options
from relay.cli.confirm import confirm, yes_option
from relay.cli.listing import SELECTION, filter_options, gather, page_options, print_fields, print_page
from relay.cli.main import Group
from relay.cli.offline import Offline, reader_options
from relay.cli.options import json_option, rate_option
from relay.cli.output import count, print_json, print_table
from relay.cli.replay_progress import follow
from relay.cli.selection import count_of, dry_run_option, wish_of
from relay.cli.transfer import delete, export, import_

COLUMNS = ("id", "received_at", "type", "subject", "size", "deliveries")
_DELIVERIES = ("id", "destination", "state", "attempts", "last_status", "last_error")


@click.group(cls=Group)
def events() -> None:
    """What came in: looking at it, sending it once more, moving and deleting it."""


for _command in (export, import_, delete):
    events.add_command(_command)


@events.command("list")
@filter_options(*SELECTION)
@page_options
@reader_options
def list_(daemon: Daemon | Offline, *, as_json: bool, quiet: bool, **query: Any) -> None:
    """List events, newest first.

    Example: relay events list --source adorn --since 2h --where data.sale_made=true

    By destination and state: of the deliveries of an event to a destination the latest counts.
    """
    print_page(gather(daemon, "events", **query), COLUMNS, as_json=as_json, quiet=quiet)


@events.command()
@click.argument("event")
@json_option
@reader_options
def show(daemon: Daemon | Offline, event: str, *, as_json: bool) -> None:
    """Show one event and what became of it.

    Example: relay events show 01a201eb

    EVENT is an id, with or without evt_, shortened while unique.
    """
    answer = daemon.get("events", event)
    if as_json:
        print_json(answer)
        return
    print_fields({name: value for name, value in answer.items() if name != "owed"})
    if answer["owed"]:
        click.echo()
        rows = [["" if each[name] is None else each[name] for name in _DELIVERIES] for each in answer["owed"]]
        print_table([name.replace("_", " ") for name in _DELIVERIES], rows)


@events.command()
@click.argument("event")
@json_option
@daemon_options
def body(daemon: Daemon, event: str, *, as_json: bool) -> None:
    """Write an event's body as it came, byte for byte.

    Example: relay events body 01a201eb > body.json

    With --json, as a JSON string; bytes that are no UTF-8 are replaced.
    """
    content = daemon.read("events", event, "body")
    if as_json:
        print_json({"body": content.decode("utf-8", "replace")})
    else:
        sys.stdout.buffer.write(content)


@events.command()
@click.argument("ids", metavar="[EVENT]...", nargs=-1)
@filter_options(*SELECTION)
@click.option("--to", help='The destination; "*": wherever today\'s routes lead.')
@rate_option
@dry_run_option
@yes_option
@json_option
@daemon_options
def replay(
    daemon: Daemon,
    ids: tuple[str, ...],
    *,
    to: str | None,
    rate: str | None,
    dry_run: bool,
    yes: bool,
    as_json: bool,
    **filters: Any,
) -> None:
    """Send stored events once more, as new deliveries.

    Example: relay events replay --source adorn --since 2h --to crm

    Takes either events by their ids or a filter, never both. Ctrl-C ends it; what it has owed by then
    stays owed.
    """
    wish = wish_of("events", ids, filters, key="events", example="--since 2h")
    wish |= {name: value for name, value in (("to", to), ("rate", rate)) if value is not None}
    number = count_of(
        daemon, "replays",
        wish=wish, kind="events", nothing="no event is meant by that", dry_run=dry_run, as_json=as_json,
    )  # fmt: skip
    if not number:
        return
    if not ids:
        confirm(f"Replay {count(number, 'event')}{f' to {to}' if to else ''}?", yes=yes)
    follow(daemon, daemon.post("replays", body=wish), as_json=as_json)
