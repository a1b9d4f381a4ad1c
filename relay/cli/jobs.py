"""`relay jobs`."""

import click

from relay.cli.api_client import Daemon, daemon_options, work
from relay.cli.exit_codes import CommandError
from relay.cli.main import Group
from relay.cli.options import json_option, quiet_option
from relay.cli.output import print_json, print_page

COLUMNS = ("name", "every", "started_at", "seconds", "runs", "failures", "next_run_at", "error")


@click.group(cls=Group)
def jobs() -> None:
    """What runs periodically, and running it now."""


@jobs.command("list")
@quiet_option
@json_option
@daemon_options
def list_(daemon: Daemon, *, as_json: bool, quiet: bool) -> None:
    """List periodic jobs, when each ran and what it failed of.

    Example: relay jobs list
    """
    print_page(daemon.get("jobs"), COLUMNS, as_json=as_json, quiet=quiet, key="name")


@jobs.command()
@click.argument("name")
@json_option
@daemon_options
def run(daemon: Daemon, name: str, *, as_json: bool) -> None:
    """Run a job now, and wait for its end.

    Example: relay jobs run retention

    Ctrl-C cancels this run; the next one comes in its time.
    """
    done = work(
        daemon, "jobs", name, "run", tell=lambda _: f"{name} is running", stopped=f"{name} runs again later"
    )
    print_json(done) if as_json else click.echo(f"{name}: {done['error'] or 'done'} in {done['seconds']} s")
    if done["error"] is not None:
        raise CommandError(f"the job {name} failed", hint="the relay's log has the traceback")
