"""`relay nodes`."""

from typing import Any

import click

from relay.cli import screen
from relay.cli.endpoint import endpoint
from relay.cli.options import quiet_option
from relay.cli.output import print_page

COLUMNS = ("name", "version", "started_at", "seen_at", "config", "jobs", "lanes")

_SHAPE = (
    screen.text("name", least=12, long="middle"), screen.word("version"),
    screen.moment("started_at", "started", rank=2), screen.moment("seen_at", "seen", rank=3),
    screen.word("config"), screen.text("jobs", least=12, long="wrap"),
    screen.text("lanes", least=16, wish=32, long="wrap"),
)  # fmt: skip


@click.command()
@quiet_option
@endpoint("GET nodes")
def nodes(answer: Any, *, quiet: bool) -> None:
    """List the nodes that share the database, and their lanes.

    Example: relay nodes

    If the values in the CONFIG column differ, the nodes have different sources, destinations or rules. With
    SQLite, there is one node.
    """
    print_page(answer, COLUMNS, _SHAPE, quiet=quiet, key="name")
