"""`relay serve`: run the daemon."""

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from relay.cli.options import config_option
from relay.config.find import find_config


@click.command()
@config_option
@click.option("--demo", is_flag=True, help="Show everything once: temporary state, a receiver of its own.")
@click.option(
    "--exit", "leave", is_flag=True, help="With --demo: end after the samples; 1 if one is missing."
)
@click.pass_context
def serve(ctx: click.Context, config: Path | None, *, demo: bool, leave: bool) -> None:
    """Run the daemon until SIGTERM or Ctrl-C.

    Example: relay serve -c /etc/relay/config.toml

    Starts only with a configuration that `relay check-config` finds no problem in.
    """
    if leave and not demo:
        raise click.UsageError("--exit goes with --demo")
    # aiohttp and the rest load only here: every other command must start fast without them.
    if demo:
        from relay.demo.life import run_demo  # noqa: PLC0415 - see above

        ctx.exit(_run(lambda: run_demo(leave=leave)))
    from relay.app import serve as run_app  # noqa: PLC0415 - see above
    from relay.loader import load  # noqa: PLC0415 - see above
    from relay.logs import configure, under_systemd  # noqa: PLC0415 - see above

    setup = load(find_config(config))
    log = setup.config.log
    configure(log.level, log.format, under_systemd=under_systemd())
    _run(lambda: run_app(setup))


def _run(main: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    """Run a coroutine, on uvloop where it is installed (the extra `fast`)."""
    loop_factory: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop
    with suppress(ImportError):
        from uvloop import new_event_loop as loop_factory  # noqa: PLC0415 - optional
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        return runner.run(main())
