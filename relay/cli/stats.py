"""`relay stats`."""

from typing import TYPE_CHECKING, Any

import click

from relay.cli import screen
from relay.cli.api_client import Daemon
from relay.cli.endpoint import reader_options
from relay.cli.options import filter_options, page_options
from relay.cli.output import print_page

if TYPE_CHECKING:
    from relay.cli.offline import Offline

COLUMNS = ("hour", "source", "type", "events", "duplicates", "bytes")
_SHAPE = (
    screen.moment("hour"), screen.text("source", least=10, long="middle"),
    screen.text("type", least=16, long="middle"), screen.number("events"),
    screen.number("duplicates", rank=1), screen.size("bytes", "size"),
)  # fmt: skip


@click.command()
@filter_options("stats")
@page_options
@reader_options
def stats(daemon: "Daemon | Offline", *, as_json: bool, quiet: bool, **query: Any) -> None:
    """Count received events per hour, source and type.

    Example: relay stats --source adorn --since 7d

    The counts include deleted events. The latest hour comes first. The hour that contains --since
    is counted in full. -q prints only the types.
    """
    page = daemon.get("stats", **query)
    print_page(page, COLUMNS, _SHAPE, as_json=as_json, quiet=quiet, key="type")
