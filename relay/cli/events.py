"""`relay events`."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import click

from relay.api.words import repeated_text
from relay.cli import screen
from relay.cli.api_client import Daemon, run_operation
from relay.cli.completion import complete
from relay.cli.deliveries import SHAPE
from relay.cli.destinations import holds, state_text
from relay.cli.endpoint import daemon_options, endpoint, reader_options
from relay.cli.main import BATCH, INTERRUPTED, CommandError, Group, file_error
from relay.cli.options import FILE, filter_options, json_option, page_options, rate_option
from relay.cli.output import (
    Meter,
    count,
    print_fields,
    print_items,
    print_json,
    print_note,
    print_page,
    show_progress,
)
from relay.cli.screen import Field
from relay.cli.selection import (
    as_query,
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

COLUMNS = ("id", "received_at", "type", "subject", "size", "deliveries")
_SHAPE = (
    screen.moment("received_at", "received"), screen.short_id("id"),
    screen.text("type", least=22, long="middle"), screen.text("subject", least=8, rank=1),
    screen.size("size", rank=2),
    screen.Column("deliveries", "deliveries", screen.each(screen.states_text), least=12),
)  # fmt: skip
_DELIVERIES = ("id", "destination", "state", "attempts", "last_status", "last_error")

PROGRESS_EVERY = 100  # lines between two updates of the progress line
MOST_LINES = 60  # of a payload
CHUNK = 256 * 1024  # bytes that an import sends at once
NOTHING_MATCHES = "no event matches"
INTACT = "matches its SHA-256"
DAMAGED = "damaged: does not match its SHA-256; the relay does not send it"


@click.group(cls=Group)
def events() -> None:
    """List, inspect, replay, export, import and delete events."""


@events.command("list")
@filter_options("events")
@page_options
@reader_options
def list_(daemon: "Daemon | Offline", *, as_json: bool, quiet: bool, **query: Any) -> None:
    """List events, newest first.

    Example: relay events list --source adorn --since 2h --where data.sale_made=true

    --destination and --state apply to the latest delivery of an event to each destination.
    """
    print_page(gather(daemon, "events", **query), COLUMNS, _SHAPE, as_json=as_json, quiet=quiet)


@events.command()
@endpoint("GET events/{event}", offline=True, asks_more=True)
def show(answer: Any, *, daemon: "Daemon | Offline", **_: str) -> None:
    """Show an event, its deliveries and its payload.

    Example: relay events show 01a201eb7c3d

    EVENT is an id, with or without evt_; any unique prefix works.
    """
    hidden = ("owed", "replies", "id_digits", "payload", "payload_truncated")
    print_fields({name: value for name, value in answer.items() if name not in hidden}, _fields(answer))
    if answer["owed"]:
        click.echo()
        screen.set_digits(answer.get("id_digits"))
        waiting = {each["destination"] for each in answer["owed"] if each["state"] == "pending"}
        held = [each for each in (holds(daemon) if waiting else ()) if each["name"] in waiting]
        names = {each["name"] for each in held}
        owed = [{**each, "is_held": each["destination"] in names} for each in answer["owed"]]
        print_items(_DELIVERIES, owed, _DELIVERIES_SHAPE)
        for each in held:
            print_note(
                f"{each['name']} is held: {state_text(each)}; see `relay destinations show {each['name']}`"
            )
    if sys.stdout.isatty():
        _print_payload(answer)


def _next_try(delivery: Mapping[str, Any]) -> str:
    is_held = delivery["is_held"] and delivery["state"] == "pending"
    return "held" if is_held else screen.due(delivery["next_attempt_at"])


_DELIVERIES_SHAPE = (
    *(column._replace(rank=0) for column in SHAPE if column.name in _DELIVERIES),
    screen.Column("next_attempt_at", "next try", screen.each(str), of=_next_try),
)


def _fields(event: Mapping[str, Any]) -> list[Field]:
    deliveries = screen.states_text(event["deliveries"])
    return [
        Field("Event", event["id"]),
        Field("Type", event["type"]),
        Field("Source", event["source"]),
        Field("Subject", event["subject"] or ""),
        Field("Received", screen.full_time(event["received_at"])),
        Field("Size", f"{screen.size_text(event['size'])}, {event['content_type'] or 'no content type'}"),
        Field("Body", INTACT if event["intact"] else DAMAGED, None if event["intact"] else "red"),
        Field("Answered", _answered(event)),
        Field("Repeated", repeated_text(event["repetitions"])),
        Field("Deliveries", deliveries or "no destination", screen.colour_of("deliveries", deliveries)),
    ]


def _answered(event: Mapping[str, Any]) -> str:
    """Return the reply to the first request; "" if the daemon does not know it."""
    for reply in event["replies"]:
        if reply["received_at"] == event["received_at"]:
            heard = "" if reply["heard"] else "; the sender had disconnected"
            return f"{reply['status']} after {reply['duration_ms']:,} ms{heard}"
    return ""


def _print_payload(event: Mapping[str, Any]) -> None:
    """Print the start of an event's body."""
    if not event["payload"]:
        return
    lines = screen.payload_lines(event["payload"], MOST_LINES + 1)
    click.echo("\nPayload")
    click.echo("\n".join(lines[:MOST_LINES]))
    if len(lines) > MOST_LINES or event["payload_truncated"]:
        click.echo(f"  … whole body: relay events body {event['id']}")


@events.command()
@click.argument("event", shell_complete=complete("event"))
@json_option
@daemon_options
def body(daemon: Daemon, event: str, *, as_json: bool) -> None:
    """Print an event's body, byte for byte.

    Example: relay events body 01a201eb > body.json

    --json prints the body as a JSON string; invalid UTF-8 is replaced.
    """
    content = daemon.read("events", event, "body")
    if as_json:
        print_json({"body": content.decode("utf-8", "replace")})
    else:
        sys.stdout.buffer.write(content)


@events.command()
@click.argument("ids", metavar="[EVENT]...", nargs=-1, shell_complete=complete("event"))
@filter_options("selection")
@click.option(
    "--to", shell_complete=complete("destination"),
    help='Destination, or "*" for every destination that matches the event now.',
)  # fmt: skip
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
    """Send stored events again, as new deliveries.

    Example: relay events replay --source adorn --since 2h --to crm

    Select events either by id or by a filter. Ctrl-C cancels the replay; deliveries that it has already
    created stay.
    """
    request = selected("events", ids, filters, key="events", example="--since 2h")
    request |= {name: value for name, value in (("to", to), ("rate", rate)) if value is not None}
    number = count_selected(
        daemon, "replays",
        body=request, kind="events", nothing=NOTHING_MATCHES, dry_run=dry_run, as_json=as_json,
    )  # fmt: skip
    if not number:
        return
    if not ids:
        confirm(f"Replay {count(number, 'event')}{f' to {to}' if to else ''}?", yes=yes)
    only = to if to != "*" else None
    follow_replay(daemon, daemon.post("replays", body=request), as_json=as_json, to=only)


@events.command()
@filter_options("selection")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Output file.  [default: stdout]")
@click.option("--deliveries", is_flag=True, help="Include the deliveries and attempts of each event.")
@click.option("--force", is_flag=True, help="Overwrite an existing file.")
@json_option
@reader_options
def export(
    daemon: "Daemon | Offline",
    *,
    output: Path | None,
    deliveries: bool,
    force: bool,
    as_json: bool,
    **filters: Any,
) -> None:
    """Export events as JSON lines with their bodies, oldest first.

    Example: relay events export --source adorn --since 2d -o adorn.jsonl

    `relay events import` reads the file. The file appears under its name only when it is complete.
    --json needs -o and prints a summary as JSON.
    """
    if output is None and as_json:
        raise click.UsageError("--json needs -o FILE; the exported lines are JSON already")
    query = as_query(filters)
    number = daemon.get("export", dry_run=1, **query)["count"]
    lines = daemon.stream("GET", "export", deliveries=int(deliveries), **query)
    with closing(lines), _written(output, force=force) as file:
        written = _copy(lines, file, Meter(number, "event"))
    if output is not None:
        summary = {"events": written, "file": str(output)}
        print_json(summary) if as_json else click.echo(f"{output}: {count(written, 'event')}")


@events.command("import")
@click.argument("file", type=FILE)
@click.option("--deliver", is_flag=True, help="Deliver new events to the destinations that match them.")
@json_option
@daemon_options
def import_(daemon: Daemon, file: Path, *, deliver: bool, as_json: bool) -> None:
    """Import the events of an export; existing events are skipped.

    Example: relay events import adorn.jsonl

    Use - as FILE for standard input. An invalid line stops the import; the events before it are imported.
    Correct the line and import the same file again.
    """
    try:
        with _opened(file) as content:
            done = daemon.send("import", chunks=_chunks(content), deliver=int(deliver))
    except KeyboardInterrupt:
        hint = "the events that were sent are imported; to continue, import the file again"
        raise CommandError("interrupted", hint=hint, code=INTERRUPTED) from None
    finally:
        show_progress("")
    print_json(done) if as_json else click.echo(f"{count(done['lines'], 'event')} read, {done['new']} new")


@events.command()
@click.argument("ids", metavar="[EVENT]...", nargs=-1, shell_complete=complete("event"))
@filter_options("selection")
@dry_run_option
@yes_option
@json_option
@daemon_options
def delete(
    daemon: Daemon, ids: tuple[str, ...], *, dry_run: bool, yes: bool, as_json: bool, **filters: Any
) -> None:
    """Delete events of any age and cancel their pending deliveries.

    Example: relay events delete --subject sess_42

    Select events either by id or by a filter. The counts of `relay stats` stay. Run `relay db compact`
    afterwards to erase the data from the file.
    """
    request = selected("events", ids, filters, key="events", example="--subject sess_42")
    number = count_selected(
        daemon, "events", "delete",
        body=request, kind="events", nothing=NOTHING_MATCHES, dry_run=dry_run, as_json=as_json,
    )  # fmt: skip
    if not number:
        return
    confirm(f"Delete {count(number, 'event')} permanently?", yes=yes)
    meter = Meter(number, "event")
    done = run_operation(
        daemon, "events", "delete", body=request,
        describe=lambda at: meter.text(at["deleted"]), stopped="the events deleted so far stay deleted",
    )  # fmt: skip
    if as_json:
        print_json(done)
    else:
        cancelled = f", {count(done['cancelled'], 'delivery')} cancelled" if done["cancelled"] else ""
        click.echo(f"{count(done['deleted'], 'event')} deleted{cancelled}")
    if left := done["count"] - done["deleted"]:
        message = f"{count(left, 'event')} not deleted: a delivery is in flight"
        raise CommandError(message, hint="run the command again", code=BATCH)


def _copy(lines: Iterator[bytes], file: BinaryIO, meter: Meter) -> int:
    written = 0
    try:
        for line in lines:
            file.write(line)
            written += 1
            if written % PROGRESS_EVERY == 0:
                show_progress(meter.text(written))
        file.flush()
    finally:
        show_progress("")
    return written


@contextmanager
def _written(path: Path | None, *, force: bool) -> Iterator[BinaryIO]:
    """Yield the output file; it gets its name when it is complete. Only its owner may read it."""
    if path is None:
        yield sys.stdout.buffer
        return
    part = path.with_name(f"{path.name}.part")
    try:
        if path.exists() and not force:
            hint = "name another file, or add --force to overwrite it"
            raise CommandError(f"{path} already exists", hint=hint)
        part.unlink(missing_ok=True)
        part.touch(mode=0o600)
        with part.open("wb") as file:
            yield file
        part.replace(path)
    except OSError as error:
        raise file_error(f"cannot write {path}", error, "name another file") from None
    except KeyboardInterrupt:
        raise CommandError(f"interrupted: {path} was not written", code=INTERRUPTED) from None
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def _opened(file: Path) -> AbstractContextManager[BinaryIO]:
    """Open a file; - is standard input."""
    try:
        return nullcontext(sys.stdin.buffer) if str(file) == "-" else file.open("rb")
    except PermissionError as error:
        raise file_error(f"cannot read {file}", error, "make the file readable for this user") from None
    except OSError as error:
        raise click.BadParameter(f"cannot read {file}: {error.strerror}", param_hint="FILE") from None


def _chunks(file: BinaryIO) -> Iterator[bytes]:
    sent = 0
    while chunk := file.read(CHUNK):
        yield chunk
        sent += len(chunk)
        show_progress(f"{sent / 2**20:.1f} MiB sent")
