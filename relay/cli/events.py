"""`relay events`."""

import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import click

from relay.cli.api_client import Daemon, daemon_options, work
from relay.cli.exit_codes import BATCH, INTERRUPTED, CommandError
from relay.cli.main import Group
from relay.cli.offline import Offline, reader_options
from relay.cli.options import SELECTION, filter_options, json_option, page_options, rate_option
from relay.cli.output import Meter, count, print_fields, print_json, print_page, print_table, show_progress
from relay.cli.selection import (
    as_query,
    confirm,
    count_of,
    dry_run_option,
    follow,
    gather,
    wish_of,
    yes_option,
)

COLUMNS = ("id", "received_at", "type", "subject", "size", "deliveries")
_DELIVERIES = ("id", "destination", "state", "attempts", "last_status", "last_error")


@click.group(cls=Group)
def events() -> None:
    """What came in: looking at it, sending it once more, moving and deleting it."""


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


LOOK_EVERY = 100  # lines between two looks at the clock
CHUNK = 256 * 1024


@events.command()
@filter_options(*SELECTION)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write to this file; else to stdout.")
@click.option("--deliveries", is_flag=True, help="Tell what became of each event as well.")
@click.option("--force", is_flag=True, help="Replace the file if it is there.")
@json_option
@reader_options
def export(
    daemon: Daemon | Offline,
    *,
    output: Path | None,
    deliveries: bool,
    force: bool,
    as_json: bool,
    **filters: Any,
) -> None:
    """Write events as lines of JSON, bodies included, the oldest first.

    Example: relay events export --source adorn --since 2d -o adorn.jsonl

    `relay events import` reads them again. A file gets its name when it is complete. With --json and
    -o, what was written is said in JSON; the lines themselves always are.
    """
    if output is None and as_json:
        raise click.UsageError("the lines are JSON anyway; --json goes with -o FILE")
    wanted = as_query(filters)
    number = daemon.get("export", dry_run=1, **wanted)["count"]
    lines = daemon.stream("GET", "export", deliveries=int(deliveries), **wanted)
    with closing(lines), _written(output, force=force) as file:
        written = _copy(lines, file, Meter(number, "event"))
    if output is not None:
        told = {"events": written, "file": str(output)}
        print_json(told) if as_json else click.echo(f"{output}: {count(written, 'event')}")


@events.command("import")
@click.argument("file", type=click.File("rb"))
@click.option("--deliver", is_flag=True, help="Owe what is new by today's routes; else it is only kept.")
@json_option
@daemon_options
def import_(daemon: Daemon, file: BinaryIO, *, deliver: bool, as_json: bool) -> None:
    """Take in the events of an export; those that are there already count once.

    Example: relay events import adorn.jsonl

    FILE may be - for the standard input. A line that is no event ends it; what came before is in, and
    the same file may be imported again once it is mended.
    """
    try:
        done = daemon.send("import", chunks=_chunks(file), deliver=int(deliver))
    except KeyboardInterrupt:
        raise CommandError(
            "interrupted: what was sent by then is in; import the file again", code=INTERRUPTED
        ) from None
    finally:
        show_progress("")
    told = f"{count(done['lines'], 'event')} read, {done['new']} of them new"
    print_json(done) if as_json else click.echo(told)


@events.command()
@click.argument("ids", metavar="[EVENT]...", nargs=-1)
@filter_options(*SELECTION)
@dry_run_option
@yes_option
@json_option
@daemon_options
def delete(
    daemon: Daemon, ids: tuple[str, ...], *, dry_run: bool, yes: bool, as_json: bool, **filters: Any
) -> None:
    """Delete events whatever their age; what is still owed of them is cancelled.

    Example: relay events delete --subject sess_42

    Takes either events by their ids or a filter. Counts per hour stay. `relay db compact` afterwards
    leaves nothing of them in the file.
    """
    wish = wish_of("events", ids, filters, key="events", example="--subject sess_42")
    number = count_of(
        daemon, "events", "delete",
        wish=wish, kind="events", nothing="no event is meant by that", dry_run=dry_run, as_json=as_json,
    )  # fmt: skip
    if not number:
        return
    confirm(f"Delete {count(number, 'event')} for good?", yes=yes)
    meter = Meter(number, "event")
    done = work(
        daemon, "events", "delete", body=wish,
        tell=lambda at: meter.text(at["deleted"]), stopped="what was deleted by then is gone",
    )  # fmt: skip
    if as_json:
        print_json(done)
    else:
        owed = f", {count(done['cancelled'], 'delivery')} cancelled" if done["cancelled"] else ""
        click.echo(f"{count(done['deleted'], 'event')} deleted{owed}")
    if left := done["count"] - done["deleted"]:
        hint = "run the command again"
        raise CommandError(f"{count(left, 'event')} stay: just being sent", hint=hint, code=BATCH)


def _copy(lines: Iterator[bytes], file: BinaryIO, meter: Meter) -> int:
    written = 0
    try:
        for line in lines:
            file.write(line)
            written += 1
            if written % LOOK_EVERY == 0:
                show_progress(meter.text(written))
        file.flush()
    finally:
        show_progress("")
    return written


@contextmanager
def _written(path: Path | None, *, force: bool) -> Iterator[BinaryIO]:
    """Give a file that gets its name when everything is in it; bodies are nobody else's business."""
    if path is None:
        yield sys.stdout.buffer
        return
    if path.exists() and not force:
        raise CommandError(f"{path} is there already", hint="name another file, or say --force")
    part = path.with_name(f"{path.name}.part")
    try:
        part.unlink(missing_ok=True)
        part.touch(mode=0o600)
        with part.open("wb") as file:
            yield file
        part.replace(path)
    except OSError as error:
        raise CommandError(f"{path} cannot be written: {error.strerror}", hint="name another file") from None
    except KeyboardInterrupt:
        raise CommandError(f"interrupted: {path} was not written", code=INTERRUPTED) from None
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def _chunks(file: BinaryIO) -> Iterator[bytes]:
    sent = 0
    while chunk := file.read(CHUNK):
        yield chunk
        sent += len(chunk)
        show_progress(f"{sent / 2**20:.1f} MiB sent")
