"""`relay deliveries`."""

import base64
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from relay.api.words import END_REASONS, curl_of
from relay.base.text import printable
from relay.cli import screen
from relay.cli.api_client import Daemon
from relay.cli.completion import complete
from relay.cli.destinations import print_holds
from relay.cli.endpoint import daemon_options, endpoint, reader_options
from relay.cli.main import BATCH, CommandError, Group
from relay.cli.options import filter_options, json_option, page_options, rate_option
from relay.cli.output import count, print_fields, print_items, print_json, print_page, time_text
from relay.cli.screen import Field
from relay.cli.selection import (
    confirm,
    count_selected,
    dry_run_option,
    follow_replay,
    gather,
    selected,
    yes_option,
)

if TYPE_CHECKING:
    from relay.cli.offline import Offline

COLUMNS = ("id", "created_at", "type", "destination", "state", "attempts", "last_status", "last_error")
SHAPE = (
    screen.moment("created_at", "created"), screen.short_id("id", least=screen.UNIQUE_DIGITS),
    screen.text("destination", least=14, wish=26, long="middle"), screen.word("state"),
    screen.number("attempts", "tries"),
    screen.last_result(rank=1),
    screen.text("type", least=16, rank=2, long="middle"),
    screen.Column("next_attempt_at", "next try", screen.each(screen.due), rank=3),
)  # fmt: skip
_ATTEMPT = ("started_at", "duration_ms", "result", "status", "error")
RESPONSE = screen.text("error", "response", least=16)._replace(
    of=lambda attempt: screen.result_text(attempt["status"], attempt["error"])
)
"""The column with the response to an attempt."""

ATTEMPT_SHAPE = (
    screen.moment("started_at", "started"),
    screen.Column("duration_ms", "took", screen.each(screen.milliseconds), right=True),
    screen.word("result"),
    RESPONSE._replace(long="wrap"),
)  # fmt: skip


_MOST_ANSWERS = 3
_LONGEST_ANSWER = 1000  # characters of a response that are shown; --json has up to 16 KiB


@click.group(cls=Group)
def deliveries() -> None:
    """List, inspect, retry and cancel deliveries."""


@deliveries.command("list")
@filter_options("deliveries")
@page_options
@reader_options
def list_(daemon: "Daemon | Offline", *, as_json: bool, quiet: bool, **query: Any) -> None:
    """List deliveries, newest first.

    Example: relay deliveries list --destination crm --state dead

    With a filter on events, the deliveries of the newest event come first.
    """
    page = gather(daemon, "deliveries", **query)
    print_page(page, COLUMNS, SHAPE, as_json=as_json, quiet=quiet)


@deliveries.command()
@endpoint("GET deliveries/{delivery}", offline=True, asks_more=True)
def show(answer: Any, *, daemon: "Daemon | Offline", **_: str) -> None:
    """Show a delivery, its attempts, and the receiver's responses.

    Example: relay deliveries show 01a201eb

    DELIVERY is an id, with or without dlv_; any unique prefix works. Shows the three latest distinct
    responses, up to 1000 characters each; --json has the response of every attempt, up to 16 KiB each. If the
    destination of a pending delivery is held, stderr has the reason and the next command.
    """
    print_fields(answer, delivery_fields(answer))
    if answer["tries"]:
        click.echo()
        grouped = any(each["group_size"] is not None for each in answer["tries"])
        names = (*_ATTEMPT, "group_size") if grouped else _ATTEMPT
        shape = (*ATTEMPT_SHAPE, screen.number("group_size", "group size")) if grouped else ATTEMPT_SHAPE
        print_items(names, answer["tries"], shape)
        _print_answers(answer["tries"])
    if answer["state"] == "pending":
        print_holds(daemon, answer["destination"])


@deliveries.command("request")
@click.option("--curl", is_flag=True, help="Print a curl command that sends the same request.")
@endpoint("GET deliveries/{delivery}/request")
def request_(answer: Any, *, curl: bool, **_: str) -> None:
    """Show the request that the next attempt would send.

    Example: relay deliveries request 01a201eb

    The request is built with the current configuration, for this delivery alone; nothing is sent. Secrets and
    signatures are masked. To send a signed test request: relay destinations test NAME
    """
    if curl:
        click.echo(curl_of(answer))
        return
    body = answer["body"] if answer["body_base64"] is None else None
    click.echo(f"{answer['method']} {printable(answer['url'])}")
    for name, value in answer["headers"].items():
        click.echo(f"{name}: {printable(value)}")
    click.echo()
    if body is None:
        content = base64.b64decode(answer["body_base64"])
        click.echo(f"{count(len(content), 'byte')} that are not text; --json has them in base64")
    else:
        click.echo("\n".join(map(printable, body.split("\n"))))
    if answer["grouped"]:
        click.echo("\nthe relay sends this delivery in one message with others (group_by)", err=True)


def delivery_fields(delivery: Mapping[str, Any]) -> list[Field]:
    """Return the lines about a delivery on a terminal."""
    state, reason, due_at = delivery["state"], delivery["reason"], delivery["next_attempt_at"]
    return [
        Field("Delivery", delivery["id"]),
        Field("Event", delivery["event_id"]),
        Field("Type", delivery["type"]),
        Field("Destination", delivery["destination"]),
        Field(
            "State",
            state if reason is None else f"{state}: {END_REASONS.get(reason, reason)}",
            screen.colour_of("state", state),
        ),
        Field("Attempts", screen.number_text(delivery["attempts"])),
        Field("Last result", screen.result_text(delivery["last_status"], delivery["last_error"])),
        Field("Created", screen.full_time(delivery["created_at"])),
        Field("Due since" if screen.due(due_at) == "due" else "Next attempt", screen.full_time(due_at)),
        Field("Finished", screen.full_time(delivery["finished_at"])),
        Field("Repeats", delivery["replay_of"] or ""),
        Field("Sent again", delivery.get("replayed_by") or ""),
        Field("Group", delivery["group_key"] or ""),
    ]


def _print_answers(attempts: Sequence[Mapping[str, Any]]) -> None:
    """Print the bodies of the latest different responses."""
    latest: dict[str, Mapping[str, Any]] = {}
    for attempt in attempts:
        if text := attempt["answer"].strip():
            latest.setdefault(text, attempt)
    for text, attempt in list(latest.items())[:_MOST_ANSWERS]:
        is_cut = attempt["truncated"] or len(text) > _LONGEST_ANSWER
        click.echo(f"\nresponse {attempt['status']} at {time_text(attempt['started_at'])}:")
        lines = text[:_LONGEST_ANSWER].splitlines()
        click.echo("\n".join(f"  {printable(line)}".rstrip() for line in lines) + ("…" if is_cut else ""))


@deliveries.command()
@click.argument("ids", metavar="[DELIVERY]...", nargs=-1, shell_complete=complete("delivery"))
@filter_options("selection")
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
    """Send finished deliveries again; send pending ones now.

    Example: relay deliveries retry --destination crm --state dead

    Select deliveries either by id or by a filter; a filter needs --state.
    """
    body = selected("deliveries", ids, filters, key="ids", example="--destination crm")
    if rate is not None:
        body["rate"] = rate
    number = count_selected(
        daemon, "deliveries", "retry",
        body=body, kind="deliveries", nothing=_nothing(ids), dry_run=dry_run, as_json=as_json,
    )  # fmt: skip
    if not number:
        return
    if not ids:
        confirm(f"Retry {count(number, 'delivery')}?", yes=yes)
    answer = daemon.post("deliveries", "retry", body=body)
    if "ended_at" in answer:
        follow_replay(daemon, answer, as_json=as_json, to=filters["destination"])
        return
    if as_json:
        print_json(answer)
    else:
        click.echo(f"{count(answer['created'], 'delivery')} created, {answer['hurried']} pending due now")
        print_holds(daemon, filters["destination"])
    if answer["skipped"]:
        hint = "they are already pending or due, or an attempt is in flight"
        raise CommandError(f"skipped {count(answer['skipped'], 'delivery')}", hint=hint, code=BATCH)


@deliveries.command()
@click.argument("ids", metavar="[DELIVERY]...", nargs=-1, shell_complete=complete("delivery"))
@filter_options("selection")
@dry_run_option
@yes_option
@json_option
@daemon_options
def cancel(
    daemon: Daemon, ids: tuple[str, ...], *, dry_run: bool, yes: bool, as_json: bool, **filters: Any
) -> None:
    """Cancel pending deliveries.

    Example: relay deliveries cancel --destination crm --since 1h

    Select deliveries either by id or by a filter. An attempt in flight is not interrupted; its result
    decides how the delivery ends.
    """
    body = selected("deliveries", ids, filters, key="ids", example="--destination crm")
    number = count_selected(
        daemon, "deliveries", "cancel",
        body=body, kind="deliveries", nothing=_nothing(ids), dry_run=dry_run, as_json=as_json,
    )  # fmt: skip
    if not number:
        return
    if not ids:
        confirm(f"Cancel {count(number, 'delivery')}?", yes=yes)
    answer = daemon.post("deliveries", "cancel", body=body)
    if as_json:
        print_json(answer)
    else:
        click.echo(f"{count(answer['cancelled'], 'delivery')} cancelled, {answer['in_flight']} in flight")
    ended = len(set(ids)) - answer["cancelled"] - answer["in_flight"]
    if ended > 0:
        raise CommandError(f"{count(ended, 'delivery')} had already ended", code=BATCH)


def _nothing(ids: tuple[str, ...]) -> str:
    return "these deliveries have already ended" if ids else "no delivery matches this filter"
