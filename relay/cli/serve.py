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

from relay.cli.main import CONFIG, CommandError, Number, code_of
from relay.cli.options import check_argument, config_option
from relay.config.binding import Binder
from relay.config.document import read
from relay.config.installed_service import RunningEnvironment, service_of, start_command
from relay.config.paths import find_config, is_there
from relay.config.problems import ConfigError
from relay.config.tables import bind_tables
from relay.errors import RelayError
from relay.process.systemd import sockets_given
from relay.store.opening import file_of, path_of

if TYPE_CHECKING:
    from relay.plugin_loading.loader import Setup


def _empty_database(_ctx: click.Context, _parameter: click.Parameter, value: str | None) -> str | None:
    """Check the URL of a database in an argument."""
    return None if value is None else check_argument(value)


@click.command()
@config_option
@click.option("--demo", is_flag=True, help="Run a demo with temporary state and a local receiver.")
@click.option(
    "--exit",
    "leave",
    is_flag=True,
    help="With --demo: exit after the samples; the exit code is 1 if a delivery is missing.",
)
@click.option(
    "--nodes",
    type=Number(2, 9),
    help="With --demo: run this number of nodes on a temporary PostgreSQL server, and kill one of them.",
)
@click.option(
    "--storage",
    metavar="URL",
    callback=_empty_database,
    help="With --nodes: use this empty PostgreSQL database.",
)
@click.option(
    "--force",
    is_flag=True,
    help="Serve even if the installed service has a database for this configuration.",
)
@click.pass_context
def serve(
    ctx: click.Context,
    config: Path | None,
    *,
    demo: bool,
    leave: bool,
    nodes: int | None,
    storage: str | None,
    force: bool,
) -> None:
    """Run the daemon until SIGTERM or Ctrl-C.

    Example: relay serve -c /etc/relay/config.toml

    If the configuration is invalid, the exit code is 78. With socket activation by systemd, the daemon
    answers 503 instead, until `relay reload` finds a valid configuration. If the relay is installed as a
    service, start the service: `systemctl start relay`.
    """
    _check_uses(demo=demo, leave=leave, nodes=nodes, storage=storage)
    # Imported here, because every other command must start fast without aiohttp.
    if nodes is not None:
        from relay.demo.cluster import run_cluster_demo  # noqa: PLC0415 - see above

        ctx.exit(_run(lambda: run_cluster_demo(nodes, storage, leave=leave)))
    if demo:
        from relay.demo.run import run_demo  # noqa: PLC0415 - see above

        ctx.exit(_run(lambda: run_demo(leave=leave)))
    _serve(ctx, config, force=force)


def _check_uses(*, demo: bool, leave: bool, nodes: int | None, storage: str | None) -> None:
    """Check that options of the demo are used together."""
    if leave and not demo:
        raise click.UsageError("--exit needs --demo")
    if nodes is not None and not demo:
        raise click.UsageError("--nodes needs --demo")
    if storage is not None and nodes is None:
        raise click.UsageError("--storage needs --nodes")


def _serve(ctx: click.Context, config: Path | None, *, force: bool) -> None:
    """Run the daemon, or the standby while the configuration is invalid."""
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
        environment = RunningEnvironment(path)
        standby = Standby(path, error, lambda: _load_again(path, environment), os.environ)
        held = _run(standby.run)
        if held is None:
            return  # SIGTERM or Ctrl-C
        setup = held
    log = setup.config.log
    configure(log.level, log.format, under_systemd=under_systemd())
    try:
        _run(lambda: run_app(setup))
    except RelayError as error:
        if not is_read(sys.stderr):  # waiting for a reader would keep systemd from restarting the service
            ctx.exit(code_of(error))
        raise


def _load_again(path: Path, environment: RunningEnvironment) -> "Setup":
    """Load a configuration again, with the current environment files of the service.

    Raises:
        ConfigError: it still has problems.
    """
    from relay.plugin_loading.loader import load  # noqa: PLC0415 - see above

    given = environment.read()
    setup = load(path, given)
    for name in os.environ.keys() - given.environ.keys():
        del os.environ[name]
    os.environ.update(given.environ)  # for the daemon that starts now
    return setup


def _refuse_second(path: Path) -> None:
    """Refuse to serve the installed service's configuration with another database or as another user.

    Raises:
        CommandError: this process is not the service, and the service has a database for this configuration.
    """
    service = service_of(path)
    if service is None:
        return
    try:
        config = bind_tables(Binder(read(path), os.environ, lenient=True))
    except ConfigError:  # `load` reports it
        return
    url = config.storage.url.reveal()
    ours = file_of(url, config.state_dir) if url else None
    if ours is None:  # a server's database can be used by one daemon only, wherever it runs
        return
    there = service.directories.get("STATE_DIRECTORY", "").partition(":")[0]
    theirs = ours
    if there and "state_dir" not in read(path).data:
        theirs = path_of(url, Path(there))
    if not is_there(theirs):
        if os.path.realpath(theirs) != os.path.realpath(ours):
            logging.getLogger("relay").warning(
                "%s serves this configuration with another database, %s", service.name, theirs
            )
        return
    if os.path.realpath(theirs) != os.path.realpath(ours):
        what = f"{service.name} serves {path} with the database {theirs}; this relay would use {ours}"
    elif not service.runs_as(os.geteuid()):
        what = f"{service.name} owns the database {theirs}; {service.user} could not use it after this run"
    else:
        return
    hint = f"start the service with `{start_command()}`, or add --force to serve anyway"
    raise CommandError(what, hint=hint)


def _run(main: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    """Run a coroutine, on uvloop where it is installed (the extra `fast`)."""
    loop_factory: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop
    with suppress(ImportError):
        from uvloop import new_event_loop as loop_factory  # noqa: PLC0415 - optional
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        return runner.run(main())
