"""`relay audit`."""

from typing import Any

import click

from relay.cli import screen
from relay.cli.api_client import Daemon
from relay.cli.endpoint import daemon_options
from relay.cli.options import filter_options, page_options
from relay.cli.output import print_page
from relay.cli.selection import gather

COLUMNS = ("at", "operator", "access", "remote", "method", "path", "status", "body", "request_id", "node")
SHAPE = (
    screen.moment("at", "time"), screen.text("operator", least=10), screen.word("access", rank=2),
    screen.word("method"), screen.text("path", least=20, long="middle"), screen.number("status"),
    screen.text("body", least=16, rank=1),
)  # fmt: skip


@click.command()
@filter_options("audit")
@page_options
@daemon_options
def audit(daemon: Daemon, *, as_json: bool, quiet: bool, **query: Any) -> None:
    """List changes that operators made, newest first.

    Example: relay audit --since 2d

    Each change over the admin API has its operator: the user of the relay command, the name of the token,
    the login to the dashboard, or the user that a proxy named. The latest 10,000 changes are kept; the log
    has all of them, under relay.audit.
    """
    print_page(
        gather(daemon, "audit", **query), COLUMNS, SHAPE, as_json=as_json, quiet=quiet, key="request_id"
    )
