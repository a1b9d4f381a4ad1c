"""`relay deliveries`."""

from collections.abc import Mapping
from typing import Any

import click

from relay.cli.api_client import Daemon, daemon_options
from relay.cli.exit_codes import BATCH, CommandError
from relay.cli.main import Group
from relay.cli.offline import Offline, reader_options
from relay.cli.options import SELECTION, filter_options, json_option, page_options, rate_option
from relay.cli.output import count, print_fields, print_json, print_page, print_table
from relay.cli.selection import confirm, count_of, dry_run_option, follow, gather, wish_of, yes_option

COLUMNS = ("id", "created_at", "type", "destination", "state", "attempts", "last_status", "last_error")
_TRIES = ("started_at", "duration_ms", "result", "status", "error")


@click.group(cls=Group)
def deliveries() -> None:
    """What is owed to destinations, and what became of it."""


@deliveries.command("list")
@filter_options("event", *SELECTION)
@page_options
@reader_options
def list_(daemon: Daemon | Offline, *, as_json: bool, quiet: bool, event: str | None, **query: Any) -> None:
    """List deliveries, newest first.

    Example: relay deliveries list --destination crm --state dead

    Filtered by what their events are, they are in the order of those.
    """
    page = gather(daemon, "deliveries", event_id=event, **query)
    print_page(page, COLUMNS, as_json=as_json, quiet=quiet)


@deliveries.command()
@click.argument("delivery")
@json_option
@reader_options
def show(daemon: Daemon | Offline, delivery: str, *, as_json: bool) -> None:
    """Show one delivery and every HTTP try of it.

    Example: relay deliveries show 01a201eb

    DELIVERY is an id, with or without dlv_, shortened while unique.
    """
    answer = daemon.get("deliveries", delivery)
    if as_json:
        print_json(answer)
        return
    print_fields(answer)
    if answer["tries"]:
        click.echo()
        rows = [["" if each[name] is None else each[name] for name in _TRIES] for each in answer["tries"]]
        print_table([name.replace("_", " ") for name in _TRIES], rows)


@deliveries.command()
@click.argument("ids", metavar="[DELIVERY]...", nargs=-1)
@filter_options(*SELECTION)
@rate_option
@dry_run_option
@yes_option
@json_option
@daemon_options
def retry(
    daemon: Daemon,
    ids: tuple[str, ...],
    *,
    rate: str | None,
    dry_run: bool,
    yes: bool,
    as_json: bool,
    **filters: Any,
) -> None:
    """Give ended deliveries another life; make pending ones due now.

    Example: relay deliveries retry --destination crm --state dead

    Takes either deliveries by their ids or a filter, which must say in which state.
    """
    wish = _wish(ids, filters)
    if rate is not None:
        wish["rate"] = rate
    number = _count(daemon, "retry", wish, dry_run=dry_run, as_json=as_json)
    if not number:
        return
    if not ids:
        confirm(f"Retry {count(number, 'delivery')}?", yes=yes)
    answer = daemon.post("deliveries", "retry", body=wish)
    if "ended_at" in answer:
        follow(daemon, answer, as_json=as_json)
        return
    if as_json:
        print_json(answer)
    else:
        click.echo(f"{count(answer['created'], 'delivery')} owed anew, {answer['hurried']} made due now")
    if answer["skipped"]:
        raise CommandError(f"skipped {answer['skipped']}: pending already, or just being sent", code=BATCH)


@deliveries.command()
@click.argument("ids", metavar="[DELIVERY]...", nargs=-1)
@filter_options(*SELECTION)
@dry_run_option
@yes_option
@json_option
@daemon_options
def cancel(
    daemon: Daemon, ids: tuple[str, ...], *, dry_run: bool, yes: bool, as_json: bool, **filters: Any
) -> None:
    """End pending deliveries.

    Example: relay deliveries cancel --destination crm --since 1h

    Takes either deliveries by their ids or a filter. One that is just being sent ends by its outcome.
    """
    wish = _wish(ids, filters)
    number = _count(daemon, "cancel", wish, dry_run=dry_run, as_json=as_json)
    if not number:
        return
    if not ids:
        confirm(f"Cancel {count(number, 'delivery')}?", yes=yes)
    answer = daemon.post("deliveries", "cancel", body=wish)
    if as_json:
        print_json(answer)
    else:
        click.echo(
            f"{count(answer['cancelled'], 'delivery')} cancelled, {answer['in_flight']} just being sent"
        )
    missed = len(set(ids)) - answer["cancelled"] - answer["in_flight"]
    if missed > 0:
        raise CommandError(f"{count(missed, 'delivery')} had ended already", code=BATCH)


def _wish(ids: tuple[str, ...], filters: Mapping[str, Any]) -> dict[str, Any]:
    return wish_of("deliveries", ids, filters, key="ids", example="--destination crm")


def _count(daemon: Daemon, verb: str, wish: Mapping[str, Any], *, dry_run: bool, as_json: bool) -> int:
    nothing = f"nothing to {verb}: none is meant by that, or all ended"
    return count_of(
        daemon, "deliveries", verb,
        wish=wish, kind="deliveries", nothing=nothing, dry_run=dry_run, as_json=as_json,
    )  # fmt: skip
