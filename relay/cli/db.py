"""`relay db`."""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import click
import msgspec

from relay.base.clock import SystemClock
from relay.base.units import render_size
from relay.cli.api_client import Daemon, daemon_options, work
from relay.cli.doctor import named, tell
from relay.cli.exit_codes import INTERRUPTED, CommandError
from relay.cli.main import Group
from relay.cli.offline import Offline, database_of, readable, reader_options, tables_of
from relay.cli.options import FILE, config_option, json_option
from relay.cli.output import count, print_fields, print_json, print_table, show_progress
from relay.store import Stop

T = TypeVar("T")

LOOK_EVERY = 0.2  # seconds between two looks at how far a copy is
CHECKS = ("open", "version", "integrity", "conservation", "stuck", "bodies")
"""What is looked at in a file that need not be the relay's own."""


@click.group(cls=Group)
def db() -> None:
    """The database: what it takes, copies of it, giving room back."""


@db.command()
@json_option
@reader_options
def status(daemon: Daemon | Offline, *, as_json: bool) -> None:
    """Show what the database holds, what room it takes, and its backups.

    Example: relay db status
    """
    answer = daemon.measure() if isinstance(daemon, Offline) else daemon.get("db")
    if as_json:
        print_json(answer)
        return
    sizes = {name: render_size(answer[name]) for name in ("bytes", "free", "log")}
    print_fields({**{name: value for name, value in answer.items() if name != "backups"}, **sizes})
    if answer["backups"]:
        click.echo()
        rows = [(each["made_at"], render_size(each["bytes"]), each["path"]) for each in answer["backups"]]
        print_table(("made at", "size", "backup"), rows)


@db.command()
@click.argument("file", type=FILE, required=False)
@click.option("--force", is_flag=True, help="Replace the file if it is there.")
@json_option
@daemon_options
@click.pass_context
def backup(ctx: click.Context, daemon: Daemon, file: Path | None, *, force: bool, as_json: bool) -> None:
    """Copy the database while the relay works, and check the copy.

    Example: relay db backup /var/backups/relay.db

    To FILE, by this command itself: no relay need run. Without FILE the relay makes the copy, in its
    `[backup] dir`, where it keeps the latest ones.
    """
    if file is None:
        if force:
            raise click.UsageError("--force goes with FILE")
        done = work(daemon, "db", "backup", tell=_far, stopped="there is no new backup")
    else:
        if ctx.params.get("url") is not None:
            raise click.UsageError("leave out FILE: a relay elsewhere makes its backups itself")
        told = tables_of(ctx.params.get("config"))
        floor = told.storage.min_free_disk
        done = _copy(readable(database_of(told)), file, force=force, keep_free=floor)
    if as_json:
        print_json(done)
    else:
        held = f"{count(done['events'], 'event')}, {render_size(done['bytes'])}"
        click.echo(f"{done['path']}: {held}, checked, in {done['seconds']:.1f} s")


@db.command()
@click.argument("file", type=FILE, required=False)
@config_option
@json_option
def check(file: Path | None, config: Path | None, *, as_json: bool) -> None:
    """Look at every page of a database, its books and its bodies; a backup, for instance.

    Example: relay db check /var/backups/relay.db

    Without FILE, that of the configuration. Only reads; no relay need run. The exit code is 1 if
    anything is wrong. `relay doctor` looks at more.
    """
    from relay.store.doctor import Examined, examine  # noqa: PLC0415 - loads what other commands do without

    path = readable(file or database_of(tables_of(config)))
    if not path.exists():
        raise CommandError(f"there is no database {path}", hint="name a file, or the configuration with -c")
    examined = Examined(path=path, now=SystemClock().wall())
    found = _apart(
        lambda stop: examine(examined, stop), lambda: "looking at every page", "nothing was changed"
    )
    tell(named(found, CHECKS), as_json=as_json)


@db.command()
@json_option
@daemon_options
def compact(daemon: Daemon, *, as_json: bool) -> None:
    """Give all free room of the database back to the disk, while the relay works.

    Example: relay db compact
    """
    done = work(
        daemon, "db", "compact",
        tell=lambda at: render_size(at["bytes"]), stopped="what was given back by then stays so",
    )  # fmt: skip
    if as_json:
        print_json(done)
        return
    click.echo(f"{render_size(done['before'])} before, {render_size(done['after'])} now")
    if not done["whole"]:
        click.echo("some program reads the file just now; it shrinks when that has finished", err=True)


def _copy(source: Path, target: Path, *, force: bool, keep_free: int) -> dict[str, Any]:
    from relay.store.backup import back_up  # noqa: PLC0415 - loads what other commands do without

    if not source.exists():
        raise CommandError(f"there is no database {source}", hint="name the configuration with -c")
    part, size = target.with_name(f"{target.name}.part"), source.stat().st_size

    def far() -> str:
        return _far({"bytes": part.stat().st_size if part.exists() else 0, "of": size})

    copy = partial(back_up, source, target.absolute(), replace=force, keep_free=keep_free)
    done = _apart(copy, far, f"{target} was not written")
    return msgspec.structs.asdict(done)


def _far(at: Mapping[str, Any]) -> str:
    return f"{render_size(at['bytes'])} of {render_size(at['of'])}"


def _apart(what: Callable[[Stop], T], far: Callable[[], str], stopped: str) -> T:
    """Do long work in a thread and show how far it is; Ctrl-C has it stop."""
    stop = Stop()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(what, stop)
        try:
            while not wait((future,), LOOK_EVERY).done:
                show_progress(far())
            return future.result()
        except KeyboardInterrupt:
            raise CommandError(f"interrupted: {stopped}", code=INTERRUPTED) from None
        finally:
            stop.set()
            show_progress("")
