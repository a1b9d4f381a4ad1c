"""`relay serve`: run the daemon."""

import asyncio
import logging
import os
import sys
from collections.abc import Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from relay.cli.exit_codes import CONFIG, CommandError, code_of
from relay.cli.options import config_option
from relay.config.binding import Binder
from relay.config.document import read
from relay.config.installed_service import service_of
from relay.config.paths import database_path, find_config, is_there
from relay.config.problems import ConfigError
from relay.config.tables import bind_tables
from relay.errors import RelayError
from relay.process.systemd import sockets_given

if TYPE_CHECKING:
    from relay.plugin_loading.loader import Setup


@click.command()
@config_option
@click.option("--demo", is_flag=True, help="Show everything once: temporary state, a receiver of its own.")
@click.option(
    "--exit", "leave", is_flag=True, help="With --demo: end after the samples; 1 if one is missing."
)
@click.option(
    "--force",
    is_flag=True,
    help="Serve although the installed service has a database for this configuration.",
)
@click.pass_context
def serve(ctx: click.Context, config: Path | None, *, demo: bool, leave: bool, force: bool) -> None:
    """Run the daemon until SIGTERM or Ctrl-C.

    Example: relay serve -c /etc/relay/config.toml

    Starts only with a configuration that `relay check-config` finds no problem in; else the exit code
    is 78, or with sockets from systemd it answers 503 on them until `relay reload` finds no problem.
    Where the relay is installed as a service, start that one: `systemctl start relay`.
    """
    if leave and not demo:
        raise click.UsageError("--exit goes with --demo")
    # aiohttp and the rest load only here: every other command must start fast without them.
    if demo:
        from relay.demo.life import run_demo  # noqa: PLC0415 - see above

        ctx.exit(_run(lambda: run_demo(leave=leave)))
    from relay.app import serve as run_app  # noqa: PLC0415 - see above
    from relay.plugin_loading.loader import load  # noqa: PLC0415 - see above
    from relay.process.logs import configure, is_read, under_systemd  # noqa: PLC0415 - see above
    from relay.standby import Standby  # noqa: PLC0415 - see above

    try:
        path = find_config(config)
    except RelayError as error:
        raise CommandError(error.message, hint=error.hint, code=CONFIG) from None
    if not force:
        _refuse_second(path)
    try:
        setup = load(path)
    except ConfigError as error:
        if not sockets_given():
            raise CommandError(error.message, hint=error.hint, code=CONFIG) from None
        configure("info", "auto", under_systemd=under_systemd())
        standby = Standby(path, error, lambda: _load_again(path), os.environ)
        held = _run(standby.run)
        if held is None:
            return  # it was asked to end
        setup = held
    log = setup.config.log
    configure(log.level, log.format, under_systemd=under_systemd())
    try:
        _run(lambda: run_app(setup))
    except RelayError as error:
        if not is_read(sys.stderr):  # to wait for a reader would keep systemd from starting it anew
            ctx.exit(code_of(error))
        raise


def _load_again(path: Path) -> "Setup":
    """Load a configuration that could not be used, with the environment files of the service as they are now.

    Raises:
        ConfigError: it still cannot be used.
    """
    from relay.plugin_loading.loader import load  # noqa: PLC0415 - see above

    service = service_of(path)
    fresh = service.given(os.environ).environ if service else {}
    setup = load(path, {**os.environ, **fresh})
    os.environ.update(fresh)  # later reloads read it as well
    return setup


def _refuse_second(path: Path) -> None:
    """Refuse to serve the installed service's configuration with another database, or as another user.

    Raises:
        CommandError: the service has a database for this configuration, and this process is not the service.
    """
    service = service_of(path)
    if service is None:
        return
    try:
        config = bind_tables(Binder(read(path), os.environ, lenient=True))
    except ConfigError:  # loading it tells
        return
    ours = database_path(config)
    there = service.directories.get("STATE_DIRECTORY", "").partition(":")[0]
    theirs = ours
    if there and "state_dir" not in read(path).data:
        theirs = database_path(msgspec.structs.replace(config, state_dir=Path(there)))
    if not is_there(theirs):
        if os.path.realpath(theirs) != os.path.realpath(ours):
            logging.getLogger("relay").warning(
                "%s serves this configuration with another database, %s", service.name, theirs
            )
        return
    if os.path.realpath(theirs) != os.path.realpath(ours):
        what = f"{service.name} serves {path} with the database {theirs}; this relay would use {ours}"
    elif not service.runs_as(os.geteuid()):
        what = f"{service.name} has the database {theirs}, and {service.user} could not use it after this"
    else:
        return
    hint = "start the service: `systemctl start relay`; or serve beside it all the same: --force"
    raise CommandError(what, hint=hint)


def _run(main: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    """Run a coroutine, on uvloop where it is installed (the extra `fast`)."""
    loop_factory: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop
    with suppress(ImportError):
        from uvloop import new_event_loop as loop_factory  # noqa: PLC0415 - optional
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        return runner.run(main())
