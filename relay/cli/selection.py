"""What is done to many: by their ids or by a filter, never both, and counted beforehand."""

from collections.abc import Mapping
from typing import Any, Literal

import click

from relay.cli.api_client import Daemon
from relay.cli.exit_codes import NOTHING, CommandError
from relay.cli.output import count, print_json

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
