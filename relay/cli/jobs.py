"""`relay jobs`."""

from typing import Any

import click

from relay.cli import screen
from relay.cli.api_client import Daemon, run_operation
from relay.cli.completion import complete
from relay.cli.endpoint import daemon_options, endpoint
from relay.cli.main import CommandError, Group
from relay.cli.options import json_option, quiet_option
from relay.cli.output import print_json, print_page

COLUMNS = ("name", "every", "started_at", "seconds", "runs", "failures", "next_run_at", "error")


def _took(seconds: float | None) -> str:
    return "" if seconds is None else screen.milliseconds(seconds * 1000)


_SHAPE = (
    screen.text("name", least=18, long="middle"), screen.word("every"),
    screen.moment("started_at", "last run"), screen.Column("seconds", "took", screen.each(_took), right=True),
    screen.number("runs", rank=2), screen.number("failures"),
    screen.Column("next_run_at", "next run", screen.each(screen.due), rank=1),
    screen.text("error", least=16, long="wrap"),
)  # fmt: skip
_NODE = screen.text("node", "runs on", least=8, long="middle")


@click.group(cls=Group)
def jobs() -> None:
    """List and run periodic jobs."""


@jobs.command("list")
@quiet_option
@endpoint("GET jobs")
def list_(answer: Any, *, quiet: bool) -> None:
    """List periodic jobs with their latest run and its error.

    Example: relay jobs list
    """
    is_cluster = any(job.get("node") for job in answer["items"])
    columns, shape = ((*COLUMNS, "node"), (*_SHAPE, _NODE)) if is_cluster else (COLUMNS, _SHAPE)
    print_page(answer, columns, shape, quiet=quiet, key="name")


@jobs.command()
@click.argument("name", shell_complete=complete("job"))
@json_option
@daemon_options
def run(daemon: Daemon, name: str, *, as_json: bool) -> None:
    """Run a job now and wait until it finishes.

    Example: relay jobs run retention

    Ctrl-C cancels this run; the job runs again on schedule.
    """
    done = run_operation(
        daemon, "jobs", name, "run",
        describe=lambda _: f"{name} is running", stopped=f"{name} runs again on schedule",
    )  # fmt: skip
    print_json(done) if as_json else click.echo(f"{name}: {done['error'] or 'done'} in {done['seconds']} s")
    if done["error"] is not None:
        raise CommandError(f"job {name} failed", hint="the daemon's log has the traceback")
