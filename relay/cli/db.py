"""`relay db`."""

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import click
import msgspec

from relay.base.clock import SystemClock
from relay.base.units import render_size
from relay.cli import screen
from relay.cli.api_client import Daemon, run_operation
from relay.cli.doctor import named, print_checks
from relay.cli.endpoint import daemon_options, reader_options
from relay.cli.main import INTERRUPTED, CommandError, Group, file_error
from relay.cli.offline import Offline, database_of, readable, tables_of, url_of, writable
from relay.cli.options import FILE, check_argument, config_option, json_option
from relay.cli.output import count, print_fields, print_items, print_json, show_progress
from relay.cli.screen import Field, utc_option
from relay.errors import RelayError
from relay.store import OfflineStore, Stop
from relay.store.opening import file_of, move_of, offline_store

T = TypeVar("T")

PROGRESS_EVERY = 0.2  # seconds between two updates of the progress line
CHECKS = ("open", "version", "integrity", "conservation", "stuck", "bodies")
"""Checks for a file that may be a copy."""


def _storage_url(_ctx: click.Context, _parameter: click.Parameter, value: str) -> str:
    """Check the URL of a storage."""
    try:
        is_file = file_of(value, Path()) is not None
    except RelayError as error:
        raise click.BadParameter(f'expected "sqlite:FILE" or "postgresql://…", got "{value}"') from error
    return value if is_file else check_argument(value)


_BACKUPS = (
    screen.moment("made_at", "made"), screen.size("bytes", "size"), screen.text("path", least=20, long="wrap")
)  # fmt: skip


@click.group(cls=Group)
def db() -> None:
    """Inspect, back up, check, compact and move the database."""


@db.command()
@utc_option
@json_option
@reader_options
def status(daemon: Daemon | Offline, *, as_json: bool) -> None:
    """Show the contents and size of the database, and its backups.

    Example: relay db status
    """
    answer = daemon.measure() if isinstance(daemon, Offline) else daemon.get("db")
    if as_json:
        print_json(answer)
        return
    sizes = {name: render_size(answer[name]) for name in ("bytes", "free", "log") if answer[name] is not None}
    fields = {**{name: value for name, value in answer.items() if name != "backups"}, **sizes}
    size = sizes["bytes"] if "log" not in sizes else "{bytes}, {free} of it free; log {log}".format(**sizes)
    shown = [
        Field("Database", answer["path"]),
        Field("Size", size),
        Field("Version", f"tables {answer['version']}, {answer['engine']}"),
        Field("Events", screen.number_text(answer["events"])),
        Field("Oldest", screen.full_time(answer["oldest"])),
        Field("Newest", screen.full_time(answer["newest"])),
        Field("Pending", screen.number_text(answer["pending"])),
    ]
    print_fields(fields, shown)
    if answer["backups"]:
        click.echo()
        backups = [{**each, "size": render_size(each["bytes"])} for each in answer["backups"]]
        print_items(("made_at", "size", "path"), backups, _BACKUPS)


@db.command()
@click.argument("file", type=FILE, required=False)
@click.option("--force", is_flag=True, help="Overwrite an existing file.")
@json_option
@daemon_options
@click.pass_context
def backup(ctx: click.Context, daemon: Daemon, file: Path | None, *, force: bool, as_json: bool) -> None:
    """Back up the database while the daemon runs, and check the copy.

    Example: relay db backup /var/backups/relay.db

    With FILE, this command itself writes the copy and needs no daemon. Without FILE, the daemon writes the
    copy to `[backup] dir` and keeps the latest `[backup] keep` copies there.
    """
    if file is None:
        if force:
            raise click.UsageError("--force needs FILE")
        done = run_operation(daemon, "db", "backup", describe=_progress, stopped="no backup was made")
    else:
        if ctx.params.get("url") is not None:
            raise click.UsageError("FILE cannot be used with --url: a remote daemon writes its own backups")
        config = tables_of(ctx.params.get("config"))
        keep_free = config.storage.free_after_backup
        if (source := database_of(config)) is None:  # raises the error with the advice
            offline_store(url_of(config), config.state_dir).back_up(file, Stop())
            return
        done = _copy(readable(source), file, force=force, keep_free=keep_free)
    if as_json:
        print_json(done)
    else:
        content = f"{count(done['events'], 'event')}, {render_size(done['bytes'])}"
        click.echo(f"{done['path']}: {content}, checked, in {done['seconds']:.1f} s")


@db.command()
@click.argument("file", type=FILE, required=False)
@config_option
@json_option
def check(file: Path | None, config: Path | None, *, as_json: bool) -> None:
    """Check every page, the ledger and the bodies of a database or a backup.

    Example: relay db check /var/backups/relay.db

    FILE defaults to the database of the configuration. Read-only; needs no daemon. The exit code is 1 if
    a check fails. `relay doctor` has more checks.
    """
    if file is not None:
        store = _existing(file)
    else:
        tables = tables_of(config)
        path = database_of(tables)
        store = offline_store(url_of(tables), tables.state_dir) if path is None else _existing(path)
    found = _in_thread(
        lambda stop: store.examine(stop, now=SystemClock().wall()),
        lambda: "checking every page",
        "nothing was changed",
    )
    print_checks(named(found, CHECKS), as_json=as_json)


@db.command()
@json_option
@daemon_options
def compact(daemon: Daemon, *, as_json: bool) -> None:
    """Return the database's free pages to the disk while the daemon runs.

    Example: relay db compact
    """
    done = run_operation(
        daemon, "db", "compact",
        describe=lambda at: render_size(at["bytes"]), stopped="the space freed so far stays free",
    )  # fmt: skip
    if as_json:
        print_json(done)
        return
    click.echo(f"{render_size(done['before'])} before, {render_size(done['after'])} after")
    if not done["whole"]:
        click.echo("another program is reading the file; the file shrinks when that program ends", err=True)


@db.command()
@click.argument("source", metavar="FROM", callback=_storage_url)
@click.argument("target", metavar="TO", callback=_storage_url)
@json_option
def move(source: str, target: str, *, as_json: bool) -> None:
    """Copy everything from one database to an empty one of another kind.

    Example: relay db move sqlite:/var/lib/relay/relay.db postgresql://relay@db/relay

    FROM and TO are URLs as in `[storage] url`; a file is relative to the current folder. Stop the daemon
    first. Pending deliveries, workers, commands, idempotency keys, counts and history are included, and
    both sides are compared at the end. FROM does not change. If the move is interrupted, run the same
    command again: it continues. Afterwards set `[storage] url` to TO and start the daemon. Put a password
    into PGPASSWORD or ~/.pgpass, because other users see the arguments of a command.
    """
    moved = asyncio.run(_move(source, target))
    if as_json:
        print_json({"from": source, "to": target, "rows": moved})
        return
    shown = ", ".join(f"{name} {screen.number_text(number)}" for name, number in moved.items() if number)
    click.echo(f"moved and compared: {shown or 'no rows'}")
    click.echo(f'now set url = "{target}" in [storage] of config.toml, and start the daemon', err=True)


async def _move(source: str, target: str) -> dict[str, int]:
    """Move everything, and return the number of rows of each table."""
    found: dict[str, int] = {}
    for url in (source, target):
        if (path := file_of(url, _folder())) is not None:
            writable(readable(path).parent)
    try:
        async for moved in move_of(source, target, _folder()).run():
            found[moved.table] = moved.of
            show_progress(f"{moved.table}: {moved.rows:,} of {moved.of:,}")
    finally:
        show_progress("")
    return found


def _copy(source: Path, target: Path, *, force: bool, keep_free: int) -> dict[str, Any]:
    if not source.exists():
        raise _missing(source)
    part, size = target.with_name(f"{target.name}.part"), source.stat().st_size

    def progress() -> str:
        return _progress({"bytes": part.stat().st_size if part.exists() else 0, "of": size})

    copy = partial(_store_at(source).back_up, target.absolute(), replace=force, keep_free=keep_free)
    try:
        done = _in_thread(copy, progress, f"{target} was not written")
    except OSError as error:
        raise file_error(f"cannot write {target}", error, "name another file") from None
    return msgspec.structs.asdict(done)


def _folder() -> Path:
    """Return the folder that names of databases are relative to."""
    try:
        return Path.cwd()
    except FileNotFoundError as error:
        raise file_error("cannot read the current folder", error, "change to a folder that exists") from None


def _existing(path: Path) -> OfflineStore:
    if not readable(path).exists():
        raise _missing(path)
    return _store_at(path)


def _store_at(path: Path) -> OfflineStore:
    return offline_store(f"sqlite:{path.absolute()}", path.parent)


def _missing(path: Path) -> CommandError:
    return CommandError(f"no database at {path}", hint="name the configuration with -c")


def _progress(at: Mapping[str, Any]) -> str:
    return f"{render_size(at['bytes'])} of {render_size(at['of'])}"


def _in_thread(operation: Callable[[Stop], T], progress: Callable[[], str], stopped: str) -> T:
    """Run a long operation in a thread and show its progress; Ctrl-C stops it."""
    stop = Stop()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(operation, stop)
        try:
            while not wait((future,), PROGRESS_EVERY).done:
                show_progress(progress())
            return future.result()
        except KeyboardInterrupt:
            raise CommandError(f"interrupted: {stopped}", code=INTERRUPTED) from None
        finally:
            stop.set()
            show_progress("")
